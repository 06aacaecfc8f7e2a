"""Packing: every token once, exact state, the same rows on any number of ranks. Oracles: the texts, and a slow best fit."""

import json
import random
from collections import defaultdict
from functools import lru_cache
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolab.config import UserError
from nanolab.data.packing import POOL, Packer, PackedBatches, merge_states, validation_rows
from nanolab.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train([], 265)  # one token per byte, so that lengths are known
BOS = TOKENIZER.bos


class ListDocuments:
    """Texts in another order every epoch."""

    def __init__(self, texts: list[str | None], name: str = "list") -> None:
        self.texts, self.name, self.n_documents = texts, name, len(texts)
        self.order = lru_cache(100)(lambda epoch: random.Random(epoch).sample(range(len(texts)), len(texts)))

    def get(self, n: int) -> str | None:
        epoch, i = divmod(n, self.n_documents)
        return self.texts[self.order(epoch)[i]]


def make(texts, *, T=16, B=1, rows_per_step=4, rank=0, world_size=1) -> PackedBatches:
    sources = texts if isinstance(texts[0], tuple) else [(ListDocuments(texts), 1.0)]
    return PackedBatches(
        sources, TOKENIZER, seq_len=T, device_batch_size=B, rows_per_step=rows_per_step, rank=rank, world_size=world_size, threads=1
    )


def rows_of(batch) -> np.ndarray:
    """(B, T+1) from inputs and targets, which must overlap."""
    inputs, targets = batch.inputs.numpy(), batch.targets.numpy()
    assert (inputs[:, 1:] == targets[:, :-1]).all() and batch.n_targets == targets.size
    return np.concatenate([inputs, targets[:, -1:]], axis=1)


def pieces(row: np.ndarray) -> list[list[int]]:
    """The text tokens after each bos. The row must start with one."""
    assert row[0] == BOS
    out: list[list[int]] = []
    for t in row.tolist():
        out.append([]) if t == BOS else out[-1].append(t)
    return out


def words(n: int, seed: int = 0, longest: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [f"{i}:" + "x" * rng.randrange(longest) for i in range(n)]


texts_of = st.lists(st.one_of(st.none(), st.text(alphabet="abcé", max_size=90)), min_size=1, max_size=40).filter(any)


@settings(max_examples=60, deadline=None)
@given(texts=texts_of, T=st.integers(6, 40), rows_per_step=st.sampled_from([1, 2, 3, 8, 16]))
def test_every_text_token_appears_exactly_once_an_epoch(texts, T, rows_per_step):
    documents = ListDocuments(texts)
    batches = make([(documents, 1.0)], T=T, rows_per_step=rows_per_step)
    seen: dict[int, list[int]] = defaultdict(list)
    expected = {n: list((documents.get(n) or "").encode()) for n in range(2 * len(texts))}
    for _ in range(20_000):
        (row,) = rows_of(batches.next())
        assert len(row) == T + 1 and row.min() >= 0
        (labels,) = batches.snapshot().labels
        found = pieces(row)
        if len(found) == len(labels) + 1:  # a last place that has room for bos only
            assert found.pop() == []
        assert len(found) == len(labels)
        for (_, n), piece in zip(labels, found):
            assert piece
            seen[n] += piece
        if all(len(seen[n]) >= len(tokens) for n, tokens in expected.items()):
            break
    assert {n: seen[n] for n in expected} == expected
    assert batches.epoch >= 1.9


def slow_rows(documents: list[list[int]], T: int, n: int) -> list[list[int]]:
    """The rule of the packer, word for word, on plain lists."""
    waiting, pool, rows = iter(documents), [], []  # pool: [text tokens], oldest first

    def refill() -> None:
        while len(pool) < POOL and sum(map(len, pool)) < POOL * (T + 1):
            pool.append(next(waiting))

    for _ in range(n):
        refill()
        row, piece = [], pool[0]
        while True:
            pool.remove(piece) if pool[0] is not piece else pool.pop(0)
            room = T + 1 - len(row)
            row += ([BOS] + piece)[:room]
            if len(piece) + 1 > room:
                pool.append(piece[room - 1 :])
                break
            refill()
            room -= len(piece) + 1
            if room <= 1:
                row += [BOS] * room
                break
            fitting = [p for p in pool if len(p) + 1 <= room]
            longest = max(map(len, fitting)) if fitting else None
            shortest = min(map(len, pool))
            # of equals the newest that fits, the oldest to be cut
            piece = [p for p in fitting if len(p) == longest][-1] if fitting else [p for p in pool if len(p) == shortest][0]
        rows.append(row)
    return rows


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 9999), longest=st.integers(1, 200), T=st.integers(1, 60))
def test_packer_equals_a_slow_best_fit(seed, longest, T):
    rng = random.Random(seed)
    lengths = [rng.randint(1, longest) for _ in range(30 * (T + 2))]
    # distinct token values, so that `remove` in the oracle finds the piece that is meant
    docs = [[1000 * (i + 1) + j for j in range(n)] for i, n in enumerate(lengths)]
    supply = iter([(i, np.array([BOS, *doc])) for i, doc in enumerate(docs)])
    packer = Packer(BOS, supply.__next__)
    out = np.empty((25, T + 1), dtype=np.int64)
    for row in out:
        packer.fill(row)
    assert out.tolist() == slow_rows(docs, T, 25)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), longest=st.integers(1, 400), T=st.sampled_from([8, 32, 100]), before=st.integers(0, 60))
def test_nothing_waits_longer_than_the_pool_has_places(seed, longest, T, before):
    rng = random.Random(seed)
    supply = ((i, np.zeros(rng.randint(1, longest) + 1, dtype=np.int32)) for i in count())
    packer = Packer(BOS, supply.__next__)
    row = np.empty(T + 1, dtype=np.int64)
    for _ in range(before + 1):
        packer.fill(row)
    waiting = {label for label, _, _ in packer.pool()}
    used = {label for _ in range(POOL) for label in packer.fill(row)}
    assert waiting <= used


def global_rows(texts, world_size: int, n: int, *, B: int = 1, state=None, rows_per_step=16, T=24) -> tuple[list[list[int]], dict]:
    """The first n rows of all ranks together, in global order, and the merged state after them, through JSON."""
    ranks = [make(texts, T=T, B=B, rows_per_step=rows_per_step, rank=r, world_size=world_size) for r in range(world_size)]
    if state:
        for rank in ranks:
            rank.load_state_dict(state)
    out = []
    for _ in range(n // (B * world_size)):
        parts = [rows_of(rank.next()) for rank in ranks]
        out += [parts[g % world_size][g // world_size].tolist() for g in range(B * world_size)]
    return out, json.loads(json.dumps(merge_states([rank.local_state(rank.snapshot()) for rank in ranks])))


def test_ranks_see_the_same_global_batches():
    texts = words(300)
    one, state = global_rows(texts, 1, 96)
    for world_size, B in ((2, 1), (4, 4), (8, 2), (1, 16)):
        rows, other = global_rows(texts, world_size, 96, B=B)
        assert rows == one and other == state


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(0, 12), before=st.sampled_from([1, 2, 4, 8]), after=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 99))
def test_resume_continues_with_the_very_next_row(steps, before, after, seed):
    texts = words(150, seed, longest=80) + ["y" * 2000, None, ""]
    mixture = [(ListDocuments(texts, "a"), 0.7), (ListDocuments(words(40, seed + 1), "b"), 0.3)]
    whole, end = global_rows(mixture, 1, 16 * (steps + 3))
    head, state = global_rows(mixture, before, 16 * steps)
    tail, again = global_rows(mixture, after, 16 * 3, state=state)
    assert head + tail == whole and again == end


def test_state_is_a_few_kilobytes():
    _, state = global_rows(words(20_000, longest=200), 1, 1600, T=64)
    assert len(json.dumps(state)) < 15_000


def test_a_book_among_letters_gets_its_share_of_every_stretch():
    """Half of the text is one book: neither put off for ever nor all at once."""
    batches = make(["B" * 8000, *["a" * 20] * 400], T=32, rows_per_step=1)
    rows = np.concatenate([rows_of(batches.next()) for _ in range(4000)])
    share = [(part == ord("B")).sum() / (part != BOS).sum() for part in np.split(rows, 4)]
    assert max(abs(x - 0.5) for x in share) < 0.1


def test_streams_that_read_one_book_read_different_pages():
    book = "".join(f"{i:04}" for i in range(2000))
    batches = make([book], T=64, B=16, rows_per_step=16)
    for _ in range(8000 // (16 * 64)):
        starts = [bytes(row[1:9].tolist()) for row in rows_of(batches.next())]
        assert len(set(starts)) == 16
    ids = np.arange(8000)
    for n in (0, 1, 5):
        whole = batches._document(n, ids % 200)
        text, middle = whole[whole != BOS], int(np.flatnonzero(whole == BOS)[-1])
        assert whole[0] == BOS and (text == np.roll(ids, max(middle - 1, 0)) % 200).all()


def test_epochs_are_counted_by_text_read():
    """Documents that wait in the pools (here more than there are in an epoch) are not counted as read."""
    texts = words(60)
    total = sum(map(len, texts))
    batches = make(texts, T=32, B=16, rows_per_step=16)
    for done in range(1, 61):
        rows = rows_of(batches.next())
    read = 60 * (rows.size) / total  # bos included: a few per cent
    assert batches.epoch == pytest.approx(read, rel=0.1)
    two = [make(texts, T=32, B=8, rows_per_step=16, rank=r, world_size=2) for r in range(2)]
    for _ in range(60):
        for rank in two:
            rank.next()
    assert sum(rank.epoch for rank in two) / 2 == pytest.approx(batches.epoch)


@pytest.mark.parametrize("texts", [["a"], ["hello"], ["x" * 1000], ["a", "b"], [None, "", "word", None]])
@pytest.mark.parametrize("rows_per_step", [1, 16])
def test_tiny_corpora_repeat_and_count_epochs(texts, rows_per_step):
    batches = make(texts, T=12, rows_per_step=rows_per_step)
    text = {t for t in texts if t}
    for _ in range(40):
        (row,) = rows_of(batches.next())
        assert all(any(bytes(p).decode() in t for t in text) for p in pieces(row))
    assert batches.epoch > 40 * 8 / (sum(map(len, filter(None, texts))) + 100)
    assert batches.where().startswith("list documents ")


@pytest.mark.parametrize("texts", [[None], ["", None, ""], [None] * 50])
def test_a_corpus_without_text_says_so(texts):
    with pytest.raises(UserError, match=r"holds no text to train on: its \d+ documents"):
        make(texts).next()


def test_mixture_weights_hold():
    weights = {"a": 0.7, "b": 0.25, "c": 0.05}
    lengths = {"a": 20, "b": 300, "c": 45}
    letters = {name: ord(name) for name in weights}
    sources = [(ListDocuments([name * (lengths[name] + i % 7) for i in range(50)], name), 10 * w) for name, w in weights.items()]
    batches = make(sources, T=256, B=20, rows_per_step=20)
    rows = np.concatenate([rows_of(batches.next()) for _ in range(300)])
    total = (rows != BOS).sum()
    for name, weight in weights.items():
        assert abs((rows == letters[name]).sum() / total - weight) < 0.01 * weight
    assert "a documents" in batches.where() and "b documents" in batches.where()


def test_batches_that_do_not_divide_say_what_to_type():
    with pytest.raises(UserError, match="--total-batch-size") as error:
        make(["a"], rows_per_step=12, world_size=8, T=32)
    assert int(str(error.value).split()[-1]) % (32 * 8) == 0
    with pytest.raises(UserError, match="not a multiple of device batch size 5 x 1 ranks"):
        make(["a"], rows_per_step=16, B=5)


def test_a_state_of_something_else_is_refused():
    batches = make(words(30), B=2, rows_per_step=16)
    batches.next()
    state = batches.state_dict()
    with pytest.raises(UserError, match="give the former --data"):
        make(words(31), B=2, rows_per_step=16).load_state_dict(state)
    with pytest.raises(UserError, match="does not fit 8 streams"):
        make(words(30), B=2, rows_per_step=8).load_state_dict(state)
    with pytest.raises(UserError, match="4 rows at a time"):
        make(words(30), B=4, rows_per_step=16).load_state_dict(state)
    with pytest.raises(UserError, match="the text or the tokenizer has changed"):
        make(["x"] * 30, B=2, rows_per_step=16).load_state_dict(state | {"streams": [s | {"pool": [[0, 3, 1, 4]]} for s in state["streams"]]})


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(st.text(alphabet="abcé中", max_size=60), max_size=25), T=st.integers(1, 40), limit=st.sampled_from([-1, 1, 37, 200]))
def test_validation_rows_count_each_text_token_once(texts, T, limit):
    tokens = [list(text.encode()) for text in texts]
    budget = sum(map(len, tokens)) if limit < 0 else limit
    expected = []
    for ids in tokens:
        ids, budget = ids[:budget], budget - len(ids[:budget])
        expected += [ids[i : i + T] for i in range(0, len(ids), T)]
    if not expected:
        with pytest.raises(UserError, match="no text"):
            validation_rows(texts, TOKENIZER, T, limit)
        return
    inputs, targets, n_bytes = validation_rows(texts, TOKENIZER, T, limit)
    assert inputs.shape == targets.shape == (len(inputs), T) and inputs.min() >= 0
    found = []
    for x, y in zip(inputs, targets):
        end = T - int((y[::-1] >= 0).argmax()) if (y >= 0).any() else 0
        assert (y[end:] == -1).all() and (x[1:end] == y[: end - 1]).all()
        found += [p for p in pieces(np.concatenate([x[:1], y[:end]])) if p]
    assert sorted(found) == sorted(expected)
    assert n_bytes == sum(map(len, expected))


def test_validation_rows_waste_little():
    inputs, targets, _ = validation_rows(words(500), TOKENIZER, 64)
    assert (targets < 0).mean() < 0.05  # one document a row would waste a half

    class Val:
        def iterate(self):
            yield from words(500)

    assert (validation_rows(Val(), TOKENIZER, 64)[1] == targets).all()
