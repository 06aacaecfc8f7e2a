"""The benchmark command: what it reports is what was measured, and its last line is JSON. No test looks at a speed."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from nanolab.config import BenchConfig
from nanolab.lab import bench
from nanolab.runtime import start

SMALL = ["--depth", "1", "--aspect-ratio", "32", "--head-dim", "32", "--max-seq-len", "32", "--vocab-size", "300", "--device-batch-size", "2"]
FEW = ["--steps", "2", "--repeats", "3", "--warmup", "1", "--device-type", "cpu"]


@pytest.fixture
def text_dir(tmp_path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(f"Document {i}. " + "The cat sat on the mat and looked at the other cat. " * (i + 1))
    return folder


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"NANOLAB_DTYPE": "float32"}
    return subprocess.run([sys.executable, "-m", "scripts.bench", *arguments], cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)


def last_document(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_train_reports_medians_of_every_sample_it_names():
    document = last_document(command("train", "--json", *SMALL, *FEW))
    step, tokens = document["results"]["step"], document["results"]["tokens"]
    assert (document["n"], len(step["samples"]), document["steps_per_sample"]) == (3, 3, 2)
    assert step["median"] == statistics.median(step["samples"])
    for ms, rate in zip(step["samples"], tokens["samples"]):
        assert rate == pytest.approx(2 * 32 / (ms / 1000), rel=1e-3)  # B * T tokens in each step
    assert document["env"]["torch"] and document["env"]["commit"] and document["config"]["depth"] == 1


def test_train_times_the_steps_and_nothing_else(monkeypatch):
    """With a clock that counts calls of the optimizer, every sample is one step."""
    from nanolab.training.optim import MuonAdamW

    steps = []
    original = MuonAdamW.step
    monkeypatch.setattr(MuonAdamW, "step", lambda self: (steps.append(1), original(self))[1])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(len(steps)))
    cfg = BenchConfig(depth=1, aspect_ratio=32, head_dim=32, max_seq_len=32, vocab_size=300, device_batch_size=2, steps=2, repeats=3, warmup=4)
    results = bench.train(cfg, start("cpu", "float32"))["results"]
    assert results["step"]["samples"] == [1000.0] * 3
    assert results["first_step"]["median"] == 1.0
    assert len(steps) == 4 + 3 * 2


def test_tokenizer_counts_the_bytes_that_it_read(text_dir):
    document = last_document(command("tokenizer", "--json", "--data-dir", str(text_dir), "--vocab-size", "280", "--megabytes", "0.01", *FEW))
    assert 10_000 <= document["bytes"] <= sum(p.stat().st_size for p in text_dir.iterdir())
    assert document["bytes_per_token"] == pytest.approx(document["bytes"] / document["tokens"], abs=1e-4)
    assert {"train", "encode_1_thread", "decode"} <= set(document["results"])


def test_data_packs_every_row_that_it_counts(text_dir, monkeypatch):
    """Rates are rows filled, times T, over the clock; here every filled row takes one tick."""
    from nanolab.data.packing import Packer

    rows = []
    original = Packer.fill
    monkeypatch.setattr(Packer, "fill", lambda self, row: (rows.append(len(row)), original(self, row))[1])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(len(rows)))
    cfg = BenchConfig(data_dir=str(text_dir), vocab_size=280, megabytes=0.01, max_seq_len=32, device_batch_size=2, repeats=2)
    document = bench.data(cfg, start("cpu", "float32"))
    assert document["results"]["packing"]["samples"] == document["results"]["loader"]["samples"] == [32.0, 32.0]
    assert set(rows) == {33}  # T + 1 tokens make T inputs and T targets
    assert len(rows) == 4 * document["rows_per_sample"] and document["rows_per_sample"] * 32 <= document["tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokeniser"], "try python -m scripts.bench train"),
        (["train", "--repeats", "0"], "expected at least 1"),
        (["train", "--device-type", "tpu"], "--device-type cpu"),
        (["tokenizer", "--data-dir", "/nonexistent"], "does not exist"),
    ],
)
def test_mistakes_are_named(arguments, message):
    done = command(*arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
