"""Whole decode steps, recorded once and replayed: a CUDA graph on GPUs, a list of operators that needs no Python on
CPUs.

A step of the model on a small batch is bound by the cost of starting its hundreds of operators. Its shapes repeat, so
they are fixed per bucket of rows and slots, positions are read from tensors, and what then runs is recorded when a
bucket has come up `after` times. On CPUs this is done while the engine is idle (`prepare`), and for batches of few
rows: in larger ones the work itself counts, and empty slots are work. A recording captures the addresses of the
weights, so they must not move or be reallocated (prepare.py).
`Engine.generate`, which training uses too, records nothing. Dims: N rows of a bucket, n of them in use, S slots."""

import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nanolab.inference.cache import KVCache, ring_positions
from nanolab.model.gpt import GPT

log = logging.getLogger(__name__)

LEAST_SLOTS = 64  # of a bucket
AFTER = 24  # steps that a bucket is run plainly first: a recording pays only where many more will come
ROWS_ON_CPU = 4
RECORDING = threading.Lock()  # the tracer and CUDA's captures are one at a time for all replicas
# (ids (N, 1), pos (N,), what was left, keys, values) -> logits (N, V), what is left
Step = Callable[..., tuple[Tensor, ...]]


class FixedCache:
    """What the model needs of a KVCache to decode one token, with shapes that do not depend on how long the rows
    are.
    """

    def __init__(
        self, rings: list[int], pos: Tensor, left: dict[str, Tensor], k: tuple[Tensor, ...], v: tuple[Tensor, ...]
    ):
        self.rings, self.pos, self.carry, self.k, self.v = rings, pos, left, k, v
        self.slot = {ring: pos % ring for ring in set(rings)}

    def append(self, layer: int, k_N1GD: Tensor, v_N1GD: Tensor) -> tuple[Tensor, Tensor]:
        slot, rows = self.slot[self.rings[layer]], int(self.pos.size(0))
        for old, new in ((self.k[layer], k_N1GD), (self.v[layer], v_N1GD)):
            if rows == 1:
                old.index_copy_(1, slot, new.to(old.dtype))
            else:
                old.index_put_((torch.arange(rows, device=old.device), slot), new[:, 0].to(old.dtype))
        return self.k[layer], self.v[layer]

    def positions(self, layer: int, T: int) -> tuple[Tensor, bool]:
        slots, ring = int(self.k[layer].size(1)), self.rings[layer]
        if slots < ring:  # no position has come round: empty slots are those after the token
            return torch.arange(slots, device=self.pos.device)[None], False
        return ring_positions(self.pos, slots, ring), False

    def advance(self, T: int) -> None:
        """The KVCache is advanced by who replays."""


def fixed_step(model: GPT, rings: list[int], names: list[str]) -> Step:
    """The model's decode step as a function of tensors alone. names: of what passes leave for the next one."""

    def step(ids: Tensor, pos: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        left, kv = dict(zip(names, rest)), rest[len(names) :]
        cache = FixedCache(rings, pos, left, kv[: len(rings)], kv[len(rings) :])
        logits = model(ids, cache=cache, last_only=True)[:, -1]
        return logits, *(cache.carry[name] for name in names)

    return step


def record_cpu(step: Step, inputs: list[Tensor]) -> Step:
    """The operators of one call, replayed by TorchScript's interpreter; for any inputs of these shapes and strides."""
    with RECORDING, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(step, tuple(inputs), check_trace=False)
    for warning in caught:
        text = str(warning.message)
        if (
            not issubclass(warning.category, torch.jit.TracerWarning) and "is deprecated" not in text
        ):  # shapes are fixed here; TorchScript is in maintenance
            warn(text)
    return traced


@cache
def warn(text: str) -> None:
    """Once; Python itself shows a DeprecationWarning to nobody."""
    log.warning("recording decode steps: %s", text)


def record_cuda(step: Step, inputs: list[Tensor], stream: torch.cuda.Stream, pool: Any) -> Step:
    """A CUDA graph over these very keys and values; ids, positions and what was left are copied to it.

    stream: the engine's own, on its device; torch's default one is of the device that came first. pool: memory of all
    graphs of the engine, which replays one at a time and has read its outputs before the next: another graph may
    overwrite them. Engines run side by side, so each has its own; and while one captures, others go on, which
    "thread_local" allows."""
    small = [x.clone() for x in inputs if x.dim() < 4]
    inputs = [*small, *inputs[len(small) :]]
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries set themselves up in their first calls
            step(*inputs)
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with (
        RECORDING,
        torch.cuda.device(stream.device),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        outputs = step(*inputs)

    def replay(*new: Tensor) -> tuple[Tensor, ...]:
        for mine, x in zip(small, new):
            mine.copy_(x)
        graph.replay()
        return outputs

    return replay


class Recorder:
    """Decode steps over one engine's cache. after: uses of a bucket before it is recorded.

    It only makes steps faster: when recording or replaying fails it says so once, and steps are run plainly from then
    on."""

    def __init__(self, model: GPT, device: torch.device, after: int = AFTER):
        self.model, self.device, self.after = model, device, after
        # a recording is of the cache where it lies, rows are padded to a power of two, at once
        self.cuda = device.type == "cuda"
        self.uses: Counter[tuple] = Counter()
        self.steps: dict[tuple, Step] = {}
        self.wanted: list[tuple[int, int]] = []  # on CPUs: buckets to record when there is time
        self.memory: object = None  # KVCache.memory: another one means that the cache has moved
        self.stream: torch.cuda.Stream | None = None
        # of the graphs in `steps`; when the last one goes it is gone, and cannot be captured into again
        self.pool: Any = None
        self.failed = False

    def release(self) -> None:
        """Let go of the cache, and of what was recorded over it."""
        self.memory = None
        if self.cuda or self.failed:
            self.steps, self.uses, self.pool = {}, Counter(), None

    def _fail(self, error: Exception) -> None:
        self.failed = True
        self.wanted.clear()
        self.release()
        log.warning(
            "decode steps are not recorded any more, and slower for it: %s: %s",
            type(error).__name__,
            str(error).strip().split("\n")[0][:300],
        )

    def step(self, cache: KVCache, ids: Tensor) -> Tensor:
        """Logits (n, V) after ids (n, 1), the new tokens of the cache's rows; the cache holds them afterwards."""
        n, longest = len(ids), max(cache.lengths) + 1
        slots = max(LEAST_SLOTS, 1 << (longest - 1).bit_length())
        if not self.failed and (self.cuda or (n <= ROWS_ON_CPU and self._is_recorded((n, slots)))):
            try:
                return self._step(cache, ids, slots)
            except Exception as error:  # out of memory too: what was recorded is let go
                self._fail(error)
        return self.model(ids, cache=cache, last_only=True)[:, -1]

    def _step(self, cache: KVCache, ids: Tensor, slots: int) -> Tensor:
        n = len(ids)
        rows = 1 << (n - 1).bit_length() if self.cuda else n  # kernels on CPUs would feel the rows that are not there
        cache.reserve(min(slots, cache.limit), rows)
        if cache.memory is not self.memory:
            self.release()
            self.memory = cache.memory
        names = sorted(cache.carry)
        small = [ids, cache.pos, *(cache.carry[name] for name in names)]
        if rows > n:
            small = [torch.cat((x, x.new_zeros(rows - n, *x.shape[1:]))) for x in small]
        inputs, key = [*small, *cache.parts(rows, slots)], (rows, slots)
        step = self.steps.get(key)
        if step is None:  # on a GPU
            step = fixed_step(self.model, cache.rings, names)
            self.uses[key] += 1
            if self.uses[key] > self.after:
                self.stream = self.stream or torch.cuda.Stream(self.device)
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                step = self.steps[key] = record_cuda(step, inputs, self.stream, self.pool)
        logits, *left = step(*inputs)
        cache.carry = {name: x[:n].clone() if self.cuda else x for name, x in zip(names, left)}
        cache.advance(1)
        return logits[:n]

    def _is_recorded(self, bucket: tuple[int, int]) -> bool:
        self.uses[bucket] += 1
        if self.uses[bucket] == self.after:
            self.wanted.append(bucket)
        return bucket in self.steps

    def prepare(self, cache: KVCache) -> bool:
        """On CPUs: record one bucket that has come up often enough, over a cache like this one; whether there was
        one.
        """
        if not self.wanted:
            return False
        try:
            self._record(self.wanted.pop(), cache)
        except Exception as error:
            self._fail(error)
        return True

    def _record(self, bucket: tuple[int, int], cache: KVCache) -> None:
        rows, slots = bucket
        mine = KVCache(self.model.config, rows, capacity=slots, limit=cache.limit, dtype=cache.dtype)
        ids = torch.zeros(rows, 1, dtype=torch.int64)
        self.model(ids, cache=mine)  # so that there is what a pass leaves
        names = sorted(mine.carry)
        inputs = [ids, mine.pos, *(mine.carry[name] for name in names), *mine.k, *mine.v]
        self.steps[bucket] = record_cpu(fixed_step(self.model, mine.rings, names), inputs)
        for _ in range(3):  # the interpreter sets itself up in its first calls
            self.steps[bucket](*inputs)
