"""Recorded steps as a GPU makes them, with stand-ins for torch.cuda that take what the installed torch's own signatures
take.

The stand-in of a graph keeps the operators of a capture with the very tensors they were called on, and replays those:
what a capture froze stays frozen, as on a GPU."""

import inspect
import random
import threading
from contextlib import nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves

from nanolab.inference import recorded
from nanolab.inference.cache import KVCache
from nanolab.inference.engine import Engine, Request
from nanolab.inference.recorded import AFTER, Recorder
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
SMALL = dict(
    sequence_len=200, vocab_size=61, n_layer=2, n_head=4, n_embd=32, bos=60, window_size=7, window_pattern="SL"
)
CONFIGS = {
    "default": GPTConfig(**SMALL),
    "gqa-alibi-sink": GPTConfig(**SMALL, attention="gqa:2", positions="alibi", softmax="sink"),
}


def build(config: GPTConfig) -> GPT:
    torch.manual_seed(2)
    model = GPT(config).eval().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out


class Cuda:
    """Stand-ins for what record_cuda uses of torch.cuda, and a list of what they were asked for."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.captures: list[dict] = []
        self.replays = self.pools = 0
        names = ("CUDAGraph", "graph", "Stream", "stream", "current_stream", "device", "graph_pool_handle")
        cuda, real = self, {name: inspect.signature(getattr(torch.cuda, name)) for name in names}

        def checked(name: str, stand_in):
            def call(*args, **kwargs):
                given = real[name].bind(*args, **kwargs)
                given.apply_defaults()
                return stand_in(**given.arguments)

            patch.setattr(torch.cuda, name, call)

        class CUDAGraph:
            def __init__(self, keep_graph):
                self.calls = []

            def replay(self):
                cuda.replays += 1
                for function, args, kwargs, out in self.calls:
                    inputs = {
                        x.untyped_storage().data_ptr() for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)
                    }
                    for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs))):
                        if (
                            isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in inputs
                        ):  # neither a view nor written in place
                            old.copy_(new)

        class graph:
            def __init__(self, cuda_graph, pool, stream, capture_error_mode, **others):
                self.graph, self.operators = cuda_graph, Operators()
                asked = dict(pool=pool, stream=stream, mode=capture_error_mode)
                cuda.captures.append(
                    asked | dict(thread=threading.get_ident(), locked=recorded.RECORDING.locked(), device=cuda.device)
                )

            def __enter__(self):
                self.operators.__enter__()

            def __exit__(self, *error):
                self.operators.__exit__(*error)
                self.graph.calls = self.operators.calls

        class Stream:
            def __init__(self, device, priority, **others):
                self.device = device

            def wait_stream(self, stream):
                pass

        self.device = None

        class device:
            def __init__(self, device):
                self.index = device

            def __enter__(self):
                cuda.device = self.index

            def __exit__(self, *error):
                cuda.device = None

        def new_pool():
            self.pools += 1
            return self.pools

        checked("CUDAGraph", CUDAGraph)
        checked("graph", graph)
        checked("stream", lambda stream: nullcontext())
        checked("current_stream", lambda device: Stream(device, 0))
        checked("graph_pool_handle", new_pool)
        checked("Stream", Stream)
        checked("device", device)


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    return Cuda(monkeypatch)


def gpu_engine(model: GPT, device: str = "cpu", **arguments) -> Engine:
    """An engine that does on this machine what it does on a GPU."""
    engine = Engine(model, None, RUNTIME, graphs=True, **arguments)
    engine.recorder.cuda, engine.recorder.after, engine.recorder.device = True, 1, torch.device(device)
    return engine


def texts(engine: Engine, prompts: list[list[int]], tokens: int) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for prompt in prompts:
        engine.add(Request(tuple(prompt), tokens, 0.0, stop_ids=()))
        for _ in range(4):
            for new in engine.step():
                out.setdefault(new.row, []).append(new.token)
    while not engine.idle:
        for new in engine.step():
            out.setdefault(new.row, []).append(new.token)
    return out


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(60) for _ in range(n)] for n in (3, 20, 9)]


@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_replay_the_text_of_plain_steps(cuda, name):
    model = build(CONFIGS[name])
    plain = texts(Engine(model, None, RUNTIME, max_rows=2), prompts(5), 16)
    assert texts(gpu_engine(model, max_rows=2), prompts(5), 16) == plain
    assert len(cuda.captures) >= 2 and cuda.replays > 10


@pytest.mark.fault("core D4")
def test_two_engines_capture_each_on_its_own_device_under_one_lock(cuda):
    """In two threads: own stream, own pool for all of its graphs, thread-local, and no two captures at a time."""
    model = build(CONFIGS["default"])
    plain, found = [texts(Engine(model, None, RUNTIME, max_rows=2), prompts(seed), 16) for seed in (5, 6)], {}

    def work(i: int) -> None:
        found[i] = texts(gpu_engine(model, f"cuda:{i}", max_rows=2), prompts(5 + i), 16)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(i) for i in range(2)] == plain
    assert all(c["locked"] and c["mode"] == "thread_local" and c["stream"].device == c["device"] for c in cuda.captures)
    for i, thread in enumerate(threads):
        mine = [c for c in cuda.captures if c["stream"].device.index == i]
        assert (
            len(mine) >= 2
            and {c["thread"] for c in mine} == {thread.ident}
            and len({id(c["stream"]) for c in mine}) == 1
        )
    assert not {c["pool"] for c in cuda.captures if c["device"].index == 0} & {
        c["pool"] for c in cuda.captures if c["device"].index == 1
    }


def stores(cache: KVCache) -> list[StorageWeakRef]:
    return [StorageWeakRef(x.untyped_storage()) for x in (*cache.k, *cache.v)]


@pytest.mark.fault("core D4")
@pytest.mark.parametrize("grow", ["capacity", "rows", "other cache"])
@torch.inference_mode()
def test_a_cache_that_was_replaced_is_freed(cuda, grow):
    """By reference counts alone. When capacity grows only the last layer moves: the others are rings of 8."""
    model = build(CONFIGS["default"])
    recorder, cache = Recorder(model, RUNTIME.device, after=1), KVCache(model.config, 1, capacity=64)
    recorder.cuda = True
    model(torch.ones(1, 5, dtype=torch.int64), cache=cache)
    step = torch.ones(1, 1, dtype=torch.int64)
    for _ in range(4):
        recorder.step(cache, step)
    old, first_layer, pool = stores(cache), cache.k[0], cuda.captures[-1]["pool"]
    assert len(recorder.steps) == 1
    if grow == "capacity":
        cache.reserve(65)
        assert cache.k[0] is first_layer
    else:
        cache = KVCache(model.config, 1, capacity=64) if grow == "other cache" else cache
        cache.reserve(1, 2)
    del first_layer
    logits = recorder.step(cache, step)
    assert logits.shape == (1, 61) and not recorder.steps  # the graph reads memory that has gone
    assert [ref.expired() for ref in old] == ([False, True] if grow == "capacity" else [True, True]) * 2
    recorder.step(cache, step)
    # torch's allocator refuses a pool whose graphs have all gone
    assert len(recorder.steps) == 1 and cuda.captures[-1]["pool"] != pool


def test_replies_grow_past_what_was_recorded(cuda):
    """Graphs of the capacity before are not replayed, though layer 0 has not moved."""
    model = build(CONFIGS["default"])
    plain = texts(Engine(model, None, RUNTIME, max_rows=2), [[1, 2, 3]], 80)
    engine = gpu_engine(model, max_rows=2)
    assert texts(engine, [[1, 2, 3]], 80) == plain and len(cuda.captures) == 2 and len(engine.recorder.steps) == 1


def test_a_bucket_is_recorded_when_it_has_come_up_often_enough(cuda):
    model = build(CONFIGS["default"])
    engine = gpu_engine(model, max_rows=1)
    engine.recorder.after = AFTER
    texts(engine, [[1, 2, 3]], AFTER)
    assert not cuda.captures
    texts(engine, [[1, 2, 3]], 3)
    assert len(cuda.captures) == 1


@pytest.mark.gpu
def test_two_engines_in_two_threads_give_the_text_of_plain_steps():
    device = torch.device("cuda", 0)
    models = [build(c).to(device) for c in CONFIGS.values()]
    runtime, found = Runtime(device, torch.float32), {}
    plain = [texts(Engine(model, None, runtime, max_rows=2), prompts(i), 40) for i, model in enumerate(models)]

    def work(i: int) -> None:
        engine = Engine(models[i], None, runtime, max_rows=2, graphs=True)
        engine.recorder.after = 1
        found[i] = texts(engine, prompts(i), 40), engine.recorder.failed, len(engine.recorder.steps)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i][0] for i in range(2)] == plain and all(not failed and steps for _, failed, steps in found.values())
