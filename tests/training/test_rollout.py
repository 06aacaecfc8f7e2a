"""Rollouts: what is drawn, scored, recorded and trained; the same on any number of ranks and after any stop.

Run as a script this file forks trainings, kills them, and tells what became of them.
"""

import hashlib
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import warm
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nanolab.cli import UserError, to_json
from nanolab.data.chat import render, text_of
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.card import Stage
from nanolab.inference.cache import KVCache
from nanolab.inference.engine import Engine
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.records import checkpoint
from nanolab.records.models import read_metrics, runs_dir
from nanolab.records.run import Run
from nanolab.runtime import Runtime
from nanolab.stages.base_run import BaseRun
from nanolab.stages.config import BaseTrainConfig, RLConfig
from nanolab.stages.reward import RewardPart, reward_parts
from nanolab.stages.rl import task_fingerprint
from nanolab.stages.rl_plan import make_rl_plan, objective_of
from nanolab.stages.rollout import MicroBatch, Rollouts
from nanolab.stages.rollout_log import FILE
from nanolab.training import meter
from nanolab.training.fit import Every, fit
from nanolab.training.optim import MuonAdamW
from nanolab.training.policy import PolicyLoss, logprobs, policy_loss
from nanolab.training.recipes import param_groups

ALONE = Runtime(torch.device("cpu"), torch.float32)
CONFIG = GPTConfig(sequence_len=48, vocab_size=265, n_layer=2, n_head=1, n_embd=32, window_pattern="L")
ANSWERS = "abcdefgh"
RATES = BaseTrainConfig(embedding_lr=0.1, unembedding_lr=0.004, matrix_lr=0.01, scalar_lr=0.1)
META = {
    "model_config": to_json(CONFIG),
    "config": to_json(RATES),
    "plan": {"recipe": "dial", "batch_scale": 1.0},
    "loop": {"total_training_time": 0.0},
}
ORIGIN = BaseRun.of(META, "toy@0")
CFG = RLConfig(
    seed=3,
    init_lr_frac=1.0,
    reward="correct=1,length=-0.125:0.25",
    examples_per_step=4,
    num_samples=4,
    max_new_tokens=4,
    top_k=0,
    device_batch_size=4,
    num_iterations=5,
    num_epochs=1,
    warmdown_ratio=0.0,
    updates_per_batch=1,
)


class Example(NamedTuple):
    messages: list[dict[str, Any]]
    answer: str


class Letters:
    """Say the letter c and end, whatever the question is; saying more costs."""

    name = "letters"

    def __init__(self, answers: str = "c"):
        self.answers = answers

    def __len__(self) -> int:
        return 10

    def example(self, i: int) -> Example:
        answer = self.answers[i % len(self.answers)]
        return Example(
            [{"role": "user", "content": f"{'?' * (i % 3)}{i}"}, {"role": "assistant", "content": answer}], answer
        )

    def rewards(self, example: Example, content: Any) -> dict[str, float]:
        text = text_of(content)
        return {"correct": float(text == example.answer), "length": float(len(text))}


class Deaf(Letters):
    def rewards(self, example: Example, content: Any) -> dict[str, float]:
        return {"correct": 0.1}


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["ab"] * 2, 265)


GIVEN: dict[str, torch.Tensor] = {}  # in a rank: the parent's `taught`


@cache
def taught() -> dict[str, torch.Tensor]:
    """Weights of a model that answers with one of eight letters, and ends: what fine-tuning would have left."""
    torch.manual_seed(0)
    model, g = GPT(CONFIG), torch.Generator().manual_seed(5)
    model.init_weights(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        rows = []
        for _ in range(16):
            i, letter = (int(torch.randint(n, (), generator=g)) for n in (10, 8))
            rows.append(
                render(
                    tokenizer(), [Letters().example(i).messages[0], {"role": "assistant", "content": ANSWERS[letter]}]
                )
            )
        T = max(len(r.ids) for r in rows)
        ids = torch.tensor([r.ids + [0] * (T - len(r.ids)) for r in rows])
        mask = torch.tensor([r.mask + [0] * (T - len(r.mask)) for r in rows]).bool()
        loss = model(ids[:, :-1], torch.where(mask[:, 1:], ids[:, 1:], -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * 2.4, "log 8 nats for the letter, none for the end"
    return model.state_dict()


def taught_model() -> GPT:
    model = GPT(CONFIG)
    model.load_state_dict(GIVEN or taught())
    return model


def rollouts(
    cfg: RLConfig = CFG,
    folder: Path = Path(),
    task: Any = None,
    runtime: Runtime = ALONE,
    model: GPT | None = None,
    **more: Any,
) -> Rollouts:
    model = model or taught_model()
    return Rollouts(
        cfg, objective_of(cfg), model, Engine(model, tokenizer(), runtime), task or Letters(), runtime, folder, **more
    )


def train(
    name: str,
    cfg: RLConfig = CFG,
    runtime: Runtime = ALONE,
    resume: bool = False,
    each: Callable[[], object] = int,
    task: Any = None,
    save: int = 1,
) -> dict:
    """A whole run with the real loop and optimizer."""
    run = Run.start(name, cfg, runtime, resume=resume, kind="rl")
    model, objective = taught_model(), objective_of(cfg)
    plan = make_rl_plan(cfg, ORIGIN, 10, runtime.world_size)
    groups = param_groups(model, ORIGIN.rates(cfg), plan)
    batches = rollouts(cfg, run.dir, task, runtime, model, reference=taught_model() if objective.kl else None)
    loss = PolicyLoss(objective, cfg.max_new_tokens, runtime)

    def watched(model, batch):
        each()
        return loss(model, batch)

    every, optimizer = Every(save=save, keep="all", grad_norm=True), MuonAdamW(groups, runtime)
    counts = {"measure": lambda: {**batches.measure(), **loss.measure()}, "work": lambda: batches.work}
    try:
        return fit(run, model, optimizer, batches, plan, watched, every, **counts)
    finally:
        batches.close()


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in (runs_dir() / name / FILE).read_text().splitlines()]


SAME = ("step", "train/loss", "train/tokens", "total_training_flops", "total_generating_flops")


def story(name: str) -> tuple:
    """Everything that has to be the same to the bit."""
    rows = [
        {k: v for k, v in r.items() if k.startswith("rl/") and "seconds" not in k or k in SAME}
        for r in read_metrics(runs_dir() / name)
    ]
    last = checkpoint.newest_valid(runs_dir() / name / "checkpoints")
    return (
        rows,
        records(name),
        [hashlib.sha256((last / f).read_bytes()).hexdigest() for f in ("model.safetensors", "optim_rank0.safetensors")],
    )


# learning


@pytest.mark.slow
@pytest.mark.parametrize("algorithm,updates", [("reinforce", 1), ("grpo", 2), ("dr_grpo", 1)])
def test_a_bandit_is_learnt(algorithm, updates, capsys):
    batch = dict(examples_per_step=8, num_samples=8, device_batch_size=32)
    cfg = replace(
        CFG, algorithm=algorithm, kl=0.0, reward="correct=1", num_iterations=30, updates_per_batch=updates, **batch
    )
    train("bandit", cfg, save=100)
    rewards = [row["rl/reward"] for row in read_metrics(runs_dir() / "bandit") if "rl/reward" in row]
    assert statistics.fmean(rewards[:2]) < 0.4 and statistics.fmean(rewards[-3:]) > 0.9
    assert capsys.readouterr().out.count("mixed groups") == 30 // updates


# what is drawn and trained


def test_a_reply_is_what_its_prompt_gives_alone(tmp_path):
    """Neither neighbours nor chunks matter; each sample of a prompt has its own seed; another step draws others."""
    whole, parts = rollouts(folder=tmp_path / "a"), rollouts(replace(CFG, rollout_batch_size=3), tmp_path / "b")
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    for r in (whole, parts):
        r.next()
    first, again = ([reply for batch in r.micro for reply in batch.replies] for r in (whole, parts))
    assert first == again and len(first) == 16
    assert len({tuple(r.ids) for r in first}) > 4
    for _ in range(4):
        whole.next()
    assert {r.example for b in whole.micro for r in b.replies} != {r.example for r in first}


def test_the_same_question_gets_other_replies_every_time(tmp_path):
    class One(Letters):
        def __len__(self):
            return 1

    r = rollouts(folder=tmp_path, task=One())
    drawn = []
    for _ in range(3):
        batches = [r.next() for _ in range(4)]
        by_place = {reply.place: reply.ids for b in batches for reply in b.replies}
        drawn += [[by_place[p * 4 + g] for g in range(4)] for p in range(4)]
    assert len({str(four) for four in drawn}) == 12


def test_an_epoch_asks_every_example_once_and_the_next_in_another_order(tmp_path):
    r = rollouts(folder=tmp_path)
    order = [r._nth(n)[0] for n in range(30)]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20] and order[:10] != list(range(10))
    assert [rollouts(replace(CFG, seed=4), tmp_path)._nth(n)[0] for n in range(10)] != order[:10]


def test_rows_are_prompt_and_reply_and_only_the_reply_is_trained(tmp_path):
    """Read back from the tensors: inputs and targets are neighbours, the first target is the reply's first token, the
    last its end of turn.
    """
    r = rollouts(folder=tmp_path)
    end = tokenizer().special("<|assistant_end|>")
    micro = [r.next() for _ in range(4)]
    assert r.handed == 4 and [len(b.replies) for b in micro] == [4] * 4
    ended = 0
    for batch in micro:
        for reply, inputs, targets in zip(batch.replies, batch.inputs.tolist(), batch.targets.tolist()):
            at = [t for t, y in enumerate(targets) if y >= 0]
            assert [targets[t] for t in at] == reply.ids and at == list(range(at[0], at[0] + len(reply.ids)))
            assert inputs[: at[0] + 1] == reply.prompt and inputs[at[0] + 1 : at[-1] + 1] == reply.ids[:-1]
            ended += reply.ids[-1] == end
        assert batch.n_targets == sum(len(x.ids) for x in batch.replies)
    assert ended >= 12, "the end of turn is among the targets"


def test_the_log_probabilities_trained_are_those_of_the_engine(tmp_path):
    """Of the whole vocabulary at temperature 1, though the reply was drawn from a sharper distribution."""
    cfg = replace(CFG, temperature=0.7, top_k=20)
    r = rollouts(cfg, tmp_path)
    seen: dict[tuple, list[float]] = {}
    generate = r.engine.generate

    def watched(prompts, *settings):
        said = [([], []) for _ in prompts]
        for step in generate(prompts, *settings):
            for new in step:
                said[new.row][0].append(new.token)
                said[new.row][1].append(new.logprob)
            yield step
        seen.update({(tuple(p), tuple(ids)): lps for p, (ids, lps) in zip(prompts, said)})

    r.engine.generate = watched
    for _ in range(4):
        batch = r.next()
        lp = logprobs(r.model, batch.inputs, batch.targets)
        for row, reply in enumerate(batch.replies):
            expected = torch.tensor(seen[tuple(reply.prompt), tuple(reply.ids)])
            torch.testing.assert_close(lp[row, batch.targets[row] >= 0], expected, atol=2e-5, rtol=0)


def test_dropout_is_off_where_ratios_are_taken(tmp_path):
    model = GPT(replace(CONFIG, resid_dropout=0.5))
    model.load_state_dict(taught())
    model.train()
    batch = rollouts(folder=tmp_path, model=model).next()
    assert torch.equal(*(logprobs(model.train(), batch.inputs, batch.targets) for _ in range(2)))


def test_the_first_update_is_on_policy_to_the_bit_and_the_second_is_clipped(tmp_path):
    """k = 2: the same micro-batches again, against the log probabilities of the first pass. Where the clip bites there
    is no gradient.
    """
    cfg = replace(CFG, updates_per_batch=2, clip_low=0.05, clip_high=0.05)
    r, loss = rollouts(cfg, tmp_path), PolicyLoss(objective_of(cfg), 4, ALONE)
    first = [r.next() for _ in range(4)]
    assert all(b.old is None for b in first)
    for b in first:
        loss(r.model, b)
    before = [b.old.clone() for b in first]
    assert loss.measure() == {"rl/clipped": 0.0}
    with torch.no_grad():
        for p in r.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    second = [r.next() for _ in range(4)]
    assert [id(b) for b in first] == [id(b) for b in second] and r.made == 1
    bitten = 0
    for b, old in zip(second, before):
        assert torch.equal(b.old, old)
        with torch.no_grad():
            lp = logprobs(r.model, b.inputs, b.targets)
        ratio, A = (lp - old).exp(), b.advantages[:, None]
        stopped = ((A > 0) & (ratio > 1.05) | (A < 0) & (ratio < 0.95)) & (b.targets >= 0)
        bitten += int(stopped.sum())
        slopes = (lp.requires_grad_(),)
        (gradient,) = torch.autograd.grad(
            policy_loss(objective_of(cfg), slopes[0], b.old, None, b.targets >= 0, b.advantages, 4), slopes
        )
        assert (gradient[stopped] == 0).all() and (gradient[(b.targets >= 0) & ~stopped & (A != 0)] != 0).all()
        loss(r.model, b)
    assert bitten and loss.measure()["rl/clipped"] == pytest.approx(bitten / sum(b.n_targets for b in second))
    r.next()
    assert r.made == 2, "two passes, then others"


class Calculating:
    """An engine whose tool answers in the middle of every reply: ids 65 66 (a call), 7 8 (forced), 67, the end."""

    def __init__(self, engine: Engine):
        self.tokenizer, self.limit, self.asked = engine.tokenizer, engine.limit, []

    def generate(self, prompts, request, seeds):
        from types import SimpleNamespace

        self.asked.append(request.tools)
        end = self.tokenizer.special("<|assistant_end|>")
        for token, forced in [(65, False), (66, False), (7, True), (8, True), (67, False), (end, False)]:
            yield [SimpleNamespace(row=i, token=token, forced=forced) for i in range(len(prompts))]


def test_what_a_tool_says_is_read_and_not_trained(tmp_path):
    r = rollouts(folder=tmp_path, tools=len)
    r.engine = Calculating(r.engine)
    batch = r.next()
    assert r.engine.asked == [len]
    for reply, inputs, targets in zip(batch.replies, batch.inputs.tolist(), batch.targets.tolist()):
        at = len(reply.prompt) - 1
        assert targets[at : at + 6] == [65, 66, -1, -1, 67, tokenizer().special("<|assistant_end|>")] and inputs[
            at + 1 : at + 6
        ] == [65, 66, 7, 8, 67]
    batch.advantages[:] = 1.0
    lp = logprobs(r.model, batch.inputs, batch.targets).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(
        policy_loss(r.objective, lp, lp.detach(), None, batch.targets >= 0, batch.advantages, 4), lp
    )
    assert ((gradient != 0) == (batch.targets >= 0)).all()


# records


def test_rollouts_are_written_with_their_reasons(tmp_path):
    r = rollouts(folder=tmp_path)
    r.next()
    r.close()
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2, 3] * 4 and {row["step"] for row in rows} == {0}
    by_reply = {(x.example, x.place % 4): x for b in r.micro for x in b.replies}
    for i, row in enumerate(rows):
        reply = by_reply[row["example"], row["sample"]]
        text = row["reply"].removesuffix("<|assistant_end|>")
        assert (
            row["prompt"]
            == "<|bos|><|user_start|>"
            + Letters().example(row["example"]).messages[0]["content"]
            + "<|user_end|><|assistant_start|>"
        )
        assert (
            row["reply"] == tokenizer().decode(reply.ids)
            and row["ended"] == row["reply"].endswith("<|assistant_end|>")
            and row["tokens"] == len(reply.ids)
        )
        assert row["parts"] == {"correct": float(text == "c"), "length": float(len(text))}
        assert row["reward"] == (text == "c") - min(0.25, 0.125 * len(text))
        group = [x["reward"] for x in rows[i // 4 * 4 : i // 4 * 4 + 4]]
        assert (
            row["advantage"] == pytest.approx(row["reward"] - statistics.fmean(group))
            and reply.advantage == row["advantage"]
        )
    m = r.measure()
    assert r.measure() == {}, "said once"
    assert m["rl/reward"] == pytest.approx(statistics.fmean(row["reward"] for row in rows))
    assert m["rl/part/correct"] == statistics.fmean(row["parts"]["correct"] for row in rows)
    assert m["rl/mixed"] == sum(len({x["reward"] for x in rows[i : i + 4]}) > 1 for i in range(0, 16, 4)) / 4
    assert m["rl/ended"] == statistics.fmean(row["ended"] for row in rows) and m["rl/tokens"] == statistics.fmean(
        row["tokens"] for row in rows
    )


def flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        work()
    return counter.get_total_flops()


@cache
def eager() -> GPT:
    """The kernel whose every product torch counts."""
    model = GPT(CONFIG, kernel="eager").eval()
    model.load_state_dict(taught())
    return model


@cache
def of_training(n: int) -> int:
    """Of a text of n tokens by itself, as torch counts them."""
    ids = torch.zeros(1, n, dtype=torch.int64)
    return flops(lambda: eager()(ids[:, :-1], ids[:, 1:], reduction="sum").backward())


@cache
def of_forward(n: int) -> int:
    ids = torch.zeros(1, n - 1, dtype=torch.int64)
    return flops(lambda: eager().logits(eager().hidden(ids)))


@cache
@torch.no_grad()
def of_prompt(n: int) -> int:
    return flops(lambda: eager()(torch.zeros(1, n, dtype=torch.int64), cache=KVCache(CONFIG), last_only=True))


@cache
@torch.no_grad()
def of_token(context: int) -> int:
    """Of the one that is read after so many others."""
    ids, cache = torch.zeros(1, context, dtype=torch.int64), KVCache(CONFIG)
    eager()(ids, cache=cache)
    return flops(lambda: eager()(ids[:, :1], cache=cache, last_only=True))


@pytest.mark.slow
@pytest.mark.fault("core likely: RL's numbers")
@pytest.mark.parametrize("updates,algorithm", [(1, "reinforce"), (2, "grpo")])
def test_tokens_and_flops_are_those_of_the_texts(updates, algorithm, monkeypatch, capsys):
    """Of the replies that were handed to the loop, counted by themselves: in the metrics, the console, the result, the
    checkpoint and the card.
    """
    monkeypatch.setattr(meter, "device_peaks", lambda name: (1e9, None))
    seen: list[MicroBatch] = []
    monkeypatch.setattr(Rollouts, "next", lambda self, made=Rollouts.next: seen.append(made(self)) or seen[-1])
    cfg = replace(
        CFG, num_iterations=4, updates_per_batch=updates, algorithm=algorithm, kl=0.1 if algorithm == "grpo" else 0.0
    )
    result, said = train("counted", cfg), capsys.readouterr().out
    steps = [[r for batch in seen[i : i + 4] for r in batch.replies] for i in range(0, 16, 4)]
    tokens = [sum(len(r.prompt) + len(r.ids) for r in step) for step in steps]
    assert len(set(tokens)) > 1 and sum(tokens) < 4 * 16 * 40
    training, drawing = [], []
    for i, step in enumerate(steps):
        first, n = i % updates == 0, [(len(r.prompt), len(r.ids)) for r in step]
        training.append(sum(of_training(p + r) + (of_forward(p + r) if first and cfg.kl else 0) for p, r in n))
        # once for all of its replies
        reading = sum(of_prompt(len(prompt)) for prompt in {tuple(r.prompt) for r in step})
        drawing.append(reading + sum(of_token(p + i) for p, r in n for i in range(r - 1)) if first else 0)
    rows = read_metrics(runs_dir() / "counted")
    assert [row["train/tokens"] for row in rows] == tokens
    for key, values in (("total_training_flops", training), ("total_generating_flops", drawing)):
        assert [row[key] for row in rows] == [sum(values[:i]) for i in range(4)]
        assert result[key] == sum(values)
    for row, n, spent in zip(rows, tokens, map(sum, zip(training, drawing))):
        assert row["train/tok_per_sec"] == pytest.approx(n / row["train/dt"]) and row["train/mfu"] == pytest.approx(
            100 * spent / row["train/dt"] / 1e9
        )
        assert f"{n / row['train/dt']:,.0f} tok/s" in said
    assert result["tokens"] == sum(tokens) and result["tok_per_sec"] == pytest.approx(
        sum(tokens) / result["total_training_time"]
    )
    meta = checkpoint.load_meta(runs_dir() / "counted" / "checkpoints" / "step_000002")
    stage = Stage("rl", "counted", 2, runs_dir() / "counted", meta, None, None)
    assert (stage.tokens, stage.flops) == (sum(tokens[:2]), sum(training[:2] + drawing[:2]))
    assert meta["batches"]["work"]["drawn"] == sum(len(r.ids) for step in steps[:2:updates] for r in step)


def test_a_checkpoint_of_a_version_that_did_not_count_says_so(capsys):
    train("whole", replace(CFG, num_iterations=1))
    batches = rollouts()
    state = checkpoint.load_meta(runs_dir() / "whole" / "checkpoints" / "step_000001")["batches"]
    batches.load_state_dict(state)
    assert batches.work.tokens > 0 and "not count" not in capsys.readouterr().out
    batches.load_state_dict({name: value for name, value in state.items() if name != "work"})
    assert batches.work.tokens == 0 and "not count" in capsys.readouterr().out


def test_rewards_that_are_always_the_same_are_warned_of_and_move_nothing(capsys):
    train("deaf", replace(CFG, reward="correct=1", num_iterations=3), task=Deaf())
    assert capsys.readouterr().out.count("warning: all 4 replies to each of the 4 prompts have the same reward") == 1, (
        "once, not at every step"
    )
    assert [row["train/grad_norm"] for row in read_metrics(runs_dir() / "deaf")] == [0.0] * 3


# the same whatever happens


KL = replace(CFG, algorithm="grpo", kl=0.1, updates_per_batch=3, num_iterations=8)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_resumed_at_any_step_is_uninterrupted_to_the_bit(at, capsys):
    """Steps 1, 2 and 5 lie between two updates on one rollout."""
    train("whole", KL)
    train("cut", KL)
    folder = runs_dir() / "cut"
    (folder / "result.json").unlink()
    for step, path in checkpoint.steps(folder / "checkpoints"):
        if step > at:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    with open(folder / FILE, "a") as file:
        file.write('{"step": 6, "torn')
    state = checkpoint.load_meta(folder / "checkpoints" / f"step_{at:06d}")["batches"]
    assert bool(state["replies"]) == (at % 3 > 0) and state["made"] == -(-at // 3)
    train("cut", KL, resume=True)
    assert f"resumed at step {at}" in capsys.readouterr().out
    assert story("cut") == story("whole")
    assert any(row["rl/kl"] > 0 for row in read_metrics(folder)) and any(
        row["rl/clipped"] > 0 for row in read_metrics(folder)
    )


def some_ranks(runtime: Runtime, base: str, weights: dict[str, torch.Tensor]) -> tuple:
    """Train on these ranks; and take up the rollout that one rank was in the middle of: (its state as told by them,
    this rank's prompts).
    """
    os.environ["NANOLAB_BASE_DIR"] = base
    GIVEN.update(weights)
    train("ranks", KL, runtime)
    batches = rollouts(KL, Path(base), runtime=runtime)
    state = checkpoint.load_meta(Path(base) / "runs" / "alone" / "checkpoints" / "step_000002")["batches"]
    batches.load_state_dict(state)
    return batches.state_dict() == state, [r.place // 4 for b in batches.micro for r in b.replies]


@pytest.mark.slow
def test_two_ranks_make_the_rollouts_and_the_weights_of_one(run_ranks, base_dir):
    train("alone", KL)
    (same_0, mine_0), (same_1, mine_1) = run_ranks(some_ranks, 2, str(base_dir), taught())
    assert same_0 and same_1 and set(mine_0) == {0, 2} and set(mine_1) == {1, 3}
    for one, two in zip(records("alone"), records("ranks"), strict=True):
        assert one == two
    counts = [
        [[row[key] for key in SAME[2:]] for row in read_metrics(runs_dir() / name)] for name in ("alone", "ranks")
    ]
    assert counts[0] == counts[1], "over all ranks"
    last = [checkpoint.load_weights(runs_dir() / name / "checkpoints" / "step_000008") for name in ("alone", "ranks")]
    last[0].pop(
        "backout.scale"
        # of two layers it scales the last stream, which the norm undoes: its gradient is rounding, which Adam makes
        # whole steps of
    )
    for name, value in last[0].items():
        torch.testing.assert_close(value, last[1][name], atol=2e-3, rtol=0, msg=lambda m: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.fault("F7")
def test_three_ranks_share_four_prompts(run_ranks, base_dir):
    """One answers two of them, in two micro-batches, the others one."""
    train("alone", KL)
    found = run_ranks(some_ranks, 3, str(base_dir), taught())
    assert all(same for same, _ in found) and [set(mine) for _, mine in found] == [{0, 3}, {1}, {2}]
    assert list(records("alone")) == list(records("ranks"))
    one, many = ([row["train/loss"] for row in read_metrics(runs_dir() / name)] for name in ("alone", "ranks"))
    assert len(one) == 8 and one == pytest.approx(many, rel=1e-4, abs=1e-5)


def kill_and_resume(kills: int, steps: int) -> None:
    """Fork the training and kill it at random moments, then let it end. Compare with a run left alone."""
    rng, at, cfg = random.Random(4), [], replace(KL, num_iterations=steps)
    train("whole", cfg, save=2)
    while len(at) < kills:
        ticks, tick = os.pipe()
        pid = os.fork()
        if pid == 0:
            train("killed", cfg, resume=True, each=lambda: os.write(tick, b"."), save=2)
            os._exit(0)
        os.close(tick)
        for _ in range(rng.randrange(8, 40)):  # micro-batches, four to a step; or the end
            os.read(ticks, 1)
        time.sleep(rng.uniform(0.0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ticks)
        at.append(len(read_metrics(runs_dir() / "killed")))
    train("killed", cfg, resume=True, save=2)
    print(json.dumps({"at": at, "same": story("killed") == story("whole")}))


@pytest.mark.slow
@pytest.mark.parametrize("kills,steps", [(2, 12), pytest.param(20, 80, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_resumed_is_uninterrupted_to_the_bit(kills, steps):
    done = warm.python(__file__, kills, steps, timeout=500)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["same"] and any(0 < at < steps for at in report["at"]), report


# what people type


def test_reward_parts():
    assert reward_parts("correct=1, length=-0.1:0.5", ["correct", "length"]) == [
        RewardPart("correct", 1.0),
        RewardPart("length", -0.1, 0.5),
    ]
    values = {"correct": 1.0, "length": 9.0}
    assert [p.of(values) for p in reward_parts("correct=2:1.5,length=-0.1:0.5", ["correct", "length"])] == [1.5, -0.5]


@pytest.mark.parametrize(
    "text,said",
    [
        ("corect=1", "names 'corect'; this task gives correct, length; did you mean correct?"),
        ("correct", "'correct'; expected NAME=WEIGHT or NAME=WEIGHT:CAP; try --reward correct=1"),
        ("", "--reward has ''"),
        ("correct=", "--reward has 'correct='"),
        ("correct=1:", "'correct=1:'"),
        ("correct=one", "'correct=one'"),
        ("correct=1,length=0", "'length=0'; expected a weight other than 0"),
        ("correct=nan", "weight other than 0"),
        ("correct=1:-1", "cap above 0"),
        ("correct=1,correct=2", "names 'correct' twice"),
    ],
)
def test_bad_rewards(text, said):
    with pytest.raises(UserError) as error:
        reward_parts(text, ["correct", "length"])
    assert said in str(error.value)


@pytest.mark.parametrize(
    "changes,world,said",
    [
        (
            dict(num_samples=1),
            1,
            "--num-samples is 1; expected at least 2: an advantage is how a reply compares with the others",
        ),
        (dict(num_samples=1, advantage="leave_one_out"), 1, "--num-samples is 1"),
        (
            dict(device_batch_size=5),
            1,
            (
                "16 replies (4 prompts x 4 samples) are not a multiple of the 5 that --device-batch-size takes at once;"
                " try --device-batch-size 4"
            ),
        ),
        (dict(device_batch_size=32), 1, "try --device-batch-size 16"),
        (dict(device_batch_size=3), 2, "8 replies (4 prompts x 4 samples / 2 ranks)"),
        (
            dict(),
            5,
            (
                "5 ranks cannot share 4 prompts of a rollout; expected at least a prompt for each; try"
                " --examples-per-step 5"
            ),
        ),
        (dict(updates_per_batch=0), 1, "--updates-per-batch is 0"),
        (dict(temperature=-1.0), 1, "temperature is -1"),
        (dict(temperature=0.0), 1, "--temperature is 0: all replies to a prompt would be the same"),
    ],
)
def test_numbers_that_do_not_fit(changes, world, said):
    with pytest.raises(UserError) as error:
        make_rl_plan(replace(CFG, **changes), ORIGIN, 10, world)
    assert said in str(error.value)


def test_the_length_of_a_run_is_known():
    by_epochs = [(dict(), 2), (dict(num_epochs=3, updates_per_batch=2), 14), (dict(examples_per_step=16), 1)]
    for changes, steps in [(dict(num_iterations=5), 5), *((c | {"num_iterations": -1}, n) for c, n in by_epochs)]:
        plan = make_rl_plan(replace(CFG, **changes), ORIGIN, 10, 1)
        assert plan.num_iterations == steps and plan.grad_accum * 4 == plan.total_batch_size // 4


def test_prompts_without_room_for_a_reply_are_passed_over(tmp_path, capsys):
    """Prompts have 5, 6 or 7 tokens; of 48 a reply may take all but 6."""
    r, all_fit = rollouts(replace(CFG, max_new_tokens=42), tmp_path), rollouts(folder=tmp_path)
    taken, order = [r._nth(n)[0] for n in range(10)], [all_fit._nth(n)[0] for n in range(11)]
    for n, (took, turn) in enumerate(zip(taken, order)):
        assert took == (turn if turn % 3 < 2 else taken[n + 1] if n < 9 else taken[0])
    assert (
        capsys.readouterr().out.count(
            "letters: prompts of more than 6 tokens, which leave no room for --max-new-tokens 42, are passed over"
        )
        == 1
    )
    with pytest.raises(
        UserError,
        match=(
            "not one of 10 prompts has at most 1 tokens, what --max-new-tokens 47 leaves of the 48 that the model reads"
        ),
    ):
        rollouts(replace(CFG, max_new_tokens=47), tmp_path)


def test_a_fingerprint_is_of_the_questions_and_answers():
    class Longer(Letters):
        def __len__(self):
            return 11

    assert task_fingerprint(Letters()) == task_fingerprint(Letters()) != task_fingerprint(Letters("d"))
    assert task_fingerprint(Longer()) != task_fingerprint(Letters())

    class Many(Letters):
        def __len__(self):
            return 1000

        def example(self, i: int) -> Example:
            return Letters(self.answers if i == 997 else "c").example(i)

    c, d = Many("c"), Many("d")
    assert task_fingerprint(c) == task_fingerprint(d), "of so many questions it takes one in three"
    assert task_fingerprint(c, 1000) != task_fingerprint(d, 1000)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tokenizer()
    kill_and_resume(*map(int, sys.argv[1:]))
