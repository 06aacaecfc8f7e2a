"""KVCache against plain Python lists of what was stored, and the model through it against the model without it."""

import pytest
import torch

from nanolab.cli import UserError
from nanolab.inference.cache import KVCache
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT

# S is 128
CONFIG = GPTConfig(
    sequence_len=192, vocab_size=50, n_layer=3, n_head=4, attention="gqa:2", n_embd=32, window_pattern="SL"
)


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random in every parameter: the usual start has zero projections, through which no attention would show."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.4)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def through_cache(model: GPT, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Logits of ids (B, T) read in chunks that end at `cuts` and at T."""
    cache = KVCache(CONFIG, len(ids))
    return torch.cat([model(chunk, cache=cache) for chunk in ids.tensor_split(cuts, dim=1)], dim=1)


@pytest.mark.parametrize(
    "cuts", [[], [1], [100], [3, 4, 130, 131], list(range(1, 160))], ids=["whole", "one", "two", "uneven", "by-token"]
)
def test_reading_in_any_chunks_equals_one_forward(model, cuts):
    ids = tokens(2, 160)
    with torch.no_grad():
        whole = model(ids)
    torch.testing.assert_close(through_cache(model, ids, cuts), whole, atol=2e-4, rtol=0)


def test_a_single_token_can_be_read_first(model):
    ids = tokens(1, 1)
    with torch.no_grad():
        torch.testing.assert_close(through_cache(model, ids, []), model(ids), atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_of_different_lengths_continue_as_each_alone(model):
    rows = [tokens(1, n) for n in (5, 140, 17)]
    more = tokens(3, 4)
    cache = KVCache(CONFIG, 3, capacity=8)
    for r, ids in enumerate(rows):
        alone = KVCache(CONFIG, 1)
        model(ids, cache=alone)
        cache.put([r], alone, [0])
    together = torch.cat([model(more[:, :3], cache=cache), model(more[:, 3:], cache=cache)], dim=1)
    assert cache.lengths == cache.pos.tolist() == [9, 144, 21]
    for r, ids in enumerate(rows):
        whole = model(torch.cat((ids, more[r : r + 1]), dim=1))[:, ids.size(1) :]
        torch.testing.assert_close(together[r : r + 1], whole, atol=2e-4, rtol=0)


@torch.no_grad()
def test_rows_of_different_lengths_can_be_copied_together(model):
    prompts, more = [tokens(1, 30), tokens(1, 9)], tokens(3, 2)
    ragged, cache = KVCache(CONFIG, 2), KVCache(CONFIG, 3)
    for r, ids in enumerate(prompts):
        alone = KVCache(CONFIG, 1)
        model(ids, cache=alone)
        ragged.put([r], alone, [0])
    cache.put([2, 0, 1], ragged, [1, 0, 1])
    assert cache.lengths == cache.pos.tolist() == [30, 9, 9]
    logits = model(more, cache=cache)
    for r, ids in enumerate([prompts[0], prompts[1], prompts[1]]):
        torch.testing.assert_close(
            logits[r : r + 1], model(torch.cat((ids, more[r : r + 1]), dim=1))[:, -2:], atol=2e-4, rtol=0
        )


def test_unused_slots_are_zero_after_growth():
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        cache = KVCache(CONFIG, 2, capacity=4)
        cache.append(0, *random_kv(2, 9))
        cache.advance(9)
        cache.append(0, *random_kv(2, 1))
        assert cache.capacity == 18 and all((t[:, 10:] == 0).all() for t in cache.k + cache.v)
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
def test_selected_rows_continue_as_before(model):
    cache, prompt, more = KVCache(CONFIG, 4), tokens(4, 20), tokens(3, 1)
    model(prompt, cache=cache)
    cache.select([3, 0, 3])
    expected = model(torch.cat((prompt[[3, 0, 3]], more), dim=1))[:, -1:]
    torch.testing.assert_close(model(more, cache=cache), expected, atol=2e-4, rtol=0)


def random_kv(rows: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, T, 2, 8), torch.randn(rows, T, 2, 8)


def test_it_holds_what_was_stored_and_grows_by_doubling():
    cache, stored, capacities = KVCache(CONFIG, 2, capacity=4), [], []
    for T in (3, 1, 1, 20, 1, 60, 100):
        per_layer = [random_kv(2, T) for _ in range(CONFIG.n_layer)]
        stored.append(per_layer)
        for layer, (k, v) in enumerate(per_layer):
            k_all, v_all = cache.append(layer, k, v)
            torch.testing.assert_close(k_all, torch.cat([step[layer][0] for step in stored], dim=1), atol=0, rtol=0)
            torch.testing.assert_close(v_all, torch.cat([step[layer][1] for step in stored], dim=1), atol=0, rtol=0)
        cache.advance(T)
        capacities.append(cache.capacity)
    assert capacities == [4, 4, 8, 25, 50, 100, 192]


@pytest.mark.parametrize("limit", [0, 30])
def test_writing_past_the_limit_is_an_error_and_changes_nothing(limit):
    cache, room = KVCache(CONFIG, 2, limit=limit), limit or CONFIG.sequence_len
    cache.append(0, *random_kv(2, room - 1))
    cache.advance(room - 1)
    before = cache.k[0].clone()
    with pytest.raises(UserError, match=f"token {room + 1} does not fit a cache of {room} tokens"):
        cache.append(0, *random_kv(2, 2))
    assert torch.equal(cache.k[0], before) and cache.lengths == [room - 1] * 2
    cache.append(0, *random_kv(2, 1))


def test_ragged_rows_past_the_limit_are_an_error_too():
    cache = KVCache(CONFIG, 2, limit=10)
    full = KVCache(CONFIG, 1, limit=10)
    full.append(0, *random_kv(1, 10))
    full.advance(10)
    cache.put([1], full, [0])
    with pytest.raises(UserError, match="token 11"):
        cache.append(0, *random_kv(2, 1))


RING = GPTConfig(sequence_len=64, vocab_size=50, n_layer=3, n_head=2, n_embd=32, window_pattern="SSL", window_size=6)


def test_a_windowed_layer_keeps_its_window_and_one():
    cache = KVCache(RING, 2)
    cache.reserve(64)
    assert [t.shape[1] for t in cache.k] == [t.shape[1] for t in cache.v] == [7, 7, 64]


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_rings_hold_the_last_positions_of_every_row_whatever_the_chunks(seed):
    """The stored vector of position p is p + 1000 row: what `append` returns is where `positions` says, and all that
    may be seen is there.
    """
    rng = torch.Generator().manual_seed(seed)
    cache, lengths = KVCache(RING, 3, capacity=4), [0, 0, 0]
    for row in range(3):  # rows of different lengths
        alone, n = KVCache(RING, 1, capacity=1), int(torch.randint(0, 20, (1,), generator=rng))
        for part in torch.arange(n).split(5):
            stored = (part + 1000.0 * row)[None, :, None, None].expand(1, -1, 2, 16)
            for layer in range(3):
                alone.append(layer, stored, stored)
            alone.advance(len(part))
        cache.put([row], alone, [0])
        lengths[row] = n
    for T in (1, 4, 1, 1, 9, 1, 2):
        new = torch.tensor(lengths)[:, None] + torch.arange(T)
        stored = (new + 1000.0 * torch.arange(3)[:, None])[:, :, None, None].expand(-1, -1, 2, 16)
        for layer, window in enumerate((6, 6, 64)):
            k, v = cache.append(layer, stored, stored)
            positions, _ = cache.positions(layer, T)
            positions = positions.expand(3, -1)
            assert k.shape == v.shape == (3, positions.size(1), 2, 16) and torch.equal(k, v)
            for row in range(3):
                for q in new[row].tolist():
                    seen = (positions[row] <= q) & (positions[row] >= q - window)
                    assert sorted(k[row, seen, 0, 0].tolist()) == [
                        p + 1000 * row for p in range(max(0, q - window), q + 1)
                    ]
        cache.advance(T)
        lengths = [n + T for n in lengths]
