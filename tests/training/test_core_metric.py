"""base_train --core-metric-every: when CORE is measured, under which names it is logged, and what is found out before
the first step.
"""

import json

import pytest
import torch

from nanolab.cli import UserError
from nanolab.evals.bundle import open_bundle
from nanolab.evals.core import Core
from nanolab.evals.likelihood import GPTReader
from nanolab.records.models import load_model, read_metrics, runs_dir
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from scripts.base_train import run

CPU = Runtime(torch.device("cpu"), torch.float32)


def test_core_is_logged_at_its_steps_and_at_the_end(flags, capsys):
    run(BaseTrainConfig(**flags))
    rows = {row["step"]: row for row in read_metrics(runs_dir() / "toy") if "core_metric" in row}
    assert list(rows) == [2, 3], "every second step but the first, and the last one"
    assert (
        rows[2].keys() >= {"core_metric", "centered_results", "core_tasks", "train/loss"} and rows[3]["core_tasks"] == 4
    )
    model, tokenizer, _ = load_model("toy", CPU)
    found = Core(open_bundle(flags["eval_bundle"]), tokenizer, CPU, 4).evaluate(GPTReader(model, CPU))
    assert rows[3]["core_metric"] == pytest.approx(found.value) and rows[3]["centered_results"] == pytest.approx(
        {k: s.centred for k, s in found.tasks.items()}
    )
    result = json.loads((runs_dir() / "toy" / "result.json").read_text())
    assert result["core_metric"] == rows[3]["core_metric"]
    out = capsys.readouterr().out
    assert (
        "CORE            4 of 22 tasks of" in out
        and "CORE-4 of 22" in out
        and f"step 00003 | core_metric {found.value:.6f}" in out
    )


def test_it_changes_nothing_else(flags):
    run(BaseTrainConfig(**flags))
    run(BaseTrainConfig(**flags | {"run": "plain", "core_metric_every": -1, "eval_bundle": ""}))
    losses = [
        [row["train/loss"] for row in read_metrics(runs_dir() / name) if "train/loss" in row]
        for name in ("toy", "plain")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert not any("core_metric" in row for row in read_metrics(runs_dir() / "plain"))


@pytest.mark.parametrize("n", [0, -2])
def test_a_number_of_items_that_is_none_is_refused(flags, n):
    with pytest.raises(UserError, match=f"--core-metric-max-per-task is {n}; expected at least 1, or -1;"):
        run(BaseTrainConfig(**flags | {"core_metric_max_per_task": n}))


def test_a_bundle_that_is_not_there_is_found_out_before_the_first_step(flags, tmp_path, capsys):
    with pytest.raises(UserError, match="--eval-bundle .*none is not a folder"):
        run(BaseTrainConfig(**flags | {"eval_bundle": str(tmp_path / "none")}))
    for path in (tmp_path / "bundle").rglob("*.jsonl"):
        path.write_text("{")
    with pytest.raises(
        UserError, match="no task of CORE in .* can be evaluated; expected at least one; name another --eval-bundle"
    ):
        run(BaseTrainConfig(**flags))
    assert not read_metrics(runs_dir() / "toy") and "without copa: " in capsys.readouterr().out
