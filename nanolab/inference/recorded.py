"""Whole decode steps, recorded once and replayed: a CUDA graph on GPUs, a list of operators that needs no Python on CPUs.

A step of the model on a small batch is bound by the cost of starting its hundreds of operators. Its shapes repeat, so they are
fixed per bucket of rows and slots, positions are read from tensors, and what then runs is recorded when a bucket has come up
`after` times. On CPUs only batches of few rows are: in larger ones the work itself counts, and slots that hold nothing are work. A recording reads the weights where they lie; so it belongs to a model whose weights stay there and, being
cast, do not change (served.py). `Engine.generate`, which training uses too, records nothing.
Dims: N rows of a bucket, n of them in use, S slots.
"""

import math
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from nanolab.inference.cache import KVCache, ring_positions
from nanolab.model.gpt import GPT

LEAST_SLOTS = 64  # of a bucket
AFTER = 24  # steps that a bucket is run plainly first: a recording (30 ms on a CPU) pays only where many more will come
ROWS_ON_CPU = 4
RECORDING = threading.Lock()  # the tracer is one for all replicas
Step = Callable[..., tuple[Tensor, ...]]  # (ids (N, 1), pos (N,), what was left, keys, values) -> logits (N, V), what is left


class FixedCache:
    """What the model needs of a KVCache to decode one token, with shapes that do not depend on how long the rows are."""

    def __init__(self, rings: list[int], pos: Tensor, left: dict[str, Tensor], k: tuple[Tensor, ...], v: tuple[Tensor, ...]):
        self.rings, self.pos, self.left, self.k, self.v = rings, pos, left, k, v

    def append(self, layer: int, k_N1GD: Tensor, v_N1GD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.k[layer], self.v[layer]
        place = torch.arange(len(k), device=k.device), self.pos % self.rings[layer]
        k.index_put_(place, k_N1GD[:, 0].to(k.dtype)), v.index_put_(place, v_N1GD[:, 0].to(v.dtype))
        return k, v

    def positions(self, layer: int, T: int) -> tuple[Tensor, bool]:
        return ring_positions(self.pos, self.k[layer].size(1), self.rings[layer]), False

    def advance(self, T: int) -> None:
        """The KVCache is advanced by who replays."""


def fixed_step(model: GPT, rings: list[int], names: list[str]) -> Step:
    """The model's decode step as a function of tensors alone. names: of what passes leave for the next one."""

    def step(ids: Tensor, pos: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        left, kv = dict(zip(names, rest)), rest[len(names) :]
        cache = FixedCache(rings, pos, left, kv[: len(rings)], kv[len(rings) :])
        logits = model(ids, cache=cache, last_only=True)[:, -1]
        return logits, *(cache.left[name] for name in names)

    return step


def record_cpu(step: Step, inputs: list[Tensor]) -> Step:
    """The operators of one call, replayed by TorchScript's interpreter; for any inputs of these shapes and strides."""
    with RECORDING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is in maintenance; a tracer's warnings are about shapes, which are fixed here
        return torch.jit.trace(step, tuple(inputs), check_trace=False)


def record_cuda(step: Step, inputs: list[Tensor]) -> Step:
    """A CUDA graph over these very keys and values; ids, positions and what was left are copied to it."""
    small = [x.clone() for x in inputs if x.dim() < 4]
    inputs = [*small, *inputs[len(small) :]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries set themselves up in their first calls
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*inputs)

    def replay(*new: Tensor) -> tuple[Tensor, ...]:
        for mine, x in zip(small, new):
            mine.copy_(x)
        graph.replay()
        return outputs

    return replay


class Recorder:
    """Decode steps over one engine's cache. after: uses of a bucket before it is recorded."""

    def __init__(self, model: GPT, device: torch.device, after: int = AFTER):
        self.model, self.after = model, after
        cuda = device.type == "cuda"
        self.record = record_cuda if cuda else record_cpu
        self.most_rows = math.inf if cuda else ROWS_ON_CPU
        self.in_place = cuda  # a recording is of the cache where it lies
        self.padded = cuda  # to a power of two; kernels on CPUs would feel the rows that are not there
        self.uses: dict[tuple, int] = {}
        self.steps: dict[tuple, Step] = {}
        self.memory: Tensor | None = None  # the cache's first tensor: another one means that it has moved
        self.views: dict[tuple, list[Tensor]] = {}

    def step(self, cache: KVCache, ids: Tensor) -> Tensor:
        """Logits (n, V) behind ids (n, 1), the new tokens of the cache's rows; the cache holds them afterwards."""
        n, longest = len(ids), max(cache.lengths) + 1
        if n > self.most_rows:
            return self.model(ids, cache=cache, last_only=True)[:, -1]
        rows = 1 << (n - 1).bit_length() if self.padded else n
        slots = max(LEAST_SLOTS, 1 << (longest - 1).bit_length())
        cache.reserve(min(slots, cache.limit), rows)
        if cache.k[0] is not self.memory:
            self.memory, self.views = cache.k[0], {}
            if self.in_place:
                self.steps, self.uses = {}, {}
        names = sorted(cache.left)
        view = rows, slots, cache.capacity
        if view not in self.views:
            self.views[view] = [x[:rows, :slots] for x in (*cache.k, *cache.v)]
        key = view if self.in_place else (rows, slots)
        small = [ids, cache.pos, *(cache.left[name] for name in names)]
        if rows > n:
            small = [torch.cat((x, x.new_zeros(rows - n, *x.shape[1:]))) for x in small]
        inputs = [*small, *self.views[view]]
        self.uses[key] = self.uses.get(key, 0) + 1
        if self.uses[key] > self.after and key not in self.steps:
            self.steps[key] = self.record(fixed_step(self.model, cache.rings, names), inputs)
        logits, *left = (self.steps.get(key) or fixed_step(self.model, cache.rings, names))(*inputs)
        cache.left = {name: x[:n].clone() if self.padded else x for name, x in zip(names, left)}
        cache.advance(1)
        return logits[:n]
