"""Speed of generation, with the engine set up as the server sets it up: batches of one size, and clients that come one
by one.

Greedy and without stops, so that every row makes as many tokens as it was asked for. Dims: B rows, P tokens of a
prompt, D of a reply."""

import math
import random
import statistics
import time
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanolab.cli import UserError
from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.engine import Engine, Request
from nanolab.inference.prepare import prepare_for_inference
from nanolab.lab.bench import measured
from nanolab.lab.config import BenchConfig
from nanolab.model.gpt import GPT
from nanolab.records.environment import kernel_text
from nanolab.records.models import load_model
from nanolab.runtime import Runtime, device_peaks
from nanolab.serving.config import ServeConfig
from nanolab.training.schedule import gpt_config

STEPS_BETWEEN_CLIENTS = 2


class Timed(NamedTuple):
    """When a request came and when each of its tokens did, in seconds of one clock."""

    came: float
    tokens: list[float]

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.came

    @property
    def per_token(self) -> float:
        """Seconds from one token to the next, on average."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1)


def infer(cfg: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """Time to first token, time per token and tokens/s for each of --batch-sizes, and for --clients at once.

    first_token: B different prompts come at once; of each row, then the median over rows. prefill: all their tokens
    over that time. per_token, decode: B rows behind one prompt, which join in the same step; steps that read prompts
    are not among these. memory_read: the bytes that a decode step has to read, over its time: matrices of blocks and
    head, and the keys and values that the rows' next tokens may see. Its share of the device's bandwidth is under
    "batches". clients_*: one joins every other step, with prompts and replies from half to one and a half times P and
    D; what each waits for a token includes the reading of later prompts. peak_memory: the device's for this batch size
    on CUDA, elsewhere the process's so far."""
    sizes = checked(cfg)
    model, tokenizer = the_model(cfg, runtime)
    longest = 3 * (cfg.prompt_tokens + cfg.decode_tokens) // 2
    if longest > model.config.sequence_len:
        raise UserError(
            f"--prompt-tokens {cfg.prompt_tokens} and --decode-tokens {cfg.decode_tokens} make rows of up to {longest}"
            f" tokens; this model reads {model.config.sequence_len}; lower them, or raise --max-seq-len"
        )
    kernel = kernel_text(model.kernel_names(runtime.device.type))
    model = prepare_for_inference(model, int8=cfg.int8)
    prompts = Prompts(model.config.vocab_size, cfg.seed)
    results: dict[str, Any] = {}
    batches = [batch(cfg, runtime, new_engine(model, tokenizer, runtime, B), prompts, B, results) for B in sizes]
    engine = new_engine(model, tokenizer, runtime, ServeConfig.max_rows)
    crowd = clients(cfg, engine, prompts, results)
    return {
        "kernel": kernel,
        "graphs": engine.recorder is not None,
        "int8": cfg.int8,
        "n": cfg.repeats,
        "prompt_tokens": cfg.prompt_tokens,
        "decode_tokens": cfg.decode_tokens,
        "weight_bytes": weight_bytes(model),
        "batches": batches,
        "clients": crowd,
        "results": results,
    }


def checked(cfg: BenchConfig) -> list[int]:
    """--batch-sizes as numbers. Raises UserError for counts that nothing can be measured with."""
    if cfg.prompt_tokens < 2 or cfg.decode_tokens < 4 or cfg.clients < 1:
        raise UserError(
            f"--prompt-tokens {cfg.prompt_tokens}, --decode-tokens {cfg.decode_tokens}, --clients {cfg.clients};"
            " expected at least 2, 4 and 1; try --prompt-tokens 128 --decode-tokens 64"
        )
    sizes = cfg.batch_sizes.split(",")
    if not all(size.isdigit() and int(size) for size in sizes):
        raise UserError(
            f"--batch-sizes {cfg.batch_sizes!r}; expected numbers of rows, joined by commas; try --batch-sizes"
            " 1,8,32,128"
        )
    return [int(size) for size in sizes]


def the_model(cfg: BenchConfig, runtime: Runtime) -> tuple[GPT, Tokenizer]:
    """--model, or one of random weights. No text is made of its tokens, so any tokenizer will do for that."""
    if cfg.model:
        return load_model(cfg.model, runtime)[:2]
    with torch.device(runtime.device):
        model = GPT(gpt_config(cfg, cfg.vocab_size, bos=0), runtime.dtype, cfg.attn_kernel)
    model.init_weights(cfg.seed)
    return model, Tokenizer.train(["no text"], 265)


def new_engine(model: GPT, tokenizer: Tokenizer, runtime: Runtime, rows: int) -> Engine:
    """As scripts.chat_web makes it."""
    return Engine(model, tokenizer, runtime, max_rows=rows, prefix_bytes=ServeConfig.prefix_mb << 20, graphs=True)


class Prompts:
    """Random prompts, no two alike: none begins with what the engine has kept of another."""

    def __init__(self, vocab_size: int, seed: int):
        self.vocab_size, self.generator = vocab_size, torch.Generator().manual_seed(seed)

    def request(self, length: int, max_tokens: int) -> Request:
        ids = torch.randint(self.vocab_size, (length,), generator=self.generator)
        return Request(tuple(ids.tolist()), max_tokens, temperature=0.0, stop_ids=())

    def crowd(self, cfg: BenchConfig) -> list[Request]:
        """One request for each of --clients: P and D from half to one and a half times what the flags say, the same at
        every call.
        """
        order, spread = random.Random(cfg.seed), [0.5 + i / max(1, cfg.clients - 1) for i in range(cfg.clients)]
        lengths = [
            [round(mean * x) for x in order.sample(spread, cfg.clients)]
            for mean in (cfg.prompt_tokens, cfg.decode_tokens)
        ]
        return [self.request(*pair) for pair in zip(*lengths)]


def timed(engine: Engine, requests: list[Request], steps_between: int = 0) -> list[Timed]:
    """Run the engine until all are finished; they come `steps_between` steps after one another, or all at once."""
    coming, rows, steps = deque(requests), {}, 0
    while coming or not engine.idle:
        while coming and steps >= steps_between * len(rows):
            came = time.perf_counter()
            rows[engine.add(coming.popleft())] = Timed(came, [])
        step = engine.step()  # tokens are numbers on the host: the device has been waited for
        now = time.perf_counter()
        engine.check()
        for new in step:
            rows[new.row].tokens.append(now)
        steps += 1
    return list(rows.values())


def prepare(engine: Engine) -> None:
    """What the server does while nobody asks for anything."""
    while engine.prepare():
        pass


def batch(
    cfg: BenchConfig, runtime: Runtime, engine: Engine, prompts: Prompts, B: int, results: dict[str, Any]
) -> dict[str, Any]:
    """Measure B rows at once. The first round, in which an engine records its graphs, does not count."""
    P, D = cfg.prompt_tokens, cfg.decode_tokens
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
    samples: dict[str, list[float]] = {"first": [], "prefill": [], "step": [], "decode": []}
    for i in range(1 + cfg.repeats):
        prepare(engine)
        read = timed(engine, [prompts.request(P, 1) for _ in range(B)])
        rows = timed(engine, [prompts.request(P, D)] * B)
        if i == 0:
            continue
        ticks = rows[0].tokens
        samples["first"].append(statistics.median(row.first for row in read))
        samples["prefill"].append(B * P / (max(row.tokens[0] for row in read) - read[0].came))
        samples["step"].append(statistics.median(b - a for a, b in zip(ticks, ticks[1:])))
        samples["decode"].append(B * (D - 1) / (ticks[-1] - ticks[0]))
    bytes_read = weight_bytes(engine.model) + B * cache_bytes(engine, P + D // 2)
    results[f"first_token_b{B}"] = measured([1000 * s for s in samples["first"]], "ms")
    results[f"per_token_b{B}"] = measured([1000 * s for s in samples["step"]], "ms")
    results[f"decode_b{B}"] = measured(samples["decode"], "tokens/s")
    results[f"prefill_b{B}"] = measured(samples["prefill"], "tokens/s")
    results[f"memory_read_b{B}"] = measured([bytes_read / 1e9 / s for s in samples["step"]], "GB/s")
    results[f"peak_memory_b{B}"] = measured([runtime.peak_memory_mib()], "MiB")
    peak = device_peaks(runtime.device_name)[1]
    share = round(bytes_read / statistics.median(samples["step"]) / peak, 4) if peak else "unknown"
    return {
        "rows": B,
        "tokens": sum(len(row.tokens) for row in rows),
        "step_bytes": bytes_read,
        "bandwidth_share": share,
    }


def clients(cfg: BenchConfig, engine: Engine, prompts: Prompts, results: dict[str, Any]) -> dict[str, Any]:
    """Measure requests that join while others run. The first round does not count."""
    rounds = []
    for _ in range(1 + cfg.repeats):
        rounds.append(timed(engine, prompts.crowd(cfg), STEPS_BETWEEN_CLIENTS))
        prepare(engine)
    del rounds[0]
    tokens = sum(len(row.tokens) for row in rounds[0])
    each = [[row.per_token for row in rows] for rows in rounds]
    results["clients_total"] = measured(
        [tokens / (max(row.tokens[-1] for row in rows) - rows[0].came) for rows in rounds], "tokens/s"
    )
    results["clients_first_token"] = measured(
        [1000 * statistics.median(row.first for row in rows) for rows in rounds], "ms"
    )
    results["clients_per_token"] = measured([1000 * statistics.median(times) for times in each], "ms")
    results["clients_slowest"] = measured([1000 * max(times) for times in each], "ms")
    results["slowest_over_median"] = measured([max(times) / statistics.median(times) for times in each], "x")
    return {"clients": cfg.clients, "tokens": tokens, "steps_between": STEPS_BETWEEN_CLIENTS}


def weight_bytes(model: GPT) -> int:
    """Read in every step: all parameters but the tables, of which a few rows are looked up; the head's matrix even
    where it is one.
    """
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return sum(stored_bytes(p) for p in model.parameters() if id(p) not in tables or p is model.lm_head.weight)


def stored_bytes(x: Tensor) -> int:
    """Also of tensors that are made of others, such as torchao's integers with their scales."""
    if hasattr(x, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.nbytes


def cache_bytes(engine: Engine, context: int) -> int:
    """Of one row, what its next token sees behind `context` tokens."""
    cache = engine.cache
    return sum(
        min(context, ring) * math.prod(x.shape[2:]) * x.element_size()
        for tensors in (cache.k, cache.v)
        for x, ring in zip(tensors, cache.rings)
    )
