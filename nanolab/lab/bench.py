"""Speed, measured: a training step, the data path, the tokenizer. Medians of repeated measurements, with every sample
kept.

Each measurement is a JSON-ready dict whose "results" map a name to {"median", "samples", "unit"}. Nothing here judges:
two programs are compared by alternating whole runs of this on a quiet machine."""

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from itertools import cycle
from typing import Any

import numpy as np
import torch

from nanolab import runtime as machines
from nanolab.cli import UserError, check_bounds, to_json
from nanolab.lab.config import BenchConfig
from nanolab.records.environment import environment, kernel_text
from nanolab.runtime import Runtime, device_peaks, print0
from nanolab.stages.config import BaseTrainConfig


def bench(cfg: BenchConfig) -> dict[str, Any]:
    """Measure what `cfg.what` says, print a line for each result, and return all as a document for JSON.

    Raises UserError for flags that do not fit."""
    from nanolab.lab import bench_eval, bench_infer

    measurements = {
        "train": bench_train,
        "data": data,
        "tokenizer": tokenizer,
        "infer": bench_infer.infer,
        "eval": bench_eval.examples,
    }
    if cfg.what not in measurements:
        raise UserError(
            f"bench {cfg.what!r} is unknown; expected one of {', '.join(measurements)}; try python -m scripts.bench"
            " train"
        )
    check_bounds(type(cfg), vars(cfg))
    with closing(machines.start(cfg.device_type, "", cfg.seed, cfg.threads, cfg.deterministic)) as rt:
        found = measurements[cfg.what](cfg, rt)
        document = {"bench": cfg.what, **found, "config": to_json(cfg), "env": environment(rt)}
    if "kernel" in document:
        print0(f"{cfg.what:9s} attention kernel         {document['kernel']}")
    for name, result in document["results"].items():
        samples = result["samples"]
        spread = f"  (lowest {min(samples):g}, highest {max(samples):g}, n = {len(samples)})" * (len(samples) > 1)
        print0(f"{cfg.what:9s} {name:24s} {result['median']:>12g} {result['unit']}{spread}")
    return document


def measured(samples: list[float], unit: str, digits: int = 4) -> dict[str, Any]:
    """One result: the median of `samples` and the samples themselves, to `digits` significant digits."""
    return {
        "median": float(f"{statistics.median(samples):.{digits}g}"),
        "unit": unit,
        "samples": [float(f"{s:.{digits}g}") for s in samples],
    }


def seconds(work: Callable[[], Any], runtime: Runtime) -> float:
    """Wall time of `work()`, device included."""
    runtime.synchronize()
    start = time.perf_counter()
    work()
    runtime.synchronize()
    return time.perf_counter() - start


def bench_train(cfg: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """Whole training steps on synthetic tokens: forward, backward, optimizer. One micro-batch per step."""
    from nanolab.model.fp8 import convert
    from nanolab.model.gpt import GPT
    from nanolab.training.optim import MuonAdamW
    from nanolab.training.recipes import param_groups
    from nanolab.training.schedule import make_plan

    B, T = cfg.device_batch_size, cfg.max_seq_len
    shared = {
        f.name: getattr(cfg, f.name) for f in fields(BenchConfig) if f.name in {g.name for g in fields(BaseTrainConfig)}
    }
    flags = BaseTrainConfig(**shared | {"total_batch_size": B * T * runtime.world_size, "num_iterations": 1})
    plan = make_plan(flags, cfg.vocab_size, runtime.world_size, bos=0)
    with torch.device(runtime.device):
        model = GPT(plan.model, runtime.dtype, cfg.attn_kernel)
    model.init_weights(cfg.seed)
    in_8_bits = convert(model) if cfg.fp8 else 0
    optimizer = MuonAdamW(param_groups(model, flags, plan), runtime)
    step_model = torch.compile(model, dynamic=False) if runtime.device.type == "cuda" else model
    ids = torch.randint(0, cfg.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(cfg.seed)).to(
        runtime.device
    )
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def steps(n: int) -> None:
        for _ in range(n):
            loss = step_model(inputs, targets, reduction="sum") / (targets.numel() * runtime.world_size)
            loss.backward()
            if plan.grad_clip > 0:
                optimizer.grad_norm(plan.grad_clip)
            optimizer.step()
            optimizer.zero_grad()

    first = seconds(lambda: steps(1), runtime)
    steps(max(0, cfg.warmup - 1))
    samples = [seconds(lambda: steps(cfg.steps), runtime) / cfg.steps for _ in range(cfg.repeats)]
    rates = [B * T * runtime.world_size / s for s in samples]
    peak = device_peaks(runtime.device_name)[0]
    return {
        "kernel": kernel_text(model.kernel_names(runtime.device.type)),
        "fp8_layers": in_8_bits,
        "compiled": step_model is not model,
        "n": cfg.repeats,
        "steps_per_sample": cfg.steps,
        "results": {
            "step": measured([1000 * s for s in samples], "ms"),
            "tokens": measured(rates, "tokens/s"),
            "first_step": measured([first], "s"),
            "peak_memory": measured([runtime.peak_memory_mib()], "MiB"),
        },
        "flops_per_token": plan.flops_per_token,
        "mfu": (
            round(statistics.median(rates) * plan.flops_per_token / (peak * runtime.world_size), 4)
            if peak
            else "unknown"
        ),
    }


def read_texts(cfg: BenchConfig) -> tuple[list[str], int]:
    """The first `megabytes` of the corpus's training documents, in file order, and their bytes in UTF-8."""
    from nanolab.data.corpus import open_data

    texts, n_bytes = [], 0
    for documents, _ in open_data(cfg, cfg.seed).train:
        for text in documents.iterate():
            if n_bytes >= cfg.megabytes * 1e6:
                break
            texts.append(text)
            n_bytes += len(text.encode())
    if not texts:
        raise UserError(f"--megabytes {cfg.megabytes} reads no text; expected more than 0; try --megabytes 8")
    return texts, n_bytes


def the_tokenizer(cfg: BenchConfig, texts: list[str]):
    """--tokenizer, or one of --vocab-size trained on `texts`: the same texts give the same tokenizer."""
    from nanolab.data.tokenizer import Tokenizer

    if cfg.tokenizer:
        return Tokenizer.load(cfg.tokenizer)
    print0(f"training a tokenizer of {cfg.vocab_size} tokens on the text (--tokenizer names one that exists)")
    return Tokenizer.train(texts, cfg.vocab_size)


def tokenizer(cfg: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """Training a vocabulary, and encoding with it on one thread and on all."""
    from nanolab.data.tokenizer import Tokenizer

    texts, n_bytes = read_texts(cfg)
    tok = the_tokenizer(cfg, texts)
    ids = tok.encode_batch(texts, runtime.threads)  # warms the caches, and is what the counts below are of

    def rates(work: Callable[[], Any]) -> dict[str, Any]:
        return measured([n_bytes / 1e6 / seconds(work, runtime) for _ in range(cfg.repeats)], "MB/s")

    results = {"train": rates(lambda: Tokenizer.train(texts, tok.vocab_size))} if not cfg.tokenizer else {}
    results["encode_1_thread"] = rates(lambda: tok.encode_batch(texts, 1))
    if runtime.threads > 1:
        results[f"encode_{runtime.threads}_threads"] = rates(lambda: tok.encode_batch(texts, runtime.threads))
    results["decode"] = rates(lambda: [tok.decode(row) for row in ids])
    n_tokens = sum(map(len, ids))
    counts = {
        "bytes": n_bytes,
        "documents": len(texts),
        "tokens": n_tokens,
        "bytes_per_token": round(n_bytes / n_tokens, 4),
    }
    return {"n": cfg.repeats, "vocab_size": tok.vocab_size, "tokenizer_hash": tok.hash, **counts, "results": results}


def data(cfg: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """Packing alone (tokenised documents in, rows out), and the whole loader: read, tokenise, pack, tensors."""
    from nanolab.data.corpus import open_data
    from nanolab.data.packing import PackedBatches, Packer

    texts, n_bytes = read_texts(cfg)
    tok, B, T = the_tokenizer(cfg, texts), cfg.device_batch_size, cfg.max_seq_len
    documents = [np.array([tok.bos, *ids], dtype=np.int32) for ids in tok.encode_batch(texts, runtime.threads)]
    n_batches = max(1, sum(map(len, documents)) // (B * T))  # about one pass

    def pack() -> float:
        # a packer may overwrite what it gets
        supply = cycle([(i, tokens.copy()) for i, tokens in enumerate(documents)])
        packers = [Packer(tok.bos, lambda: next(supply)) for _ in range(B)]

        def work() -> None:
            for _ in range(n_batches):
                rows = np.empty((B, T + 1), dtype=np.int64)
                for packer, row in zip(packers, rows):
                    packer.fill(row)

        return n_batches * B * T / seconds(work, runtime)

    def load() -> float:
        sources = open_data(cfg, cfg.seed).train  # opened anew: nothing decoded is kept from the sample before
        batches = PackedBatches(sources, tok, seq_len=T, device_batch_size=B, rows_per_step=B, threads=runtime.threads)

        def work() -> None:
            for _ in range(n_batches):
                batches.next()

        return n_batches * B * T / seconds(work, runtime)

    results = {
        "packing": measured([pack() for _ in range(cfg.repeats)], "tokens/s"),
        "loader": measured([load() for _ in range(cfg.repeats)], "tokens/s"),
    }
    counts = {
        "bytes": n_bytes,
        "documents": len(texts),
        "tokens": sum(map(len, documents)),
        "rows_per_sample": n_batches * B,
    }
    return {"n": cfg.repeats, "vocab_size": tok.vocab_size, "tokenizer_hash": tok.hash, **counts, "results": results}
