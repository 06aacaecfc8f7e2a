"""lab sweep: a rate for each arm, chosen on other seeds than the study's, and used by run."""

import json
import math

import pytest

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.lab import processes, runner
from nanolab.lab.results import read_results
from nanolab.lab.study import study_of
from nanolab.lab.sweep import rates_for, sweep_study
from nanolab.lab.verdict import verdict_of

SMALL = "--depth 1 --aspect-ratio 32 --head-dim 32 --max-seq-len 32 --device-batch-size 2 --total-batch-size 64"
ASKED = {"question": "?", "baseline": "none", "matters": 0.01, "arms": {"none": "", "head": "--gate head"}}
ASKED |= {"sweep": "--lr-scale 0.25,0.5,1,2", "sweep_seeds": [7, 8]}


@pytest.mark.parametrize(
    "changes,code",
    [
        ({"sweep": "--depth 1,2"}, "sweep-values"),
        ({"sweep": "--lr-scale 1"}, "sweep-values"),
        ({"sweep": "--lr-scale 1,1"}, "sweep-values"),
        ({"sweep_seeds": [43]}, "sweep-seeds"),
        ({"sweep_seeds": []}, "sweep-seeds"),
    ],
)
def test_a_sweep_that_says_nothing_is_refused(changes, code):
    with pytest.raises(UserError) as error:
        study_of(ASKED | changes, "x")
    assert error.value.code == code


def fake_train(cfg, log, *more):
    """A valley whose floor is at 0.5 without the gate, and beyond 2 with it; at 0.25 the gate diverges."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if cfg.gate == "head" and cfg.lr_scale == 0.25:
        raise SystemExit(processes.DIVERGED)
    best = {"none": 0.5, "head": 4.0}[cfg.gate]
    value = 1 + math.log2(cfg.lr_scale / best) ** 2 / 10 + cfg.seed / 1000
    result = {"val/bpb": value, "total_training_time": 1.0, "lr": cfg.lr_scale, "seed": cfg.seed}
    (log.parent / "result.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_each_arm_is_trained_with_its_best_rate(monkeypatch, tmp_path, base_dir, capsys):
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i:02d}.txt").write_text(f"Document {i}. " + "The cat looked at the mat. " * (i + 1))
    texts = [path.read_text() for path in (tmp_path / "text").iterdir()]
    Tokenizer.train(texts, 280).save(base_dir / "tokenizer")
    monkeypatch.setattr(processes, "train", fake_train)
    flags = f"--data-dir {tmp_path / 'text'} {SMALL} --num-iterations 2 --eval-tokens 128"
    study, folder = study_of(ASKED | {"flags": flags}, "x"), tmp_path / "out"
    with pytest.raises(UserError) as error:
        runner.run_study(study, folder)
    assert error.value.code == "sweep-first" and len(error.value.values["missing"]) == 16

    found = sweep_study(study, folder, "", 0, "")
    assert {arm: one["chosen"] for arm, one in found["arms"].items()} == {"none": "0.5", "head": "2"}
    assert {arm: one["edge"] for arm, one in found["arms"].items()} == {"none": False, "head": True}
    assert found["arms"]["none"]["means"]["1"] == pytest.approx(1.1 + 0.0075)
    assert math.isnan(found["arms"]["head"]["means"]["0.25"]) and found["missing"] == []
    rows = read_results(folder / "sweep")[1]
    assert len(rows) == 16 and {row["seed"] for row in rows} == {7, 8}
    text = (folder / "sweep" / "table.md").read_text()
    assert "= 8 runs" in text and "edge of the grid" in text and "head 2." in text

    runner.run_study(study, folder)
    record, rows = read_results(folder)
    assert record["rates"] == {"none": "--lr-scale 0.5", "head": "--lr-scale 2"} == rates_for(study, folder)
    assert {(row["arm"], row["result"]["lr"]) for row in rows} == {("none", 0.5), ("head", 2.0)}
    assert {row["seed"] for row in rows} == {42, 43, 44}
    assert any("head --lr-scale 2;" in line for line in verdict_of(folder)[1])
