"""Prefetch: the same batches as without it, states of the batch last handed out, errors where they can be handled."""

import threading
import time

import pytest
import torch

from nanolab.config import UserError
from nanolab.data.loader import Prefetch
from nanolab.data.packing import PackedBatches
from nanolab.data.tokenizer import Tokenizer
from nanolab.runtime import Runtime

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
        [(documents or Numbers(), 1.0)], TOKENIZER, seq_len=32, device_batch_size=2, rows_per_step=16, rank=rank, world_size=world_size
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
    assert ahead.state_dict() == plain.state_dict()
    for i in range(20):
        a, b = plain.next(), ahead.next()
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and a.n_targets == b.n_targets == 64
        if i % 5 == 0:
            time.sleep(0.02)  # the thread runs ahead meanwhile
        assert ahead.state_dict() == plain.state_dict()
        assert ahead.where() == plain.where() and ahead.epoch == plain.epoch


def test_resume_drops_what_was_made_ahead(loader):
    first = loader()
    for _ in range(7):
        first.next()
    state = first.state_dict()
    expected = [first.next().inputs for _ in range(5)]
    for again in (loader(), first):
        again.load_state_dict(state)
        assert again.state_dict() == state
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
    state = ahead.state_dict()
    ahead.close()
    return state, inputs


def test_ranks_gather_one_state(run_ranks):
    (state, inputs), (other, others) = run_ranks(merged_state, 2, 4)
    alone = packed()
    rows = torch.cat([alone.next().inputs for _ in range(8)])
    assert state == other == alone.state_dict()
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
    assert ahead.state_dict() == plain.state_dict()
    ahead.close()
