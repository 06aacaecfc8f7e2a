"""Packing: every token once, exact state, the same rows on any number of ranks. Oracles: the texts, and a slow best
fit.
"""

import json
import random
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolab.cli import UserError
from nanolab.data.packing import POOL, PackedBatches, Packer
from nanolab.data.tokenizer import Tokenizer
from nanolab.data.validation import validation_rows

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
        sources,
        TOKENIZER,
        seq_len=T,
        device_batch_size=B,
        rows_per_step=rows_per_step,
        rank=rank,
        world_size=world_size,
        threads=1,
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
        (labels,) = batches.position.labels
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
    assert batches.position.epoch >= 1.9


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
            piece = (
                [p for p in fitting if len(p) == longest][-1] if fitting else [p for p in pool if len(p) == shortest][0]
            )
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
@given(
    seed=st.integers(0, 9999), longest=st.integers(1, 400), T=st.sampled_from([8, 32, 100]), before=st.integers(0, 60)
)
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


def state_of(ranks: list[PackedBatches]) -> dict:
    """The state that ranks in processes of their own would gather."""

    class Together:
        def gather_objects(self, _):
            return [rank.position.mine() for rank in ranks]

    return ranks[0].position.json(Together())


def global_rows(
    texts, world_size: int, n: int, *, B: int = 1, state=None, rows_per_step=16, T=24
) -> tuple[list[list[int]], dict]:
    """The first n rows of all ranks together, in global order, and the merged state after them, through JSON."""
    ranks = [
        make(texts, T=T, B=B, rows_per_step=rows_per_step, rank=r, world_size=world_size) for r in range(world_size)
    ]
    if state:
        for rank in ranks:
            rank.load_state_dict(state)
    out = []
    for _ in range(n // (B * world_size)):
        parts = [rows_of(rank.next()) for rank in ranks]
        out += [parts[g % world_size][g // world_size].tolist() for g in range(B * world_size)]
    return out, json.loads(json.dumps(state_of(ranks)))


def test_ranks_see_the_same_global_batches():
    texts = words(300)
    one, state = global_rows(texts, 1, 96)
    for world_size, B in ((2, 1), (4, 4), (8, 2), (1, 16)):
        rows, other = global_rows(texts, world_size, 96, B=B)
        assert rows == one and other == state


def by_step(
    texts, world_size: int, steps: int, *, B=4, rows_per_step=48, T=24, state=None
) -> tuple[list[list[list[int]]], dict, list[set[int]]]:
    """(the rows of each global batch, sorted; the state after them, through JSON; for each rank the rows that it had in
    a step).
    """
    ranks = [
        make(texts, T=T, B=B, rows_per_step=rows_per_step, rank=r, world_size=world_size) for r in range(world_size)
    ]
    if state:
        for rank in ranks:
            rank.load_state_dict(state)
    begin, out, shares = ranks[0].rows, [], [set() for _ in ranks]
    for step in range(1, steps + 1):
        rows = []
        for rank, seen in zip(ranks, shares):
            mine = []
            while rank.rows < begin + step * rows_per_step:
                mine += (found := rows_of(rank.next()).tolist())
                assert len(found) <= B
            rows += mine
            seen.add(len(mine))
        out.append(sorted(rows))
    return out, json.loads(json.dumps(state_of(ranks))), shares


@pytest.mark.fault("F7", "core D2")
@pytest.mark.parametrize("ranks", [3, 5, 6, 7, 12, 24, 32, 48])
def test_any_number_of_ranks_sees_the_global_batches_of_one(ranks):
    texts = words(300)
    one, state, _ = by_step(texts, 1, 4)
    many, other, shares = by_step(texts, ranks, 4)
    assert many == one and other == state
    assert [{48 // ranks + (rank < 48 % ranks)} for rank in range(ranks)] == shares, (
        "as even as can be, the same in every step"
    )


@pytest.mark.fault("F7")
def test_sixty_four_ranks_and_rows_that_are_a_multiple_of_nothing():
    texts = words(300)
    for rows, B, ranks in ((64, 1, 64), (128, 2, 64), (45, 5, 7), (10, 1, 3)):
        (one, state, _), (many, other, _) = (by_step(texts, n, 2, B=B, rows_per_step=rows) for n in (1, ranks))
        assert many == one and other == state


@pytest.mark.fault("F7")
def test_a_run_moves_between_any_numbers_of_ranks():
    texts = [
        (ListDocuments(words(150, longest=80) + ["y" * 2000, None, ""], "a"), 0.7),
        (ListDocuments(words(40, 1), "b"), 0.3),
    ]
    whole, end, _ = by_step(texts, 1, 7)
    found, state = [], None
    for ranks, steps, B in ((3, 2, 4), (2, 1, 8), (5, 2, 3), (1, 1, 16), (32, 1, 1)):
        rows, state, _ = by_step(texts, ranks, steps, B=B, state=state)
        found += rows
    assert found == whole and state == end


# Written by commit 9e9a9b1 after 3 steps of 4 rows of words(5), T = 16, the same for 1, 2 and 4 ranks; and the rows of
# the next 2 steps.
OLD_STATE = json.loads(
    """{"rows":12,"sources":[["list",5]],"n_streams":4,
"streams":[
{"next":[56],"taken":[580],"pool":[[0,12,0,58],[0,16,0,28],[0,20,0,26],[0,24,0,58],[0,28,0,26],[0,32,0,26],
[0,36,0,26],[0,40,0,26],[0,44,0,58],[0,48,0,56],[0,0,16,42],[0,52,0,26],[0,4,16,34],[0,8,16,42]]},
{"next":[57],"taken":[616],"pool":[[0,13,0,26],[0,17,0,58],[0,21,0,50],[0,25,0,28],[0,29,0,56],[0,33,0,50],
[0,37,0,58],[0,41,0,50],[0,45,0,58],[0,49,0,28],[0,1,16,12],[0,5,16,10],[0,53,0,50],[0,9,16,34]]},
{"next":[50],"taken":[594],"pool":[[0,14,0,50],[0,18,0,50],[0,22,0,56],[0,26,0,50],[0,30,0,28],[0,34,0,58],
[0,38,0,56],[0,42,0,28],[0,2,16,40],[0,46,0,50],[0,6,16,40],[0,10,16,40]]},
{"next":[59],"taken":[580],"pool":[[0,15,0,26],[0,19,0,56],[0,23,0,28],[0,27,0,58],[0,31,0,56],[0,35,0,50],
[0,39,0,28],[0,43,0,56],[0,47,0,26],[0,51,0,56],[0,55,0,58],[0,3,16,10],[0,7,16,12],[0,11,16,12]]}]}"""
)
OLD_ROWS = [
    [
        [256, 51, 58, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120],
        [256, 49, 58, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120],
        [256, 50, 58, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120],
        [256, 49, 58, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120],
    ],
    [
        [256, 52, 58, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120],
        [256, 51, 58, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120],
        [256, 50, 58, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120],
        [256, 48, 58, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120, 120],
    ],
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_state_of_an_older_version_goes_on_exactly(ranks):
    rows, _, _ = by_step(words(5), ranks, 2, B=1, rows_per_step=4, T=16, state=OLD_STATE)
    assert rows == [sorted(step) for step in OLD_ROWS]


def test_ranks_hold_few_streams_and_read_few_documents_twice():
    """A rank packs the streams that its rows come from: those of no other rank where the ranks divide 16, two more
    elsewhere.
    """
    for ranks, most in ((1, 16), (2, 8), (4, 4), (16, 1), (3, 7), (5, 5), (6, 4), (12, 3), (32, 2), (48, 1)):
        made = [make(["a"], B=1, rows_per_step=48, rank=rank, world_size=ranks) for rank in range(ranks)]
        assert max(len(one.mine) for one in made) <= most
        assert {s for one in made for s in one.mine} == set(range(16))


@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(0, 12),
    before=st.sampled_from([1, 2, 4, 8]),
    after=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
)
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
    for _ in range(60):
        rows = rows_of(batches.next())
    read = 60 * (rows.size) / total  # bos included: a few per cent
    assert batches.position.epoch == pytest.approx(read, rel=0.1)
    two = [make(texts, T=32, B=8, rows_per_step=16, rank=r, world_size=2) for r in range(2)]
    for _ in range(60):
        for rank in two:
            rank.next()
    assert sum(rank.position.epoch for rank in two) / 2 == pytest.approx(batches.position.epoch)


@pytest.mark.parametrize("texts", [["a"], ["hello"], ["x" * 1000], ["a", "b"], [None, "", "word", None]])
@pytest.mark.parametrize("rows_per_step", [1, 16])
def test_tiny_corpora_repeat_and_count_epochs(texts, rows_per_step):
    batches = make(texts, T=12, rows_per_step=rows_per_step)
    text = {t for t in texts if t}
    for _ in range(40):
        (row,) = rows_of(batches.next())
        assert all(any(bytes(p).decode() in t for t in text) for p in pieces(row))
    assert batches.position.epoch > 40 * 8 / (sum(map(len, filter(None, texts))) + 100)
    assert batches.position.where().startswith("list documents ")


@pytest.mark.parametrize("texts", [[None], ["", None, ""], [None] * 50])
def test_a_corpus_without_text_says_so(texts):
    with pytest.raises(UserError, match=r"holds no text to train on: its \d+ documents"):
        make(texts).next()


def test_mixture_weights_hold():
    weights = {"a": 0.7, "b": 0.25, "c": 0.05}
    lengths = {"a": 20, "b": 300, "c": 45}
    letters = {name: ord(name) for name in weights}
    sources = [
        (ListDocuments([name * (lengths[name] + i % 7) for i in range(50)], name), 10 * w)
        for name, w in weights.items()
    ]
    batches = make(sources, T=256, B=20, rows_per_step=20)
    rows = np.concatenate([rows_of(batches.next()) for _ in range(300)])
    total = (rows != BOS).sum()
    for name, weight in weights.items():
        assert abs((rows == letters[name]).sum() / total - weight) < 0.01 * weight
    assert "a documents" in batches.position.where() and "b documents" in batches.position.where()


def test_batches_that_do_not_divide_say_what_to_type():
    with pytest.raises(UserError, match=r"not a multiple of 80 \(device batch size 5 x row 16\)") as error:
        make(["a"], rows_per_step=16, B=5)
    for flag, value in re.findall(r"--(total|device)-batch-size (\d+)", str(error.value)):
        make(
            ["a"],
            **(
                {"rows_per_step": int(value) // 16, "B": 5}
                if flag == "total"
                else {"rows_per_step": 16, "B": int(value)}
            ),
        )


@pytest.mark.fault("F7")
@pytest.mark.parametrize("ranks, rows, B", [(3, 2, 1), (17, 16, 4), (64, 48, 8), (5, 4, 2)])
def test_fewer_rows_than_ranks_are_refused_with_both_numbers_and_advice_that_works(ranks, rows, B):
    with pytest.raises(UserError) as error:
        make(["a"], rows_per_step=rows, B=B, world_size=ranks)
    (typed,) = re.findall(r"--total-batch-size (\d+)", str(error.value))
    make(["a"], rows_per_step=int(typed) // 16, B=B, world_size=ranks)
    assert error.value.code == "fewer-rows-than-ranks" and error.value.values == {"rows": rows, "ranks": ranks}


def test_a_state_of_something_else_is_refused():
    batches = make(words(30), B=2, rows_per_step=16)
    batches.next()
    state = batches.position.json()
    with pytest.raises(UserError, match="give the former --data"):
        make(words(31), B=2, rows_per_step=16).load_state_dict(state)
    with pytest.raises(UserError, match="does not fit 8 streams"):
        make(words(30), B=2, rows_per_step=8).load_state_dict(state)
    with pytest.raises(UserError, match="4 rows at a time"):
        make(words(30), B=4, rows_per_step=16).load_state_dict(state)
    with pytest.raises(UserError, match="the text or the tokenizer has changed"):
        make(["x"] * 30, B=2, rows_per_step=16).load_state_dict(
            state | {"streams": [s | {"pool": [[0, 3, 1, 4]]} for s in state["streams"]]}
        )


@settings(max_examples=80, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="abcé中", max_size=60), max_size=25),
    T=st.integers(1, 40),
    limit=st.sampled_from([-1, 1, 37, 200]),
)
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


class Together:
    """Ranks as threads: `gather_objects` as `Runtime` has it."""

    def __init__(self, world_size: int) -> None:
        self.world_size, self.barrier, self.given = (
            world_size,
            threading.Barrier(world_size, timeout=60),
            [None] * world_size,
        )

    def run(self, work: Callable) -> list:
        with ThreadPoolExecutor(self.world_size) as pool:
            return list(
                pool.map(
                    lambda rank: work(
                        SimpleNamespace(
                            rank=rank, world_size=self.world_size, gather_objects=partial(self.gather, rank)
                        )
                    ),
                    range(self.world_size),
                )
            )

    def gather(self, rank: int, mine: Any) -> list:
        self.given[rank] = mine
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found


class Counting:
    """A tokenizer that counts what it makes."""

    def __init__(self) -> None:
        self.bos, self.token_bytes, self.made = TOKENIZER.bos, TOKENIZER.token_bytes, 0

    def encode_arrays(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        arrays = TOKENIZER.encode_arrays(texts, threads)
        self.made += sum(map(len, arrays))
        return arrays


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("limit", [-1, 5000])
@pytest.mark.fault("core likely: Evaluation while training is uncompiled")
def test_ranks_share_the_validation_rows_of_one(ranks, limit):
    """Rank r gets rows r, r + W, ... to the bit and tokenises its share, so that the bytes that it holds fall with
    their number.
    """
    texts, whole = words(1500) + ["longer " * 300], Counting()
    inputs, targets, n_bytes = validation_rows(texts, whole, 64, limit)
    assert inputs.dtype == targets.dtype == np.int32

    def share(runtime) -> tuple:
        tokenizer = Counting()
        return *validation_rows(texts, tokenizer, 64, limit, runtime), tokenizer.made

    for rank, (x, y, all_bytes, made) in enumerate(Together(ranks).run(share)):
        n = len(inputs[rank::ranks])
        assert (x[:n] == inputs[rank::ranks]).all() and (y[:n] == targets[rank::ranks]).all() and (y[n:] == -1).all()
        assert x.nbytes == y.nbytes == -(-len(inputs) // ranks) * 64 * 4 and all_bytes == n_bytes
        assert made <= whole.made / ranks + 64 * max(map(len, texts))


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_of_which_some_have_no_document_share_rows(ranks):
    found = Together(ranks).run(lambda runtime: validation_rows(["ab"], TOKENIZER, 8, -1, runtime))
    assert [int((targets >= 0).sum()) for _, targets, _ in found] == [2, 0][:ranks]
    with pytest.raises(UserError, match="no text"):
        Together(ranks).run(lambda runtime: validation_rows([], TOKENIZER, 8, -1, runtime))
