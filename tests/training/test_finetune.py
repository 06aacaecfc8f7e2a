"""Fine-tuning: inherited rates, schedule of stages, warm start over ranks, the mean over supervised tokens, what was
unlearned.
"""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanolab.cli import UserError
from nanolab.data.chat import render
from nanolab.data.conversations import ConversationBatches
from nanolab.data.survey import Reader, survey
from nanolab.data.tokenizer import Tokenizer
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.records import checkpoint
from nanolab.records.models import find_model
from nanolab.runtime import Runtime
from nanolab.stages import base_run, forgetting
from nanolab.stages.base_run import BaseRun
from nanolab.stages.config import SFTConfig
from nanolab.stages.sft_plan import SFTPlan, StageFlags, StagePlan, make_sft_plan, read_stages, shape_of
from nanolab.training import gradients
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import param_groups

spec = importlib.util.spec_from_file_location("nanolab_tests_pretrained", Path(__file__).with_name("pretrained.py"))
pretrained = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrained)

ALONE = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A function (**flags of pretraining) -> the model's ModelRef; one base directory for all tests of this file."""
    folder, made = tmp_path_factory.mktemp("base"), {}
    text = pretrained.write_text(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLAB_BASE_DIR", str(folder))

        def make(**flags):
            key = repr(sorted(flags.items()))
            if key not in made:
                made[key] = f"b{len(made)}"
                pretrained.pretrain(made[key], text, ALONE, **flags)
            patch.setenv("NANOLAB_BASE_DIR", str(folder))
            return find_model(made[key])

        yield make


@pytest.fixture(autouse=True)
def base_dir():
    """Not the fixture of conftest: the models of this file live in one directory."""


def plan_of(cfg: SFTConfig, origin: BaseRun, steps: int = 10) -> SFTPlan:
    return make_sft_plan(cfg, origin, shape_of(cfg, origin, 1), [(read_stages(cfg)[0], steps)])


# --- what is inherited ------------------------------------------------------------------------------------------------


def groups_of(cfg: SFTConfig, origin: BaseRun) -> dict[str, dict]:
    groups = param_groups(GPT(origin.model), origin.rates(cfg), plan_of(cfg, origin))
    return {g["name"]: g for g in groups}


def pretraining_groups(found) -> dict[str, dict]:
    """The groups as pretraining had them at the height of its schedule: flags x its batch scale."""
    meta = checkpoint.load_meta(found.checkpoint)
    cfg = BaseRun.found(found).rates(SFTConfig())
    plan = SimpleNamespace(
        recipe=cfg.recipe,
        batch_scale=meta["plan"]["batch_scale"],
        weight_decay=meta["plan"]["weight_decay"],
        model=BaseRun.found(found).model,
    )
    return {g["name"]: g for g in param_groups(GPT(plan.model), cfg, plan)}


def test_rates_are_those_that_pretraining_ended_up_with(base):
    """--lr-scale of pretraining is in them, and every group's own rate."""
    found = base(lr_scale=0.25, matrix_lr=0.03, scalar_lr=0.4)
    was, now = pretraining_groups(found), groups_of(SFTConfig(), BaseRun.found(found))
    assert now.keys() == was.keys() and len(now) > 6
    for name in was:
        assert now[name]["lr"] == was[name]["lr"] > 0, name
    matrices = [g for g in now.values() if g["kind"] == "muon"]
    assert matrices and all(g["weight_decay"] == 0 for g in matrices)
    assert math.isclose(now["muon_64x64"]["lr"], 0.03 * 0.25) and math.isclose(now["x0_lambdas"]["lr"], 0.4 * 0.25)


@pytest.mark.slow
def test_a_batch_of_another_size_scales_them_by_its_root(base):
    origin = BaseRun.found(base())
    assert plan_of(SFTConfig(total_batch_size=2048), origin).batch_scale == 0.1 * 2.0, (
        "four times the batch, twice the rate"
    )
    adam = BaseRun.found(base(recipe="adamw_cosine", lr_scale=-1.0, learning_rate=1e-3))
    assert plan_of(SFTConfig(total_batch_size=2048), adam).batch_scale == 1.0, "this recipe knows no such law"
    assert groups_of(SFTConfig(learning_rate=2e-4), adam)["matrices"]["lr"] == 2e-4


def test_a_rate_that_is_given_replaces_the_flag_and_keeps_the_law(base):
    found = base()
    origin = BaseRun.found(found)
    was, now = pretraining_groups(found), groups_of(SFTConfig(matrix_lr=0.04), origin)
    assert math.isclose(now["muon_64x64"]["lr"], 0.04 * 0.1) and now["wte"]["lr"] == was["wte"]["lr"]


def test_a_model_that_was_fine_tuned_hands_on_what_it_inherited(base):
    found = base()
    meta, first = checkpoint.load_meta(found.checkpoint), BaseRun.found(found)
    tuned = {**meta, "config": {"tasks": "x"}, "plan": {}, "origin": first.facts()}
    second = BaseRun.of(tuned, "b-sft@7")
    assert (second.name, second.pretraining, second.plan) == ("b-sft@7", first.pretraining, first.plan)
    assert BaseRun.of(tuned).name == f"{found.name}@4" and plan_of(SFTConfig(), second) == plan_of(SFTConfig(), first)


def test_the_model_keeps_its_row_when_conversations_have_shorter_ones(base):
    origin = BaseRun.found(base())
    plan = plan_of(SFTConfig(max_seq_len=16), origin)
    assert plan.model.sequence_len == 64 and plan.model == origin.model
    assert (plan.seq_len, plan.total_batch_size, plan.rows_per_step, plan.grad_accum) == (16, 512, 32, 8)


@pytest.mark.parametrize(
    ("flags", "ranks", "expected"),
    [
        ({}, 1, (64, 4, 512)),
        ({}, 2, (64, 4, 512)),
        ({"device_batch_size": 3}, 1, (64, 3, 576)),  # 512 is 2.67 times 192: rounded to three times
        ({"device_batch_size": 32}, 1, (64, 32, 2048)),
        ({"max_seq_len": 24, "total_batch_size": 960}, 1, (24, 4, 960)),
    ],
)
def test_shape_of_a_step(base, flags, ranks, expected):
    shape = shape_of(SFTConfig(**flags), BaseRun.found(base()), ranks)
    assert shape[:3] == expected and shape.rows_per_step * shape.seq_len == shape.total_batch_size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"max_seq_len": 65},
            r"--max-seq-len is 65; expected 8 to 64, the rows that b\d@4 was trained on; try --max-seq-len 64",
        ),
        ({"max_seq_len": 0}, "--max-seq-len is 0; .*try --max-seq-len 8"),
        ({"total_batch_size": 500}, "500 is not a multiple of 256 .*try --total-batch-size 512"),
        ({"device_batch_size": 0}, "--device-batch-size is 0; expected at least 1"),
    ],
)
def test_shapes_that_do_not_fit(base, flags, message):
    with pytest.raises(UserError, match=message):
        shape_of(SFTConfig(**flags), BaseRun.found(base()), 1)


def test_a_model_without_chat_tokens_is_refused():
    tokenizer = Tokenizer.train([], 265)
    base_run.check_chat_tokens(GPTConfig(vocab_size=265), tokenizer)
    with pytest.raises(
        UserError,
        match=r"vocabulary of 257 tokens, without <\|user_start\|>, .*<\|output_end\|>; expected one with chat tokens",
    ):
        base_run.check_chat_tokens(GPTConfig(vocab_size=257), tokenizer)


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_rates_are_constant_then_fall_to_zero_in_every_stage(base):
    origin = BaseRun.found(base())
    cfg = SFTConfig(warmdown_ratio=0.5)
    plan = make_sft_plan(
        cfg, origin, shape_of(cfg, origin, 1), [(StageFlags("a", "x"), 4), (StageFlags("b", "y", init_lr_frac=0.5), 8)]
    )
    assert (
        plan.num_iterations == 12
        and plan.stages == (StagePlan("a", 0, 4, 0.8), StagePlan("b", 4, 8, 0.5))
        and plan.ends() == {4: "a", 12: "b"}
    )
    shape = [plan.lr_multiplier(step, step / 12) for step in range(13)]
    expected = [0.8, 0.8, 0.8, 0.4] + [0.5] * 5 + [0.375, 0.25, 0.125] + [0.0]
    assert shape == pytest.approx(expected)
    assert plan.lr_multiplier(13, 1.1) == 0.0, "never negative, however far past the end"
    assert [plan.muon_momentum(step, 0) for step in (0, 150, 300, 1000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])


def test_warmup_is_a_share_of_the_stage(base):
    origin = BaseRun.found(base())
    cfg = SFTConfig(warmup_ratio=0.25, init_lr_frac=1.0)
    assert [plan_of(cfg, origin, 16).lr_multiplier(step, step / 16) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


# --- stages file ------------------------------------------------------------------------------------------------------


def stages_from(tmp_path, text: str, **flags) -> list[StageFlags]:
    (tmp_path / "s.toml").write_text(text)
    return read_stages(SFTConfig(stages=str(tmp_path / "s.toml"), **flags))


def test_a_stage_takes_from_the_flags_what_the_file_leaves_open(tmp_path):
    text = (
        '[[stage]]\nname = "sums"\ntasks = "arithmetic:2"\nepochs = 3\ninit_lr_frac = 1\n[[stage]]\ntasks ='
        ' "identity"\nnum_iterations = 7\n'
    )
    assert stages_from(tmp_path, text, replay=0.25, init_lr_frac=0.6) == [
        StageFlags("sums", "arithmetic:2", epochs=3, init_lr_frac=1, replay=0.25),
        StageFlags("2", "identity", num_iterations=7, init_lr_frac=0.6, replay=0.25),
    ]
    assert read_stages(SFTConfig(tasks="gsm8k")) == [StageFlags("sft", "gsm8k")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[stage]\n", "s.toml.*TOML"),
        ("", r"has no \[\[stage\]\]"),
        ('tasks = "x"\n', "has the field tasks"),
        ('[[stage]]\nname = "a"\n', "stage 1: no tasks; .*add them"),
        (
            '[[stage]]\ntasks = "x"\n[[stage]]\ntasks = "y"\nepoch = 2\n',
            "stage 2: no field 'epoch'.*did you mean epochs",
        ),
        ('[[stage]]\ntasks = "x"\nepochs = "2"\n', "stage 1: epochs is '2'; expected int"),
        ('[[stage]]\ntasks = "x"\nepochs = true\n', "stage 1: epochs is True; expected int"),
        ('[[stage]]\ntasks = "x"\nname = "a"\n[[stage]]\ntasks = "x"\nname = "a"\n', "stage 2: the name 'a' is taken"),
        ('[[stage]]\ntasks = "x"\nepochs = 0\n', "stage 1: --epochs is 0; expected at least 1"),
        ('[[stage]]\ntasks = "x"\ninit_lr_frac = 0.0\n', "stage 1: --init-lr-frac is 0; expected above 0"),
    ],
)
def test_mistakes_in_the_stages_file(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        stages_from(tmp_path, text)


def test_a_stages_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="none.toml cannot be read as TOML .*No such file"):
        read_stages(SFTConfig(stages=str(tmp_path / "none.toml")))


# --- warm start -------------------------------------------------------------------------------------------------------


def warm_optimizer(runtime, name: str):
    """This rank's state after a warm start, and the rates it has."""
    found = find_model(name)
    origin = BaseRun.found(found)
    cfg = SFTConfig(init_lr_frac=0.5)
    plan = make_sft_plan(cfg, origin, shape_of(cfg, origin, runtime.world_size), [(StageFlags("sft", "x"), 5)])
    optimizer = MuonAdamW(param_groups(GPT(origin.model), origin.rates(cfg), plan), runtime)
    fresh = {g["name"]: g["lr"] for g in optimizer.groups}
    optimizer.load_state_dict(base_run.optimizer_state(found))
    assert {g["name"]: g["lr"] for g in optimizer.groups} == fresh, "rates are of fine-tuning, not of the state"
    return {key: piece.clone() for key, piece in optimizer.state_dict().items()}, optimizer.steps


def whole(states) -> dict[str, torch.Tensor]:
    """Slot -> its elements, from the pieces of all ranks."""
    pieces = {}
    for key, tensor in (item for state in states for item in state.items() if item[0] != "step"):
        slot, _, place = key.partition("@")
        pieces.setdefault(slot, []).append((int(place.split(":")[0]), tensor))
    return {slot: torch.cat([t for _, t in sorted(parts, key=lambda p: p[0])]) for slot, parts in pieces.items()}


def test_warm_start_on_two_ranks_of_what_one_rank_saved(base, run_ranks):
    found = base()
    saved = {k: v for k, v in checkpoint.load_optimizer(found.checkpoint).items()}
    two = run_ranks(warm_optimizer, 2, found.name)
    assert [steps for _, steps in two] == [4, 4]
    assert not set(two[0][0]) & set(two[1][0]) and all(len(state) > 5 for state, _ in two)
    expected, found_state = whole([saved]), whole([state for state, _ in two])
    assert found_state.keys() == expected.keys()
    for slot in expected:
        assert torch.equal(found_state[slot], expected[slot]), slot
    assert any(t.abs().max() > 0 for t in expected.values())


def test_weights_alone_give_no_warm_start(base):
    found = base()
    weights = checkpoint.load_weights(found.checkpoint)
    path = checkpoint.save(
        found.run_dir / "bare",
        1,
        weights=weights,
        optimizer=None,
        meta=checkpoint.load_meta(found.checkpoint),
        runtime=ALONE,
    )
    with pytest.raises(UserError, match="holds weights only.*--no-load-optimizer"):
        base_run.optimizer_state(replace(found, checkpoint=path))


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_all_supervised_tokens_of_the_step():
    """Micro-batches with 2 and with 31 supervised tokens. Oracle: one batch of all, torch's own cross entropy."""
    tokenizer = Tokenizer.train([], 265)
    chats = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * n}] for n in (1, 30)]
    reader = Reader(Listed(chats), tokenizer, 41)
    batches = ConversationBatches(reader, survey(reader, ALONE), device_batch_size=1, rows_per_step=2)
    model = GPT(
        GPTConfig(sequence_len=40, vocab_size=265, n_layer=1, n_head=1, n_embd=32, window_pattern="L", softcap=0.0)
    )
    model.init_weights(1)
    loss, _ = gradients.accumulate(
        model,
        list(model.parameters()),
        gradients.gather(batches, 2),
        gradients.nats,
        step=0,
        runtime=ALONE,
        scaler=None,
        stop=lambda: False,
    )
    mine = model.lm_head.weight.grad.clone()
    model.zero_grad()
    total, count = 0.0, 0
    for chat in chats:
        ids, mask = render(tokenizer, chat)
        logits = model(torch.tensor([ids[:-1]]))[0]
        wanted = torch.tensor(mask[1:]) == 1
        total = total + torch.nn.functional.cross_entropy(
            logits[wanted], torch.tensor(ids[1:])[wanted], reduction="sum"
        )
        count += int(wanted.sum())
    (total / count).backward()
    assert count == 2 + 31 and loss == pytest.approx(float(total.detach() / count), rel=1e-5)
    torch.testing.assert_close(mine, model.lm_head.weight.grad, rtol=1e-4, atol=1e-7)


class Listed:
    def __init__(self, chats):
        self.chats = chats

    def __len__(self):
        return len(self.chats)

    def example(self, i):
        return SimpleNamespace(messages=self.chats[i])


# --- forgetting -------------------------------------------------------------------------------------------------------


def test_what_was_unlearned_by_hand():
    rows = [
        {"step": 0, "val/loss": 4.0, "val/bpb": 2.0, "train/loss": 4.0},
        {"step": 3, "val/loss": 2.0, "val/bpb": 2.2, "chatcore": 0.1},
        {"step": 5, "val/loss": 1.0, "val/bpb": 2.1, "chatcore": 0.5},
        {"step": 8, "val/loss": 1.5, "val/bpb": 2.3, "chatcore": 0.4},
        {"step": 9, "train/loss": 0.1},
    ]
    found = forgetting.forgetting(rows, [3, 8])
    assert [(f.metric, f.after, f.best, f.final) for f in found] == [
        ("val/loss", [4.0, 2.0, 1.5], 1.0, 1.5),
        ("val/bpb", [2.0, 2.2, 2.3], 2.0, 2.3),
        ("chatcore", [None, 0.1, 0.4], 0.5, 0.4),
    ]
    assert [f.lost for f in found] == pytest.approx([0.5, 0.3, 0.1])
    table = forgetting.forgetting_table(found, ["a", "b"])
    assert table[0] == "| metric | start | after a | after b | best | lost |"
    assert table[4] == "| chatcore | - | 0.1000 | 0.4000 | 0.5000 | 0.1000 |"
