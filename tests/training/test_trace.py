"""base_train --profile: a trace of five steps, read back; the run is the same without it."""

import json

import pytest

from nanolab.cli import UserError
from nanolab.records.models import read_metrics, runs_dir
from nanolab.stages.config import BaseTrainConfig
from nanolab.stages.pretrain import pretrain
from nanolab.training.trace import STEPS, WARMUP


def trained(flags: dict, **changes):
    flags = {name: value for name, value in flags.items() if not name.startswith(("core", "eval_bundle"))}
    return pretrain(BaseTrainConfig(**flags | {"num_iterations": WARMUP + STEPS} | changes))


def test_the_trace_has_five_steps_with_their_operators_and_changes_nothing(base_dir, flags, capsys):
    plain = trained(flags, run="plain")
    found = trained(flags, run="toy", profile=True)
    assert (
        found["val/bpb" if "val/bpb" in found else "train/loss"]
        == plain["val/bpb" if "val/bpb" in plain else "train/loss"]
    )
    losses = [
        [row["train/loss"] for row in read_metrics(runs_dir() / name) if "train/loss" in row]
        for name in ("plain", "toy")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == WARMUP + STEPS
    [path] = (runs_dir() / "toy").glob("trace*.json")
    assert path.name == "trace_10-14.json" and f"{path}: steps 10 to 14" in capsys.readouterr().out
    assert not list((runs_dir() / "plain").glob("trace*"))
    events = json.loads(path.read_text())["traceEvents"]
    steps = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if str(e.get("name", "")).startswith("ProfilerStep#"))
    assert len(steps) == STEPS and all(end <= begin for (_, end), (begin, _) in zip(steps, steps[1:]))
    for begin, end in steps:  # each is a whole step: a backward pass, and matrix products
        inside = [e["name"] for e in events if "dur" in e and begin <= e["ts"] <= end]
        assert any("backward" in name.lower() for name in inside) and any("mm" in name for name in inside)


@pytest.mark.parametrize("changes", [{"num_iterations": WARMUP + STEPS - 1}])
def test_a_run_that_is_too_short_for_a_trace_is_refused_before_its_first_step(base_dir, flags, changes):
    with pytest.raises(UserError) as error:
        trained(flags, profile=True, **changes)
    assert (error.value.code, error.value.values) == ("profile-too-short", {"left": 14, "needed": 15})
    assert not read_metrics(runs_dir() / "toy")


def test_a_run_by_the_clock_that_ends_too_early_says_so(base_dir, flags, capsys):
    trained(flags, profile=True, num_iterations=-1, max_seconds=0.01)
    assert "no trace" in capsys.readouterr().out and not list((runs_dir() / "toy").glob("trace*"))
