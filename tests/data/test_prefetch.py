"""Prefetch: the same batches as without it, states of the batch last handed out, errors where they can be handled."""

import threading
import time
from typing import NamedTuple

import pytest
import torch

from nanolab.cli import UserError
from nanolab.data.packing import Batch, PackedBatches
from nanolab.data.prefetch import Prefetch
from nanolab.data.tokenizer import Tokenizer
from nanolab.model.gpt import GPT
from nanolab.records.models import read_json, runs_dir
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from scripts import base_train

TOKENIZER = Tokenizer.train([], 265)
CPU = Runtime(torch.device("cpu"), torch.float32)


class Numbers:
    """Document n says so; from `end` on reading fails."""

    name, n_documents = "numbers", 1000

    def __init__(self, end: int = 10**9) -> None:
        self.end = end

    def get(self, n: int) -> str:
        if n >= self.end:
            raise UserError(f"document {n} cannot be read")
        return f"document number {n}; " * (n % 13 + 1)


def packed(documents=None, rank: int = 0, world_size: int = 1) -> PackedBatches:
    return PackedBatches(
        [(documents or Numbers(), 1.0)],
        TOKENIZER,
        seq_len=32,
        device_batch_size=2,
        rows_per_step=16,
        rank=rank,
        world_size=world_size,
    )


def prefetch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "prefetch"]


@pytest.fixture
def loader():
    """A function that makes a Prefetch, closed at the end; no thread may outlive its loader."""
    made = []

    def make(batches=None, **options) -> Prefetch:
        made.append(Prefetch(batches or packed(), CPU, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert not prefetch_threads()


def test_batches_states_and_places_are_those_of_the_batch_last_handed_out(loader):
    plain, ahead = packed(), loader(depth=3)
    assert ahead.position.json() == plain.position.json()
    for i in range(20):
        a, b = plain.next(), ahead.next()
        assert (
            torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and a.n_targets == b.n_targets == 64
        )
        if i % 5 == 0:
            time.sleep(0.02)  # the thread runs ahead meanwhile
        assert ahead.position.json() == plain.position.json()
        assert ahead.position.where() == plain.position.where() and ahead.position.epoch == plain.position.epoch


def test_resume_drops_what_was_made_ahead(loader):
    first = loader()
    for _ in range(7):
        first.next()
    state = first.position.json()
    expected = [first.next().inputs for _ in range(5)]
    for again in (loader(), first):
        again.load_state_dict(state)
        assert again.position.json() == state
        assert all(torch.equal(again.next().inputs, x) for x in expected)


def test_batches_are_made_ahead_and_no_further(loader):
    batches = packed()
    ahead = loader(batches, depth=3)
    ahead.next()
    deadline = time.monotonic() + 10
    while batches.rows < 2 * 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert batches.rows == 2 * 5  # one handed out, three in the queue, one waiting for a place


def test_an_error_in_the_thread_is_raised_by_next_after_the_batches_before_it(loader):
    plain, ahead = packed(), loader(packed(Numbers(end=900)))
    with pytest.raises(UserError, match="document 9.. cannot be read"):
        for _ in range(10_000):
            assert torch.equal(ahead.next().inputs, plain.next().inputs)
    with pytest.raises(UserError, match="cannot be read"):
        ahead.next()
    assert plain.rows > 16


@pytest.mark.fault("core D6")
def test_a_step_finds_all_its_batches_made(tmp_path, monkeypatch):
    """A packer that is faster than the step: whatever it made while one step ran is enough for the next one, of 8
    micro-batches.
    """
    made, handed, ahead, steps = [0], [0], [], 6
    pack, take, forward = PackedBatches.next, Prefetch.next, GPT.forward

    def packed_one(self):
        made[0] += 1
        return pack(self)

    def taken(self):
        handed[0] += 1
        return take(self)

    def computed(self, *args, **kwargs):
        if torch.is_grad_enabled() and handed[0] // 8 > len(ahead):  # a step's first pass
            deadline = time.monotonic() + 2
            while (
                made[0] - handed[0] < 8 + 5 and time.monotonic() < deadline
            ):  # 12 in the queue, one that waits for a place
                time.sleep(0.001)
            ahead.append(made[0] - handed[0])
        return forward(self, *args, **kwargs)

    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("\n".join(f"document number {n}; " * (n % 13 + 1) for n in range(3000)))
    TOKENIZER.save(tmp_path / "tokenizer")
    for target, name, function in (
        (PackedBatches, "next", packed_one),
        (Prefetch, "next", taken),
        (GPT, "forward", computed),
    ):
        monkeypatch.setattr(target, name, function)
    cfg = BaseTrainConfig(
        run="fed",
        data_dir=str(tmp_path / "text"),
        tokenizer=str(tmp_path / "tokenizer"),
        depth=2,
        aspect_ratio=16,
        head_dim=16,
        max_seq_len=32,
        device_batch_size=2,
        total_batch_size=8 * 64,
        num_iterations=steps,
        eval_every=-1,
        sample_every=-1,
        device_type="cpu",
        log_every=-1,
    )
    base_train.run(cfg)
    assert len(ahead) == steps and min(ahead) >= 8, ahead
    assert max(ahead) <= 13, "what is made ahead is bounded"
    assert read_json(runs_dir() / "fed" / "result.json")["steps_waited"] == 1, (
        "the first one, before which nothing was made"
    )


class Gated:
    """Batches that are made while `open` is set, or once somebody waits for one."""

    position = None
    ready = Batch(torch.zeros(2, 32, dtype=torch.int64), torch.zeros(2, 32, dtype=torch.int64), 64, None)

    def __init__(self) -> None:
        self.open, self.loader, self.n = threading.Event(), None, 0
        self.open.set()

    def next(self) -> Batch:
        while not self.open.is_set() and self.loader.waits == 1:
            time.sleep(0.001)
        self.n += 1
        return self.ready


def test_waits_are_counted(loader):
    source = Gated()
    ahead = source.loader = loader(source, depth=3)
    ahead.next()
    started = ahead.waits  # 1, but for a thread that is faster than its caller
    while source.n < 1 + 3 + 1:  # one handed out, three in the queue, one that waits for a place
        time.sleep(0.001)
    source.open.clear()
    for _ in range(3):
        ahead.next()
    assert ahead.waits == started <= 1
    for _ in range(3):  # one that waited for a place, one that may have been begun
        ahead.next()
    assert ahead.waits > started


class FakeGPUs:
    """What torch.cuda does of devices and streams, without any: each thread has a device, 0 at first, on which a call
    creates a context.
    """

    class Stream(NamedTuple):
        device: torch.device

        def record_event(self) -> str:
            return "event"

        def wait_event(self, event: str) -> None: ...

    def __init__(self, monkeypatch) -> None:
        self.now, self.contexts = threading.local(), []
        cuda = {
            "set_device": self.set_device,
            "Stream": self.Stream,
            "current_stream": self.current_stream,
            "set_stream": lambda stream: self.set_device(stream.device),
            "_get_device_index": lambda device, optional=False: self.current(),
            "_exchange_device": self.exchange,
            "_maybe_exchange_device": self.exchange,
        }
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)
        for name in ("pin_memory", "to", "record_stream"):
            monkeypatch.setattr(torch.Tensor, name, lambda tensor, *args, **kwargs: tensor)

    def current(self) -> int:
        return getattr(self.now, "device", 0)

    def set_device(self, device) -> None:
        self.now.device = device if isinstance(device, int) else device.index
        self.contexts.append((threading.current_thread().name, self.now.device))

    def exchange(self, device: int) -> int:
        before = self.current()
        self.set_device(device)
        return before

    def current_stream(self, device=None) -> "FakeGPUs.Stream":
        return self.Stream(torch.device("cuda", self.current()) if device is None else device)


@pytest.mark.fault("core D7")
def test_the_thread_stays_on_the_device_of_its_rank(monkeypatch):
    """torch's own context of streams, on stand-ins for what it calls."""
    gpus = FakeGPUs(monkeypatch)
    ahead = Prefetch(
        packed(), Runtime(torch.device("cuda", 3), torch.bfloat16, rank=3, local_rank=3, world_size=4, backend="nccl")
    )
    for _ in range(6):
        ahead.next()
    ahead.close()
    assert {device for thread, device in gpus.contexts if thread == "prefetch"} == {3}


def test_close_ends_the_thread(loader):
    ahead = loader()
    ahead.next()
    assert len(prefetch_threads()) == 1
    ahead.close()
    assert not prefetch_threads()
    ahead.close()


def merged_state(runtime: Runtime, steps: int) -> tuple[dict, list[torch.Tensor]]:
    ahead = Prefetch(packed(rank=runtime.rank, world_size=runtime.world_size), runtime)
    inputs = [ahead.next().inputs for _ in range(steps)]
    state = ahead.position.json(runtime)
    ahead.close()
    return state, inputs


def test_ranks_gather_one_state(run_ranks):
    (state, inputs), (other, others) = run_ranks(merged_state, 2, 4)
    alone = packed()
    rows = torch.cat([alone.next().inputs for _ in range(8)])
    assert state == other == alone.position.json()
    assert torch.equal(torch.cat(inputs), rows[0::2]) and torch.equal(torch.cat(others), rows[1::2])


@pytest.mark.gpu
def test_batches_on_a_gpu_are_the_same():
    """Copies run beside the computation; none may be overwritten or read too early."""
    device = torch.device("cuda", 0)
    plain, ahead = packed(), Prefetch(packed(), Runtime(device, torch.bfloat16))
    work = torch.randn(4096, 4096, device=device)
    kept = []
    for _ in range(200):
        batch = ahead.next()
        work = torch.tanh(work @ work)  # keeps the device behind the host
        kept.append((batch.inputs * 1, batch.targets * 1))
    for inputs, targets in kept:
        expected = plain.next()
        assert inputs.device == device
        assert torch.equal(inputs.cpu(), expected.inputs) and torch.equal(targets.cpu(), expected.targets)
    assert ahead.position.json() == plain.position.json()
    ahead.close()
