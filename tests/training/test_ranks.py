"""Any number of ranks: one judge of batches for plans and training, exact gradients from unequal shares, runs that move
between numbers of ranks.
"""

import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanolab.cli import UserError
from nanolab.data.packing import PackedBatches
from nanolab.data.tokenizer import Tokenizer
from nanolab.model.gpt import GPT
from nanolab.records import checkpoint
from nanolab.records.models import read_metrics, runs_dir
from nanolab.runtime import Runtime
from nanolab.stages import pretrain as stage
from nanolab.stages.config import BaseTrainConfig
from nanolab.training import gradients
from nanolab.training.schedule import make_plan

spec = importlib.util.spec_from_file_location("nanolab_tests_pretrained", Path(__file__).with_name("pretrained.py"))
pretrained = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrained)

ALONE = Runtime(torch.device("cpu"), torch.float32)
TOKENIZER = Tokenizer.train([], 265)
CFG = BaseTrainConfig(
    depth=2, aspect_ratio=32, head_dim=32, max_seq_len=64, num_iterations=8, device_type="cpu", data_dir="texts"
)


class Numbers:
    name, n_documents = "numbers", 500

    def get(self, n: int) -> str:
        return f"document number {n}; " * (n % 13 + 1)


def trains(cfg: BaseTrainConfig, ranks: int) -> bool:
    """Whether training takes the batch, on every rank: the plan that it makes, and its loader."""
    try:
        plan = make_plan(cfg, 265, ranks)
        for rank in range(ranks):
            options = {
                "device_batch_size": cfg.device_batch_size,
                "rows_per_step": plan.rows_per_step,
                "rank": rank,
                "world_size": ranks,
            }
            PackedBatches([(Numbers(), 1.0)], TOKENIZER, seq_len=64, **options)
        return True
    except UserError:
        return False


def planned(cfg: BaseTrainConfig, ranks: int) -> UserError | None:
    """What a dry run says against it."""
    try:
        stage.pretrain(replace(cfg, dry_run=True, plan_for=f"{ranks}xH100"))
    except UserError as error:
        return error
    return None


@pytest.mark.slow
@pytest.mark.fault("F7", "core D2")
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 6, 7, 8, 12, 32, 64])
def test_a_dry_run_accepts_what_training_does_and_its_advice_is_accepted(ranks):
    seen = set()
    for B, total in itertools.product([1, 6, 8], [64, 512, 3072, 48 * 64 + 1, 6 * 63 * 64]):
        cfg = replace(CFG, device_batch_size=B, total_batch_size=total)
        error = planned(cfg, ranks)
        assert trains(cfg, ranks) == (error is None), (ranks, B, total)
        rows = total // 64
        assert (error is None) == (total % 64 == 0 and rows % B == 0 and rows >= ranks), (
            "a row for each rank, and what one rank would take"
        )
        seen.add(getattr(error, "code", None))
        if error is None:
            continue
        if error.code == "fewer-rows-than-ranks":
            assert error.values == {"rows": rows, "ranks": ranks}
        for flag, value in re.findall(r"--([a-z-]+-batch-size) (\d+)", str(error)):
            advised = replace(cfg, **{flag.replace("-", "_"): int(value)})
            assert trains(advised, ranks) and planned(advised, ranks) is None, (flag, value, str(error))
    assert {None, "batch-not-a-multiple"} <= seen


@pytest.mark.fault("F7")
@pytest.mark.parametrize(
    "ranks, shares",
    [
        (3, "rows per step 48: 16 16 16"),
        (5, "rows per step 48: 10 10 10 9 9"),
        (32, "rows per step 48: 2 on 16, 1 on 16 ranks"),
        (48, "rows per step 48: 1 on 48 ranks"),
    ],
)
def test_the_plan_shows_the_shares(ranks, shares, capsys):
    assert planned(replace(CFG, device_batch_size=8, total_batch_size=3072), ranks) is None
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("batch ")]
    assert "3,072 tokens" in line and shares in line
    assert ("waiting" in line) == (48 % ranks > 0), "what unequal shares cost"


class Counted(Runtime):
    """A rank without the others, that is told how many targets they have together."""

    total = 0

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.total) if tensor.dtype == torch.int64 else tensor


@pytest.mark.fault("F7")
@pytest.mark.parametrize("ranks", [3, 5, 7])
def test_gradients_of_unequal_shares_are_those_of_one_rank(ranks):
    """Backward passes add up on one model as the optimizer's sums over ranks do."""
    cfg = replace(CFG, device_batch_size=4, total_batch_size=12 * 64, warmup_steps=0)
    model = GPT(make_plan(cfg, 265, 1).model)
    model.init_weights(1)

    def summed(ranks: int) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        plan, loss = make_plan(cfg, 265, ranks), 0.0
        for rank in range(ranks):
            batches = PackedBatches(
                [(Numbers(), 1.0)],
                TOKENIZER,
                seq_len=64,
                device_batch_size=4,
                rows_per_step=12,
                rank=rank,
                world_size=ranks,
            )
            runtime = Counted(torch.device("cpu"), torch.float32)
            runtime.total = 12 * 64
            nats, _ = gradients.accumulate(
                model,
                [],
                gradients.gather(batches, plan.grad_accum),
                gradients.nats,
                step=0,
                runtime=runtime,
                scaler=None,
                stop=lambda: False,
            )
            assert batches.rows == 12, "the step is over on every rank"
            loss += nats
        return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (loss, one), (total, many) = summed(1), summed(ranks)
    assert total == pytest.approx(loss, rel=1e-6)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


# --- processes --------------------------------------------------------------------------------------------------------


def pretrain(runtime: Runtime, base: str, name: str, resume: bool = False) -> None:
    os.environ["NANOLAB_BASE_DIR"] = base
    cfg = BaseTrainConfig(
        run=name,
        resume=resume,
        data_dir=f"{base}/text",
        tokenizer=f"{base}/tokenizer",
        depth=2,
        aspect_ratio=32,
        head_dim=32,
        max_seq_len=64,
        device_batch_size=4,
        total_batch_size=512,
        num_iterations=8,
        warmup_steps=2,
        lr_scale=0.01,
        eval_every=4,
        eval_tokens=1024,
        sample_every=-1,
        save_every=2,
        keep="all",
        device_type="cpu",
    )
    stage.pretrain(cfg, runtime)


def cut(run: Path, step: int) -> None:
    """As if the run had been stopped at `step`."""
    (run / "result.json").unlink()
    for later, path in checkpoint.steps(run / "checkpoints"):
        if later > step:
            shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.fault("F7")
def test_a_run_that_moves_between_3_2_5_and_1_ranks_is_the_run_of_one(run_ranks, base_dir):
    """8 rows a step: shares of 3 3 2, 4 4, 2 2 2 1 1. The same batches to the bit, by the loader's state; losses but
    for rounding.
    """
    text = pretrained.write_text(base_dir / "text")
    Tokenizer.train((p.read_text() for p in sorted(text.glob("*.txt"))), 300).save(base_dir / "tokenizer")
    pretrain(ALONE, str(base_dir), "alone")
    alone, moved = runs_dir() / "alone", runs_dir() / "moved"
    run_ranks(pretrain, 3, str(base_dir), "moved")
    for ranks, step in ((2, 2), (5, 4), (1, 6)):
        cut(moved, step)
        (
            run_ranks(pretrain, ranks, str(base_dir), "moved", True)
            if ranks > 1
            else pretrain(ALONE, str(base_dir), "moved", True)
        )
        for (step, one), (_, other) in zip(
            checkpoint.steps(alone / "checkpoints"), checkpoint.steps(moved / "checkpoints"), strict=True
        ):
            assert checkpoint.load_meta(one)["batches"] == checkpoint.load_meta(other)["batches"], step
        for one, other in zip(read_metrics(alone), read_metrics(moved), strict=True):
            for key in {"train/loss", "val/bpb"} & (one.keys() | other.keys()):
                assert one[key] == pytest.approx(other[key], rel=1e-5), (ranks, one["step"], key)
    assert [e["world_size"] for e in json.loads((moved / "env.json").read_text())["resumes"]] == [2, 5, 1]
