"""A flag that was typed and is not read is refused, and so is a number out of its bounds. The tables say nothing that
the code does not do.
"""

import ast
import dataclasses
import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import warm
from helpers import configs

from nanolab.cli import UserError, from_json, parse, to_json
from nanolab.data.config import DataBuildConfig, GenChatConfig
from nanolab.evals.config import BaseEvalConfig, ChatEvalConfig
from nanolab.inference.config import ChatConfig
from nanolab.lab.config import BenchConfig, CompareConfig, LabConfig, TryConfig
from nanolab.model.config import GPTConfig, InspectConfig
from nanolab.model.variants.tables import AXES
from nanolab.presets import PRESETS
from nanolab.serving.config import ServeConfig
from nanolab.stages.config import BaseTrainConfig, RLConfig, SFTConfig
from scripts import lab

ROOT = Path(__file__).parents[1]


def neighbour(path: str):
    """A file of tests as a module."""
    spec = importlib.util.spec_from_file_location(
        f"nanolab_tests_{Path(path).stem}_of_flags", Path(__file__).parent / path
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CONFIGS = list(configs().values())
BASE, BENCH = BaseTrainConfig, BenchConfig


def refused(cls, line: str) -> tuple[str, dict]:
    with pytest.raises(UserError) as error:
        parse(cls, line.split())
    assert len(str(error.value).split("; ")) >= 3  # what was seen, what is expected, what to type
    return error.value.code, error.value.values


@pytest.mark.fault("F5")
@pytest.mark.parametrize(
    "cls,line,by",
    [
        (BASE, "--learning-rate 6e-4", "dial"),  # the default, but it was typed
        (BASE, "--beta1=0.8", "dial"),
        (BASE, "--eps 1e-9 --recipe dial", "dial"),
        (BASE, "--preset tiny --learning-rate 1", "dial"),
        (BASE, "--preset gpt2 --matrix-lr 0.1", "adamw_cosine"),
        (BASE, "--warmdown-ratio 0.5 --recipe adamw_cosine", "adamw_cosine"),
        (BASE, "--recipe adam_constant --warmup-steps 4", "adam_constant"),
        (BASE, "--recipe adam_constant --weight-decay 0", "adam_constant"),
        (BASE, "--warmdown-ratio 0 --final-lr-frac 0.1", "warmdown_ratio"),
        (BASE, "--tied-head --no-value-embeds --embedding-lr 0.1", "tied_head"),
        (BASE, "--no-residual-scalars --scalar-lr 0.1", "residual_scalars"),
        (BASE, "--softmax-n 7", "softmax"),
        (BASE, "--mla-kv-rank 9 --attention gqa:2", "gqa:2"),
        (BASE, "--position-pattern N", "rope"),
        (BASE, "--positions nope --rope-base 5", "nope"),
        (BASE, "--preset gpt2 --rope-layout interleaved", "learned"),
        (BASE, "--attention mla --no-value-embeds --rope-fraction 0.5", "mla"),
        (BASE, "--window-pattern L --window-size 64", "L"),
        (BASE, "--data pydocs --data-dir texts", "data_dir"),
        (BASE, "--num-shards 9", "data"),
        (BASE, "--num-shards 9 --data-dir texts", "data_dir"),
        (BASE, "--num-iterations 9 --max-seconds 9", "num_iterations"),
        (BASE, "--target-flops 1e9 --target-param-data-ratio 9", "target_flops"),
        (BASE, "--plan-for 8xH100", "dry_run"),
        (BASE, "--plan-for 8xH100 --dry-run --device-type cpu", "plan_for"),
        (BASE, "--eval-every -1 --eval-tokens 9", "eval_every"),
        (BASE, "--core-metric-max-per-task 9", "core_metric_every"),
        (BASE, "--eval-bundle x", "core_metric_every"),
        (BASE, "--log-every -1 --log-grad-norm", "log_every"),
        (BASE, "--run dummy --wandb offline", "run"),
        (InspectConfig, "--softmax-n 2", "softmax"),
        (DataBuildConfig, "--data-dir texts --workers 2", "data_dir"),
        (DataBuildConfig, "--data ./texts --workers 2", "data"),
        (BaseEvalConfig, "--max-per-task 9", "bpb,sample"),
        (BaseEvalConfig, "--modes core --split-tokens 9", "core"),
        (BaseEvalConfig, "--modes core --hellaswag-bos", "core"),
        (BaseEvalConfig, "--modes bpb --no-train-text --all-checkpoints", "all_checkpoints"),
        (BaseEvalConfig, "--modes hellaswag --hellaswag x.jsonl --eval-bundle y", "hellaswag"),
        (BaseEvalConfig, "--trust-code", "hf"),
        (BaseEvalConfig, "--extra", "bpb,sample"),
        (BaseEvalConfig, "--modes bpb --seed 3", "bpb"),
        (SFTConfig, "--stages x.toml --tasks identity", "stages"),
        (SFTConfig, "--epochs 1 --num-iterations 9", "num_iterations"),
        (SFTConfig, "--eval-every -1 --no-eval-text", "eval_every"),
        (SFTConfig, "--chatcore-tasks gsm8k", "chatcore_every"),
        (RLConfig, "--clip-low 0.1", "updates_per_batch"),
        (RLConfig, "--num-epochs 2 --num-iterations 3", "num_iterations"),
        (RLConfig, "--eval-every -1 --eval-samples 2", "eval_every"),
        (ChatEvalConfig, "--top-k 5", "temperature"),
        (ChatConfig, "--raw --system x", "raw"),
        (ChatConfig, "-p x --temperature 0 --top-p 0.5", "temperature"),
        (ServeConfig, "--api-key x --api-key-env Y", "api_key"),
        (BENCH, "--what train --megabytes 3", "train"),
        (BENCH, "--what data --depth 3", "data"),
        (BENCH, "--what tokenizer --max-seq-len 64", "tokenizer"),
        (BENCH, "--what infer --recipe dial", "infer"),
        (BENCH, "--what infer --data-dir x", "infer"),
        (BENCH, "--what eval --model x --depth 3", "model"),
        (BENCH, "--what tokenizer --tokenizer x --vocab-size 300", "tokenizer"),
        (BENCH, "--what train --model x", "train"),
    ],
)
def test_a_typed_flag_that_is_not_read_is_refused(cls, line, by):
    code, values = refused(cls, line)
    assert (code, values["by"]) == ("flag-not-read", by)
    assert re.search(rf"--(no-)?{values['flag'].replace('_', '-')}\b", line) and values["flag"] != by


@pytest.mark.parametrize(
    "cls,line",
    [
        (
            BASE,
            (
                "--recipe adamw_cosine --learning-rate 1e-3 --beta1 0.8 --beta2 0.9 --eps 1e-9 --weight-decay 0.1"
                " --warmup-steps 3 --final-lr-frac 0.1"
            ),
        ),
        (
            BASE,
            "--preset gpt2 --learning-rate 1e-3 --max-seconds 30 --num-iterations -1",
        ),  # a horizon that is off is no horizon
        (BASE, "--positions rnope --position-pattern R,R,N --rope-base 1000 --rope-fraction 0.5"),
        (BASE, "--attention mla --no-value-embeds --mla-rope-dim 8 --softmax softmax_n --softmax-n 2"),
        (BASE, "--window-pattern rope --window-size 9"),
        (BASE, "--data climbmix:0.5,./texts:0.5 --num-shards 3"),
        (BASE, "--tied-head --embedding-lr 0.1 --no-residual-scalars --norm-gain --scalar-lr 0.1"),
        (BASE, "--dry-run --plan-for 8xH100 --threads 2 --wandb online"),  # a dry run shows what the same line would do
        (BASE, "--core-metric-every 5 --eval-bundle x --core-metric-max-per-task -1"),
        (BaseEvalConfig, "--num-shards 3"),  # the run's data may be of the hub
        (SFTConfig, "--learning-rate 1e-5 --stages x.toml --epochs 2"),  # known once the model and the file are
        (RLConfig, "--algorithm grpo --updates-per-batch 2 --clip-high 0.3"),
        (ChatConfig, "--temperature 0 --top-k 5"),  # /temperature can change it
        (BENCH, "--preset gpt2 --what tokenizer"),
        (BENCH, "--what infer --model x --int8"),
    ],
)
def test_flags_that_are_read_are_not_refused(cls, line):
    parse(cls, line.split())


def test_values_that_were_not_typed_are_not_refused():
    """Neither a preset's nor a recorded run's."""
    for name in PRESETS:
        parse(BaseTrainConfig, ["--preset", name, "--recipe", "dial"])
    old = to_json(BaseTrainConfig(learning_rate=3e-4, softmax_n=7.0, num_iterations=0, lr_scale=0.0, grad_clip=0.0))
    assert to_json(from_json(BaseTrainConfig, old)) == old


@pytest.mark.fault("F6", "P4")
@pytest.mark.parametrize(
    "cls,line,flag",
    [
        *[(cls, f"--num-iterations {n}", "num_iterations") for cls in (BASE, SFTConfig, RLConfig) for n in (0, -2)],
        *[(BASE, f"--max-seconds {x}", "max_seconds") for x in ("0", "nan", "inf", "-3")],
        *[(BASE, f"--lr-scale={x}", "lr_scale") for x in ("nan", "inf", "-inf", "-1e-3", "0")],
        *[(BASE, f"--grad-clip {x}", "grad_clip") for x in ("nan", "0", "-2")],
        *[(BASE, f"--weight-decay {x}", "weight_decay") for x in ("nan", "-0.1")],
        *[(cls, f"--final-lr-frac {x}", "final_lr_frac") for cls in (BASE, SFTConfig, RLConfig) for x in (-1, 1.5)],
        *[(cls, f"--warmdown-ratio {x}", "warmdown_ratio") for cls in (BASE, SFTConfig, RLConfig) for x in (-0.1, 1.1)],
        *[
            (BASE, f"--{name.replace('_', '-')} -1", name)
            for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "warmup_steps")
        ],
        (BASE, "--recipe adamw_cosine --learning-rate -1", "learning_rate"),
        (BASE, "--recipe adamw_cosine --beta2 1", "beta2"),
        (BASE, "--target-flops 0", "target_flops"),
        (BASE, "--log-every 0", "log_every"),
        (BASE, "--save-every 0", "save_every"),
        (BASE, "--eval-tokens 0", "eval_tokens"),
        (BASE, "--total-batch-size 0", "total_batch_size"),
        (BASE, "--depth 0", "depth"),
        (BASE, "--rope-base nan", "rope_base"),
        (BASE, "--threads -1", "threads"),
        (BASE, "--seed -1", "seed"),
        (SFTConfig, "--learning-rate -2", "learning_rate"),
        (SFTConfig, "--init-lr-frac 0", "init_lr_frac"),
        (SFTConfig, "--warmup-ratio 1.2", "warmup_ratio"),
        (SFTConfig, "--replay 1", "replay"),
        (SFTConfig, "--epochs 0", "epochs"),
        (RLConfig, "--kl nan", "kl"),
        (RLConfig, "--num-samples 1", "num_samples"),
        (ChatEvalConfig, "--max-problems 0", "max_problems"),
        (ChatConfig, "--temperature nan", "temperature"),
        (ChatConfig, "--top-p 1.5", "top_p"),
        (ServeConfig, "--port 70000", "port"),
        (BENCH, "--megabytes 0", "megabytes"),
    ],
)
def test_a_number_out_of_its_bounds_is_refused(cls, line, flag):
    code, values = refused(cls, line)
    assert (code, values["flag"]) == ("flag-out-of-bounds", flag)
    typed = float(re.split("[ =]", line)[-1])
    assert values["value"] == typed or math.isnan(values["value"]) and math.isnan(typed)
    assert values["bounds"]


@pytest.mark.fault("F8")
@pytest.mark.parametrize("flag", ["log_every", "eval_examples", "eval_samples"])
def test_zeros_of_chat_rl_are_refused_by_their_own_names(flag):
    code, values = refused(RLConfig, f"--{flag.replace('_', '-')} 0")
    assert (code, values["flag"], values["value"]) == ("flag-out-of-bounds", flag, 0)


@pytest.mark.parametrize(
    "cls,line",
    [
        (BASE, "--num-iterations -1 --max-seconds 0.5 --lr-scale -1 --grad-clip -1 --eval-every -1 --warmup-steps 0"),
        (BASE, "--recipe adamw_cosine --learning-rate 0 --final-lr-frac 0"),
        (
            SFTConfig,
            (
                "--num-iterations -1 --embedding-lr -1 --learning-rate 0 --max-seq-len -1 --device-batch-size -1"
                " --warmdown-ratio 1 --final-lr-frac 1"
            ),
        ),
        (RLConfig, "--kl 0 --rollout-batch-size 0 --top-k 0 --log-every -1 --eval-examples -1"),
        (GenChatConfig, "--max-tokens 0"),
        (ServeConfig, "--port 0 --prefix-mb 0"),
        (InspectConfig, "--context 0"),
    ],
)
def test_values_that_the_help_gives_a_meaning_stay(cls, line):
    parse(cls, line.split())


@pytest.mark.fault("F6", "P4")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_record_with_no_number_is_refused(value):
    with pytest.raises(UserError) as error:
        from_json(BaseTrainConfig, to_json(BaseTrainConfig()) | {"lr_scale": value})
    assert (error.value.code, error.value.values["flag"]) == ("flag-out-of-bounds", "lr_scale")


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda c: c.__name__)
def test_every_number_has_bounds_that_hold_its_default(cls):
    """A flag's type says its bounds. None is free: what is not finite never is a value."""
    from nanolab.cli import bounds_of

    numbers = [f for f in dataclasses.fields(cls) if type(f.default) in (int, float)]
    assert [f.name for f in numbers if bounds_of(f) is None] == []
    assert [f.name for f in numbers if not bounds_of(f).holds(f.default)] == []
    assert not any(bounds_of(f).holds(x) for f in numbers for x in (math.nan, math.inf, -math.inf))


def test_presets_are_within_bounds():
    from nanolab.cli import check_bounds, from_preset

    for name in PRESETS:
        for cls in (BaseTrainConfig, InspectConfig, BenchConfig):
            check_bounds(cls, vars(from_preset(cls, name)))


def test_the_tables_name_flags_that_exist():
    by_name = {c.__name__: {f.name for f in dataclasses.fields(c)} for c in CONFIGS}
    for c in CONFIGS:
        words = {word for row in vars(c).get("CONDITIONS", ()) for word in (*row.flags.split(), row.by)}
        below = set().union(*(by_name[k.__name__] for k in CONFIGS if c in k.__mro__))
        assert {word for word in words if not word[0].isupper()} <= below, c
        assert {word for word in words if word[0].isupper()} <= set(by_name)


# The tables beside the code: changing a flag that is unread changes nothing, changing one that is read changes
# something.

CHANGED = dict(
    rope_base=50.0,
    rope_layout="interleaved",
    rope_fraction=0.5,
    rope_scaling="linear:2",
    position_pattern="N,R",
    mla_kv_rank=12,
    mla_q_rank=20,
    mla_rope_dim=2,
    window_size=3,
    softmax_n=3.0,
)
SHAPES = {
    **{
        f"{p}, {a}": dict(positions=p, attention=a)
        for p in ("rope", "nope", "rnope", "learned", "sinusoidal", "alibi")
        for a in ("mha", "mla")
    },
    **{n: dict(softmax=n) for n in ("softmax1", "softmax_n", "sink")},
    **{f"windows {w}": dict(window_pattern=w) for w in ("L", "SL", "LLLS", "rope")},
    "windows rope, rnope": dict(window_pattern="rope", positions="rnope"),
    "rnope N": dict(positions="rnope", position_pattern="N"),
    "rnope, R too late": dict(positions="rnope", position_pattern="N,N,N,N,R"),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_architecture_flags_are_read_where_the_table_says(shape):
    import torch

    from nanolab.cli import not_read
    from nanolab.model.gpt import GPT

    base = GPTConfig(
        **dict(
            sequence_len=16,
            vocab_size=40,
            n_layer=4,
            n_head=2,
            n_embd=32,
            value_embeds=False,
            window_pattern="SL",
            bos=0,
        )
        | shape
    )
    idx = torch.arange(16)[None] % 40

    def logits(c: GPTConfig):
        torch.manual_seed(0)
        model = GPT(c)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        return model(idx)

    flags = {**dataclasses.asdict(base), "depth": base.n_layer}
    before, told = logits(base), not_read(InspectConfig, flags)
    for name, value in CHANGED.items():
        if name == "position_pattern" and base.position_pattern != "R,N":
            continue  # the change of a change
        try:
            same = torch.equal(logits(dataclasses.replace(base, **{name: value})), before)
        except UserError:  # --rope-scaling where nothing turns is refused by the model too
            same = True
        assert same == (name in told), name


RATES = dict(
    learning_rate=0.1,
    beta1=0.5,
    beta2=0.6,
    eps=1e-3,
    embedding_lr=0.11,
    unembedding_lr=0.12,
    matrix_lr=0.13,
    scalar_lr=0.14,
    weight_decay=0.15,
    lr_scale=0.16,
    warmup_steps=7,
    warmdown_ratio=0.17,
    final_lr_frac=0.18,
)
MODELS = {
    "default": {},
    "tied": dict(tied_head=True, value_embeds=False),
    "tied, value embeds": dict(tied_head=True),
    "tied, learned": dict(tied_head=True, value_embeds=False, positions="learned"),
    "no scalars": dict(residual_scalars=False),
    **{
        f"no scalars, {k}": dict(residual_scalars=False, **v)
        for k, v in {
            "gain": dict(norm_gain=True),
            "bias": dict(bias="out"),
            "head bias": dict(bias="head"),
            "sink": dict(softmax="sink"),
            "softmax1": dict(softmax="softmax1"),
            "layernorm": dict(norm="layernorm"),
            "qk l2": dict(qk_norm="l2"),
            "qk layernorm": dict(qk_norm="layernorm"),
            "gate": dict(gate="head"),
        }.items()
    },
    "no fall": dict(warmdown_ratio=0.0),
}


ENTRIES = {
    f"{flag} {name}": {flag: "gqa:2" if name == "gqa" else name}
    for flag, table in AXES.items()
    for name, entry in table.items()
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_rates_of_every_entry_are_read_where_the_table_says(entry):
    """An entry with vectors belongs into training.config.has_vectors: without the stream's weights, nothing else is at
    --scalar-lr.
    """
    test_rates_are_read_where_the_table_says(
        "dial", entry | dict(residual_scalars=False, value_embeds=False, tied_head=True), ("scalar_lr", "embedding_lr")
    )


@pytest.mark.parametrize("recipe", ["dial", "adamw_cosine", "adam_constant"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_rates_are_read_where_the_table_says(recipe, model, names=tuple(RATES)):
    import torch

    from nanolab.cli import not_read
    from nanolab.model.gpt import GPT
    from nanolab.training.recipes import param_groups
    from nanolab.training.schedule import make_plan

    cfg = BaseTrainConfig(
        **dict(
            depth=2,
            aspect_ratio=32,
            head_dim=32,
            max_seq_len=32,
            device_batch_size=1,
            total_batch_size=32,
            num_iterations=40,
            warmup_steps=5,
            recipe=recipe,
        )
        | model
    )

    def all_numbers(c: BaseTrainConfig) -> list:
        plan = make_plan(c, 64, 1, 0)
        with torch.device("meta"):
            groups = param_groups(GPT(plan.model), c, plan)
        shown = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        return [
            shown,
            [plan.lr_multiplier(step, step / 40) for step in range(41)],
            [plan.muon_momentum(step, step / 40) for step in range(41)] if recipe == "dial" else 0,
        ]

    before, told = all_numbers(cfg), not_read(BaseTrainConfig, vars(cfg))
    for name in names:
        assert (all_numbers(dataclasses.replace(cfg, **{name: RATES[name]})) == before) == (name in told), name


def written() -> list:
    """(file, script, its words) of every command in README, the guides and the shell scripts; what is unknown before
    they run is 1.
    """
    readme, found = neighbour("test_readme.py"), []
    for name in [*readme.NAMES, *readme.SHELL]:
        text = (ROOT / name).read_text()
        for code in [text] if name in readme.SHELL else [b.code for b in readme.blocks(name, text)]:
            for words in readme.commands(code.replace("; ", " ; ")):
                for at in [i for i, w in enumerate(words) if re.fullmatch(r"scripts\.(?!lm_eval)\w+", w)]:
                    end = next((i for i, w in enumerate(words) if i > at and re.match(r"[|&;>)]|2>", w)), len(words))
                    rest = [
                        w for w in words[at + 1 : end] if (w != "--" or words[at] == "scripts.lab") and "@]" not in w
                    ]
                    found.append((name, words[at], ["1" if "$" in w else w for w in rest]))
    return found


def test_written_commands_give_no_flag_that_is_not_read():
    found = written()
    assert len(found) > 50
    for where, module, words in found:
        if where.endswith("gpu.sh") or "--tasks" in words and words[words.index("--tasks") + 1].startswith("--"):
            continue  # what is measured, or what the flag gets, is known when it runs
        path = ROOT / (module.replace(".", "/") + ".py")
        call = next(
            n
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "parse"
        )
        cls = configs()[call.args[0].id]
        if path.stem == "lab":
            words, flags = lab.spelled_out(words)
            cls = {"--what=try": TryConfig, "--what=compare": CompareConfig}.get(words[0], LabConfig)
            words = words if cls is LabConfig else words[1:]
            parse(BaseTrainConfig, flags)
        elif len(call.args) > 1 and words and not words[0].startswith("-"):
            words = [{"bench": "--what", "import_hf": "--folder"}[path.stem], *words]
        try:
            parse(cls, words)
        except (UserError, SystemExit) as error:
            raise AssertionError(f"{where}: {module} {' '.join(words)}: {error}") from error


@pytest.mark.fault("F5", "F6")
@pytest.mark.parametrize(
    "flags,code", [("--learning-rate 3e-4", "flag-not-read"), ("--num-iterations 0", "flag-out-of-bounds")]
)
def test_a_script_names_the_code(flags, code, tmp_path):
    done = warm.python("-m", "scripts.base_train", "--depth", "2", "--dry-run", *flags.split())
    assert done.returncode == 1 and done.stderr.startswith(f"error [{code}]: "), done.stderr


def test_a_run_that_was_given_unread_flags_resumes_without_them():
    """The older version took them, and kept them in its record."""
    runs = neighbour("records/test_run.py")
    save, start = runs.save, runs.start
    run = start(learning_rate=3e-4, softmax_n=7.0, data="x", data_dir="texts")
    save(run, 2)
    run.close()
    start(resume=True, data_dir="texts").close()
    with pytest.raises(UserError, match="--matrix-lr was 0.02, now 0.5; --final-lr-frac was 0.05, now 0.1"):
        start(resume=True, data_dir="texts", matrix_lr=0.5, final_lr_frac=0.1)


def test_a_run_resumes_from_a_record_with_former_names():
    """And another value of such a flag is as little accepted as of any other."""
    runs = neighbour("records/test_run.py")
    run = runs.start(softmax="sink", data="x", data_dir="texts")
    runs.save(run, 2)
    run.close()
    record = run.dir / "config.json"
    record.write_text(record.read_text().replace('"softmax"', '"normaliser"'))
    with pytest.raises(UserError, match="--softmax was 'sink', now 'softmax1'"):
        runs.start(resume=True, softmax="softmax1", data_dir="texts")
    runs.start(resume=True, softmax="sink", data_dir="texts").close()


@pytest.mark.fault("F5")
@pytest.mark.parametrize(
    "line,stages,flag,by",
    [
        ("--replay 0.1", ["replay = 0.2", "replay = 0.3"], "replay", "stages"),
        ("--epochs 3", ["num_iterations = 2", "epochs = 1"], "epochs", "stages"),
        ("", ["num_iterations = 2\nepochs = 1"], "epochs", "num_iterations"),
        ("--num-iterations 5", ["epochs = 1"], "epochs", "num_iterations"),
    ],
)
def test_flags_and_fields_that_no_stage_reads_are_refused(line, stages, flag, by, tmp_path):
    from nanolab.stages.sft_plan import read_stages

    path = tmp_path / "s.toml"
    path.write_text("".join(f'[[stage]]\ntasks = "identity"\n{text}\n' for text in stages))
    with pytest.raises(UserError) as error:
        read_stages(parse(SFTConfig, ["--stages", str(path), *line.split()]))
    assert (error.value.code, error.value.values) == ("flag-not-read", {"flag": flag, "by": by})


@pytest.mark.fault("F6", "P4")
@pytest.mark.parametrize(
    "field,value", [("init_lr_frac", "nan"), ("num_iterations", "0"), ("replay", "-0.5"), ("init_lr_frac", "inf")]
)
def test_numbers_of_a_stage_have_the_same_bounds(field, value, tmp_path):
    from nanolab.stages.sft_plan import read_stages

    path = tmp_path / "s.toml"
    path.write_text(f'[[stage]]\ntasks = "identity"\n{field} = {value}\n')
    with pytest.raises(UserError) as error:
        read_stages(SFTConfig(stages=str(path)))
    assert (error.value.code, error.value.values["flag"]) == ("flag-out-of-bounds", field)


def test_a_flag_that_serves_one_stage_is_read(tmp_path):
    from nanolab.stages.sft_plan import read_stages

    path = tmp_path / "s.toml"
    path.write_text('[[stage]]\ntasks = "identity"\nreplay = 0.2\n[[stage]]\ntasks = "identity"\nnum_iterations = 3\n')
    first, second = read_stages(parse(SFTConfig, ["--stages", str(path), "--replay", "0.1", "--epochs", "4"]))
    assert (first.epochs, second.replay, second.num_iterations) == (4, 0.1, 3)


# Plans: how the rates move, and what a dry run refuses.


def plan_lines(capsys, **flags) -> str:
    from scripts.base_train import run

    assert (
        run(
            BaseTrainConfig(
                **dict(
                    depth=2,
                    aspect_ratio=32,
                    head_dim=32,
                    max_seq_len=64,
                    device_batch_size=8,
                    total_batch_size=512,
                    device_type="cpu",
                    dry_run=True,
                )
                | flags
            )
        )
        == 0
    )
    return capsys.readouterr().out


@pytest.mark.fault("F5")
@pytest.mark.parametrize(
    "flags,rates,peak",
    [
        (dict(num_iterations=2000), "warm-up over 40 steps, constant, then to 0.05 over the last 65%", None),
        (
            dict(num_iterations=30, warmup_steps=500),
            "warm-up over 500 steps",
            0.02,
        ),  # the product of the rise and the fall, by a plain loop
        (dict(num_iterations=20), "warm-up over 40 steps", 0.21),
        (dict(num_iterations=2000, warmup_steps=0), " constant, then to 0.05", None),
        (
            dict(recipe="adamw_cosine", num_iterations=100, final_lr_frac=0.1),
            "warm-up over 40 steps, half a cosine to 0.1",
            None,
        ),
        (dict(recipe="adamw_cosine", num_iterations=20), "warm-up over 40 steps, half a cosine", 0.50),
        (dict(recipe="adam_constant", num_iterations=20), "constant", None),
    ],
)
def test_the_plan_says_how_the_rates_move(flags, rates, peak, capsys):
    said = plan_lines(capsys, **flags)
    assert rates in re.search(r"^rates .*", said, re.M)[0]
    found = re.search(r"^warning .*the rates reach ([\d.]+) of the plan's", said, re.M)
    assert (found and float(found[1])) == peak
    if peak and "recipe" not in flags:
        n, w = flags["num_iterations"], flags.get("warmup_steps", 40)
        by_hand = max(min(1, (s + 1) / w) * (0.05 + 0.95 * min(1, (1 - s / n) / 0.65)) for s in range(n))
        assert peak == pytest.approx(by_hand, abs=0.006)


@pytest.mark.parametrize(
    "flags,said",
    [
        (dict(mlp="rleu2"), "--mlp is 'rleu2'"),
        (dict(attn_kernel="flesh"), "flesh"),
        (dict(run="a/b"), "run name 'a/b'"),
        (dict(device_type="tpu"), "device type 'tpu'"),
        (dict(data="pydcs"), "corpus 'pydcs'"),
        (dict(data_dir="no-such-folder"), "no-such-folder"),
        (dict(attention="mla"), "--attention mla with --value-embeds"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(flags, said, base_dir):
    from nanolab.data.tokenizer import Tokenizer
    from scripts.base_train import run

    Tokenizer.train(["no text"], 265).save(base_dir / "tokenizer")
    for dry in (True, False):
        with pytest.raises(UserError, match=re.escape(said)):
            run(BaseTrainConfig(**dict(depth=2, device_type="cpu", dry_run=dry) | flags))
