"""Validation text -> rows to evaluate on, padded, every token a target exactly once."""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from nanolab.cli import UserError
from nanolab.data.bestfit import BestFit
from nanolab.data.tokenizer import Tokenizer
from nanolab.runtime import Runtime

LOT = 64  # documents that a rank tokenises at a time


def validation_rows(
    documents: Any, tokenizer: Tokenizer, seq_len: int, max_tokens: int = -1, runtime: Runtime | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows to evaluate on: (inputs (N, T), targets (N, T), bytes of text), int32; every text token is a target exactly
    once.

    documents: texts, or an object whose iterate() gives them. The first `max_tokens` text tokens count (-1: all).
    Documents of up to T tokens stay whole, so that each token has the context it would have alone; longer ones are cut
    at multiples of T. Places left over have the target -1. Raises UserError where there is no text.

    runtime: of several ranks each tokenises its share of the documents and gets its share of the rows, r, r + W, ... of
    those that one rank would get, and as many of them as the others: the last one may have no target. A collective
    call."""
    rank, world = (runtime.rank, runtime.world_size) if runtime else (0, 1)
    texts = iter(documents.iterate() if hasattr(documents, "iterate") else documents)
    lengths: list[int] = []  # of all documents
    mine: dict[int, np.ndarray] = {}  # the text of this rank's, by its number
    left = max_tokens if max_tokens >= 0 else 1 << 62
    while left and (lot := list(islice(texts, LOT * world))):
        arrays = tokenizer.encode_arrays(lot[rank * LOT : (rank + 1) * LOT], threads=2)
        first = len(lengths) + rank * LOT
        for length in chain(*_gathered(runtime, [len(ids) for ids in arrays])):
            lengths.append(min(length, left))
            left -= lengths[-1]
        mine |= {n: ids[: lengths[n]] for n, ids in enumerate(arrays, first)}
    pieces = [(n, i) for n, length in enumerate(lengths) for i in range(0, length, seq_len)]
    if not pieces:
        raise UserError("the validation documents hold no text; expected at least one token; check --val-data")
    sizes = [min(seq_len, lengths[n] - i) for n, i in pieces]
    place_of, n_rows = _places(sizes, seq_len + 1)
    rows = np.full((-(-n_rows // world), seq_len + 1), -1, dtype=np.int32)
    for turn in range(world):  # the ranks exchange their documents a part at a time
        part = {p: mine[n][i : i + seq_len] for p, (n, i) in enumerate(pieces) if n in mine and p % world == turn}
        for p, ids in chain(*(found.items() for found in _gathered(runtime, part))):
            row, at = place_of[p]
            if row % world == rank:
                rows[row // world, at] = tokenizer.bos
                rows[row // world, at + 1 : at + 1 + len(ids)] = ids
    token_bytes = tokenizer.token_bytes()
    n_bytes = sum(_gathered(runtime, sum(int(token_bytes[ids].sum(dtype=np.int64)) for ids in mine.values())))
    return np.where(rows[:, :-1] < 0, tokenizer.bos, rows[:, :-1]), rows[:, 1:], n_bytes


def _places(sizes: Sequence[int], room: int) -> tuple[dict[int, tuple[int, int]], int]:
    """(piece -> (row, place in it), rows): a row takes, again and again, the longest piece that fits with its bos."""
    pool, place_of, row = BestFit((size, p) for p, size in enumerate(sizes)), {}, 0
    while len(pool):
        at = 0
        while found := pool.largest(room - at - 1):
            size, p = found
            place_of[p] = row, at
            at += 1 + size
        row += 1
    return place_of, row


def _gathered(runtime: Runtime | None, mine: Any) -> list[Any]:
    return runtime.gather_objects(mine) if runtime else [mine]
