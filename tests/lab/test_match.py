"""Arms of equal FLOPs or time: the steps of each, the calibration, what the record keeps."""

import json
import os
from pathlib import Path

import pytest

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.lab import processes, runner
from nanolab.lab.match import COLD, ROUNDS, calibrate, time_steps, with_lengths
from nanolab.lab.results import read_results
from nanolab.lab.study import study_of
from nanolab.lab.verdict import verdict_of
from nanolab.stages.config import BaseTrainConfig

SMALL = "--depth 1 --aspect-ratio 32 --head-dim 32 --max-seq-len 32 --device-batch-size 2 --total-batch-size 64"
ASKED = {"question": "?", "baseline": "none", "matters": 0.01, "arms": {"none": "", "wide": "--aspect-ratio 64"}}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("match")
    (folder / "text").mkdir()
    for i in range(12):
        (folder / "text" / f"{i:02d}.txt").write_text(f"Document {i}. " + "The cat looked at the mat. " * (i + 1))
    Tokenizer.train([path.read_text() for path in (folder / "text").iterdir()], 280).save(folder / "base" / "tokenizer")
    return folder


@pytest.fixture
def study(home, monkeypatch):
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(home / "base"))
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")
    flags = f"--data-dir {home / 'text'} {SMALL} --num-iterations 10 --eval-tokens 128 --log-every -1"
    return lambda match, **changes: study_of(
        ASKED | {"match": match, "flags": flags, "seeds": [1, 2, 3]} | changes, "x"
    )


@pytest.mark.parametrize("match", ["flops", "time"])
@pytest.mark.parametrize("base,steps,cost", [(7.0, 300, 5.0), (1.0, 3, 40.0), (3.0, 1000, 3.0), (2.0, 10, 3.0)])
def test_totals_are_as_near_as_whole_steps_allow(match, base, steps, cost):
    facts = {
        arm: {"steps": steps, "tokens": steps * 64, "seconds": 2.0, "step_flops": one}
        for arm, one in (("none", base), ("wide", cost))
    }
    asked, configs = study_of(ASKED | {"match": match}, "x"), {arm: BaseTrainConfig() for arm in facts}
    found = with_lengths(asked, configs, facts, {"none": base, "wide": cost} if match == "time" else {})
    best = min(range(1, 5000), key=lambda n: abs(n * cost - steps * base))
    assert (found["none"].num_iterations, found["wide"].num_iterations) == (steps, best)
    assert facts["wide"]["steps"] == best and facts["wide"]["tokens"] == best * 64
    assert facts["wide"]["seconds"] == pytest.approx(2.0 * best / steps)


def test_arms_take_turns_and_the_median_counts():
    """Of arms that differ in rates alone one is measured."""
    order, times = [], iter([3.0, 9.0, 8.0, 1.0, 2.0, 7.0, 6.0, 100.0, 2.5, 5.0])

    def measure(cfg: BaseTrainConfig, threads: int) -> float:
        order.append((cfg.depth, threads))
        return next(times)

    configs = {"a": BaseTrainConfig(depth=1), "b": BaseTrainConfig(depth=2), "c": BaseTrainConfig(depth=2, lr_scale=3)}
    found = calibrate(configs, 4, lambda work, *args: work(*args), measure)
    assert [depth for depth, _ in order] == [1, 2, 2, 1, 1, 2, 2, 1, 1, 2] and len(order) == 2 * ROUNDS
    assert {threads for _, threads in order} == {4}
    assert found == {"a": 2.5, "b": 7.0, "c": 7.0}  # of 3, 1, 2, 100, 2.5 and of 9, 8, 7, 6, 5


@pytest.mark.parametrize(
    "changes,code,values",
    [
        ({"arms": {"none": "", "wide": "--num-iterations 3"}}, "length-derived", {"arm": "wide"}),
        ({"arms": {"none": "", "wide": "--target-flops=3"}}, "length-derived", {"flag": "--target-flops=3"}),
        ({"stage": "sft"}, "match-stage", {"stage": "sft"}),
        ({"match": "hours"}, "match-unknown", {"match": "hours"}),
    ],
)
def test_lengths_that_are_asked_for_otherwise_are_refused(changes, code, values):
    with pytest.raises(UserError) as error:
        study_of(ASKED | {"match": "flops"} | changes, "x")
    assert error.value.code == code and values.items() <= error.value.values.items()


def test_a_baseline_by_the_clock_has_no_steps():
    asked = study_of(ASKED | {"match": "time"}, "x")
    facts = {arm: {"steps": None, "tokens": None, "seconds": 3.0, "step_flops": 1} for arm in asked.arms}
    with pytest.raises(UserError) as error:
        with_lengths(asked, {arm: BaseTrainConfig() for arm in facts}, facts, dict.fromkeys(facts, 1.0))
    assert error.value.code == "arms-unequal"


def fake_train(cfg, log, *more):
    log.parent.mkdir(parents=True, exist_ok=True)
    result = {"val/bpb": 1.0 + cfg.seed, "total_training_time": 1.0, "steps": cfg.num_iterations}
    (log.parent / "result.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_a_calibration_is_kept_and_never_made_again(study, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(processes, "train", fake_train)
    monkeypatch.setattr(runner, "calibrate", lambda configs, *more: made.append(1) or {"none": 0.5, "wide": 1.25})
    asked = study("time", arms={"none": "--keep 7", "wide": "--aspect-ratio 64 --keep 7"})  # runs of its own
    runner.run_study(asked, tmp_path)
    monkeypatch.setattr(runner, "calibrate", lambda configs, *more: made.append(1) or {"none": 9.0, "wide": 1.25})
    runner.run_study(asked.model_copy(update={"seeds": [1, 2, 3, 4]}), tmp_path)
    record, rows = read_results(tmp_path)
    assert made == [1] and record["step_seconds"] == {"none": 0.5, "wide": 1.25}
    assert record["lengths"]["wide"] == {"steps": 4, "step_seconds": 1.25}
    assert {(row["arm"], row["result"]["steps"]) for row in rows} == {("none", 10), ("wide", 4)} and len(rows) == 8
    assert any("wide 4 = 5 s" in line for line in verdict_of(tmp_path)[1])


@pytest.mark.slow
def test_runs_of_equal_flops(study, tmp_path):
    """The totals that the runs themselves count differ by at most half a step."""
    runner.run_study(study("flops"), tmp_path)
    record, rows = read_results(tmp_path)
    step = {arm: one["step_flops"] for arm, one in record["lengths"].items()}
    total = {row["arm"]: row["result"]["total_training_flops"] for row in rows}
    assert step["wide"] > 1.5 * step["none"] and total["none"] == 10 * step["none"]
    assert abs(total["wide"] - total["none"]) <= step["wide"] / 2
    assert {row["arm"]: row["result"]["step"] for row in rows}["wide"] < 8
    assert any("Steps of each arm" in line for line in verdict_of(tmp_path)[1])


@pytest.mark.slow
def test_a_measured_step_leaves_nothing(study, home):
    before = set(os.listdir(home / "base" / "runs")) if (home / "base" / "runs").exists() else set()
    seconds = processes.in_child(time_steps, study("time").configs("")["none"], 1)
    assert 1e-4 < seconds < 5 and COLD < 12
    assert set(os.listdir(home / "base" / "runs")) == before
