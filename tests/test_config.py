"""Config, command line and JSON are one thing, and mistakes are named."""

import dataclasses
import json
import pickle

import pytest
from helpers import configs

from nanolab.cli import RENAMED, UserError, current_names, from_json, from_preset, main, parse, to_json
from nanolab.inference.config import ChatConfig
from nanolab.model.config import GPTConfig, chosen
from nanolab.stages.config import BaseTrainConfig, RLConfig

ALL = list(configs().values())


def test_every_kind_of_value_is_parsed():
    cfg = parse(
        BaseTrainConfig,
        "--run a-b --depth=4 --max_seq_len 512 --num-iterations -1 --target-flops 1e15 --resume --no-log-grad-norm"
        " --data pydocs:0.7,x:0.3".split(),
    )
    want = dict(
        run="a-b",
        depth=4,
        max_seq_len=512,
        num_iterations=-1,
        target_flops=1e15,
        resume=True,
        log_grad_norm=False,
        data="pydocs:0.7,x:0.3",
    )
    assert cfg == BaseTrainConfig(**want)
    assert parse(BaseTrainConfig, []) == BaseTrainConfig()
    assert parse(ChatConfig, ["-p", "Once upon"]).prompt == "Once upon"
    assert parse(ChatConfig, ["--prompt=a=b"]).prompt == "a=b"


@pytest.mark.parametrize(
    "argv", [["--preset", "gpt2", "--depth", "3", "--no-tied-head"], ["--depth=3", "--no-tied-head", "--preset=gpt2"]]
)
def test_a_preset_is_a_row_of_defaults_wherever_it_stands(argv):
    cfg = parse(BaseTrainConfig, argv)
    assert cfg == from_preset(BaseTrainConfig, "gpt2", depth=3, tied_head=False)
    assert (cfg.preset, cfg.norm, cfg.depth, cfg.num_iterations) == ("gpt2", "layernorm", 3, 19073)


def test_chosen_flags_are_those_that_differ():
    assert chosen(GPTConfig(vocab_size=5, n_layer=3)) == []
    assert chosen(BaseTrainConfig(depth=3, mlp="swiglu", smear=False, positions="nope")) == [
        "positions nope",
        "smear False",
        "mlp swiglu",
    ]


@pytest.mark.parametrize(
    "flag,value",
    [("num_iterations", 5), ("target_flops", 1e12), ("target_param_data_ratio", 2.0), ("max_seconds", 30.0)],
)
def test_a_horizon_given_beside_a_preset_is_the_only_one(flag, value):
    for preset in ("gpt2", "labels39m"):
        cfg = parse(BaseTrainConfig, ["--preset", preset, f"--{flag.replace('_', '-')}", str(value)])
        off = {"num_iterations": -1, "target_flops": -1.0, "target_param_data_ratio": -1.0, "max_seconds": -1.0}
        assert {name: getattr(cfg, name) for name in off} == off | {flag: value}


def test_fingers_of_the_reference_harness():
    """Its flags exist under its names and with its defaults, except for those that mean something else here."""
    theirs = dict(
        depth=20,
        aspect_ratio=64,
        head_dim=128,
        max_seq_len=2048,
        window_pattern="SSSL",
        num_iterations=-1,
        target_flops=-1.0,
        device_batch_size=32,
        total_batch_size=-1,
        embedding_lr=0.3,
        unembedding_lr=0.008,
        matrix_lr=0.02,
        scalar_lr=0.5,
        weight_decay=0.28,
        warmup_steps=40,
        warmdown_ratio=0.65,
        final_lr_frac=0.05,
        eval_every=250,
        sample_every=2000,
        device_type="",
    )
    ours = to_json(BaseTrainConfig())
    assert {name: ours.get(name) for name in theirs} == theirs
    assert {"run", "target_param_data_ratio", "eval_tokens", "save_every"} <= set(ours)


@pytest.mark.parametrize(
    "argv,hint",
    [
        (["--dpeth", "4"], "--dpeth is not a flag of this command; did you mean --depth?"),
        (["--depth", "4", "--warmup=40"], "--warmup is not a flag of this command; did you mean --warmup-steps?"),
        (["--device_batchsize", "4"], "did you mean --device-batch-size?"),
        (["--no-resum"], "--no-resum is not a flag of this command"),
        (["--zzzzqqqq", "4"], "--zzzzqqqq"),
        (["4"], "Unrecognized"),
        (["--depth", "four"], "--depth"),
        (["--depth"], "--depth"),
        (["--preset", "gtp2", "--depth", "3"], "did you mean --preset gpt2?"),
        (["--preset=gpt2-medum"], "did you mean --preset gpt2-medium?"),
        (["--preset="], "preset '' is unknown"),
        (["--depth", "3", "--preset"], "preset"),
    ],
)
def test_bad_command_lines_leave_with_2(argv, hint, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(BaseTrainConfig, argv)
    assert leaving.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_json_round_trip(cls):
    """Defaults and changed values survive a trip through text."""
    changed = {
        f.name: not f.default if f.type == "bool" or f.type is bool else f.default for f in dataclasses.fields(cls)
    }
    for cfg in (cls(), cls(**changed)):
        again = from_json(cls, json.loads(json.dumps(to_json(cfg))))
        assert again == cfg and type(again) is cls


def test_unknown_json_field_names_the_nearest():
    values = to_json(GPTConfig())
    values["n_layers"] = values.pop("n_layer")
    with pytest.raises(UserError, match="GPTConfig has no field 'n_layers'; did you mean n_layer?"):
        from_json(GPTConfig, values)


@pytest.mark.parametrize("former,name", RENAMED.items())
def test_former_names_are_aliases_and_records_of_them_load(former, name):
    """In every config that has the new name and gives the former one to nothing else."""
    flag, before = f"--{former.replace('_', '-')}", f"--{name.replace('_', '-')}"
    having = [c for c in ALL if {former, name} & set(c.__dataclass_fields__)]
    assert having
    for cls in having:
        record = {former: "sink"}
        if former in cls.__dataclass_fields__:
            assert current_names(cls, record) == record
            continue
        assert from_json(cls, record) == cls(**{name: "sink"})
        for argv in ([flag, "sink"], [f"{flag}=sink"], [before, "sink"]):
            assert getattr(parse(cls, argv), name) == "sink"


def test_the_normaliser_of_advantages_keeps_its_name():
    cfg = parse(RLConfig, ["--normaliser", "token"])
    assert cfg.normaliser == "token" and from_json(RLConfig, to_json(cfg)) == cfg


@pytest.mark.parametrize(
    "changes,said",
    [
        (dict(n_embd=100, n_head=6), "100 over 6 heads"),
        (dict(n_embd=66, n_head=2), "head size 33"),
        (dict(n_head=6, attention="gqa:4"), "--attention gqa:4 with 6 heads"),
        (dict(attention="gqa"), "expected mha, mqa, mla or gqa:G"),
        (dict(attention="mqa:2"), "--attention mqa:2"),
        (dict(window_size=-1), "--window-size is -1"),
        (dict(position_pattern="R,X"), "'R,X'"),
        (dict(softmax_n=-0.5), "--softmax-n is -0.5"),
        (dict(rope_fraction=0.0), "--rope-fraction is 0"),
        (dict(bias="qkv,ou"), "names 'ou'; .*did you mean out"),
        (dict(mlp_dropout=1.0), "--mlp-dropout is 1"),
        (dict(pad_vocab_to=0), "--pad-vocab-to is 0"),
        (dict(window_pattern=""), "''"),
        (dict(window_pattern="sssl"), "'sssl'"),
        (dict(n_embd=16, n_head=1), "width 16"),
        (dict(n_layer=0), "--n-layer is 0"),
        (dict(vocab_size=-1), "--vocab-size is -1"),
    ],
)
def test_impossible_architectures(changes, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(GPTConfig(), **changes)


@pytest.mark.parametrize(
    "command,code,err",
    [
        (lambda: None, 0, ""),
        (lambda: 0, 0, ""),
        (lambda: 3, 3, ""),
        (lambda: parse(BaseTrainConfig, ["--dpeth", "4"]), 2, "did you mean --depth?"),
        (lambda: dataclasses.replace(GPTConfig(), n_layer=0), 1, "error [flag-out-of-bounds]: --n-layer is 0"),
    ],
)
def test_main_exit_codes(command, code, err, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(command)
    assert leaving.value.code == code
    assert err in capsys.readouterr().err


def test_main_interrupt_and_bugs(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as leaving:
        main(interrupted)
    assert leaving.value.code == 130
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        main(lambda: 1 // 0)


def test_an_error_carries_its_code_and_values(capsys):
    def command():
        raise UserError(
            "--learning-rate is not read by --recipe dial", "flag-not-read", flag="learning_rate", by="dial"
        )

    with pytest.raises(UserError) as e:
        command()
    assert (e.value.code, e.value.values) == ("flag-not-read", {"flag": "learning_rate", "by": "dial"})
    copy = pickle.loads(pickle.dumps(e.value))  # as a rank gets it
    assert (str(copy), copy.code, copy.values) == (str(e.value), e.value.code, e.value.values)
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 1
    assert capsys.readouterr().err == "error [flag-not-read]: --learning-rate is not read by --recipe dial\n"


@pytest.mark.fault("S17")
@pytest.mark.parametrize(
    "text",
    [
        "--find me",
        "--help",
        "-p",
        "--prompt",
        "--prompt=x",
        "--temperature=0",
        "-5+3",
        "-",
        "--",
        "-p=x",
        "a=b",
        "--no-chat",
        "",
    ],
)
def test_a_prompt_may_begin_like_a_flag(text):
    for typed in (["-p", text], [f"-p={text}"], ["--prompt", text], [f"--prompt={text}"]):
        cfg = parse(ChatConfig, ["--max-tokens", "5", *typed, "--temperature", "0.5"])
        assert (cfg.prompt, cfg.max_tokens, cfg.temperature, cfg.chat) == (text, 5, 0.5, False)


def test_a_prompt_without_its_text_is_an_error():
    with pytest.raises(SystemExit):
        parse(ChatConfig, ["--temperature", "0", "-p"])
