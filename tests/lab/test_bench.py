"""The benchmark command: what it reports is what was measured, and its last line is JSON. No test looks at a speed."""

import json
import os
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import warm

from nanolab.cli import UserError
from nanolab.inference.engine import Engine
from nanolab.inference.prepare import prepare_for_inference
from nanolab.lab import bench, bench_infer
from nanolab.lab.config import BenchConfig
from nanolab.model.accounting import kv_bytes_per_token, n_params
from nanolab.runtime import start

SMALL = ["--depth", "1", "--aspect-ratio", "32", "--head-dim", "32", "--max-seq-len", "32", "--vocab-size", "300"]
FEW = ["--repeats", "3", "--device-type", "cpu"]


@pytest.fixture
def text_dir(tmp_path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(
            f"Document {i}. " + "The cat sat on the mat and looked at the other cat. " * (i + 1)
        )
    return folder


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.python("-m", "scripts.bench", *arguments, env=os.environ | {"NANOLAB_DTYPE": "float32"})


def last_document(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_train_reports_medians_of_every_sample_it_names():
    document = last_document(
        command("train", "--json", *SMALL, *FEW, "--device-batch-size", "2", "--steps", "2", "--warmup", "1")
    )
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
    cfg = BenchConfig(
        depth=1,
        aspect_ratio=32,
        head_dim=32,
        max_seq_len=32,
        vocab_size=300,
        device_batch_size=2,
        steps=2,
        repeats=3,
        warmup=4,
    )
    results = bench.bench_train(cfg, start("cpu", "float32"))["results"]
    assert results["step"]["samples"] == [1000.0] * 3
    assert results["first_step"]["median"] == 1.0
    assert len(steps) == 4 + 3 * 2


def test_tokenizer_counts_the_bytes_that_it_read(text_dir):
    document = last_document(
        command("tokenizer", "--json", "--data-dir", str(text_dir), "--vocab-size", "280", "--megabytes", "0.01", *FEW)
    )
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
    cfg = BenchConfig(
        data_dir=str(text_dir), vocab_size=280, megabytes=0.01, max_seq_len=32, device_batch_size=2, repeats=2
    )
    document = bench.data(cfg, start("cpu", "float32"))
    assert document["results"]["packing"]["samples"] == document["results"]["loader"]["samples"] == [32.0, 32.0]
    assert set(rows) == {33}  # T + 1 tokens make T inputs and T targets
    assert len(rows) == 4 * document["rows_per_sample"] and document["rows_per_sample"] * 32 <= document["tokens"]


def test_infer_reports_every_batch_size_and_the_clients():
    flags = [
        "--prompt-tokens",
        "8",
        "--decode-tokens",
        "6",
        "--batch-sizes",
        "1,3",
        "--clients",
        "4",
        "--repeats",
        "2",
        "--device-type",
        "cpu",
    ]
    document = last_document(command("infer", "--json", *SMALL, *flags))
    per_batch = {
        f"{what}_b{rows}"
        for what in ("first_token", "per_token", "decode", "prefill", "memory_read", "peak_memory")
        for rows in (1, 3)
    }
    of_clients = {"clients_total", "clients_first_token", "clients_per_token", "clients_slowest", "slowest_over_median"}
    assert set(document["results"]) == per_batch | of_clients
    assert len(document["results"]["decode_b3"]["samples"]) == document["n"] == 2
    assert [(row["rows"], row["tokens"]) for row in document["batches"]] == [(1, 6), (3, 18)]
    assert document["clients"]["tokens"] == 4 * 6  # lengths differ around D
    assert document["kernel"] and document["env"]["commit"] and document["config"]["prompt_tokens"] == 8


INFER = BenchConfig(
    depth=2,
    aspect_ratio=16,
    head_dim=16,
    max_seq_len=512,
    vocab_size=64,
    prompt_tokens=300,
    decode_tokens=6,
    batch_sizes="1,3",
    clients=4,
    repeats=2,
)


def test_infer_counts_steps_of_the_engine(monkeypatch):
    """With a clock that counts steps, of which one reads 256 tokens of prompts on a CPU, every figure follows by
    hand.
    """
    steps = []
    original = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (steps.append(1), original(self))[1])
    monkeypatch.setattr(bench_infer.time, "perf_counter", lambda: float(len(steps)))
    document = bench_infer.infer(INFER, start("cpu", "float32"))
    samples = {name: result["samples"] for name, result in document["results"].items()}
    assert samples["first_token_b1"] == [2000.0] * 2  # 300 tokens
    assert samples["first_token_b3"] == [3000.0] * 2  # the second of 3 x 300
    assert samples["prefill_b1"] == [150.0] * 2 and samples["prefill_b3"] == [225.0] * 2
    assert samples["per_token_b1"] == samples["per_token_b3"] == [1000.0] * 2
    assert samples["decode_b1"] == [1.0] * 2 and samples["decode_b3"] == [3.0] * 2
    for row in document["batches"]:
        assert samples[f"memory_read_b{row['rows']}"][0] == pytest.approx(row["step_bytes"] / 1e9, rel=1e-3)
    # nobody waits for another's prompt
    assert samples["slowest_over_median"] == [1.0] * 2 and samples["clients_per_token"] == [1000.0] * 2


def test_clients_come_one_by_one_and_wait_for_nobody(monkeypatch):
    steps = []
    original = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (steps.append(self.running), original(self))[1])
    monkeypatch.setattr(bench_infer.time, "perf_counter", lambda: float(len(steps)))
    cfg = BenchConfig(
        depth=1,
        aspect_ratio=32,
        head_dim=32,
        max_seq_len=64,
        vocab_size=64,
        prompt_tokens=8,
        decode_tokens=10,
        clients=3,
    )
    model, tokenizer = bench_infer.the_model(cfg, start("cpu", "float32"))
    engine = Engine(model, tokenizer, start("cpu", "float32"))
    requests = bench_infer.Prompts(64, 0).crowd(cfg)
    assert sorted(len(r.prompt) for r in requests) == [4, 8, 12] and sorted(r.max_tokens for r in requests) == [
        5,
        10,
        15,
    ]
    for i, (row, request) in enumerate(zip(bench_infer.timed(engine, requests, steps_between=2), requests)):
        assert row.came == 2 * i and row.tokens == [2 * i + 1 + n for n in range(request.max_tokens)]
    assert max(steps) == 3


@pytest.mark.parametrize(("flags", "matrices"), [({}, "lm_head"), ({"tied_head": True}, "wte")])
def test_bytes_of_a_step_are_those_of_the_formulas(flags, matrices):
    cfg = BenchConfig(
        depth=2, aspect_ratio=32, head_dim=32, max_seq_len=512, window_pattern="SL", vocab_size=64, **flags
    )
    runtime = start("cpu", "float32")
    model, tokenizer = bench_infer.the_model(cfg, runtime)
    counts, per_token = n_params(model.config), kv_bytes_per_token(model.config, 4)
    assert bench_infer.weight_bytes(model) == 4 * (counts["matrices"] + counts[matrices] + counts["scalars"])
    engine = Engine(model, tokenizer, runtime)
    assert bench_infer.cache_bytes(engine, 100) == 100 * per_token
    # one layer sees 128 tokens and itself
    assert bench_infer.cache_bytes(engine, 400) == 400 * per_token // 2 + 129 * per_token // 2


def test_int8_weights_are_counted_as_they_are_stored():
    pytest.importorskip("torchao")
    model, _ = bench_infer.the_model(INFER, start("cpu", "bfloat16"))
    in_16_bits = bench_infer.weight_bytes(model) / 2  # masters are fp32
    assert 0.5 * in_16_bits < bench_infer.weight_bytes(prepare_for_inference(model, int8=True)) < 0.7 * in_16_bits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": "1,x"}, "try --batch-sizes 1,8"),
        ({"batch_sizes": "0"}, "try --batch-sizes 1,8"),
        ({"decode_tokens": 1}, "expected at least 2, 4 and 1"),
        ({"decode_tokens": 100}, "rows of up to 600 tokens; this model reads 512"),
    ],
)
def test_mistakes_of_infer_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        bench_infer.infer(replace(INFER, **changes), start("cpu", "float32"))


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
