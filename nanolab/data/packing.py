"""Documents -> rows of T+1 tokens: each starts with bos, none has padding, every token of the corpus is used once an
epoch.

Rows come from V virtual streams (V = gcd(rows per step, 16)), whatever the number of ranks. Stream s reads documents s,
s + V, s + 2V, ... of each source into a small pool; row g of the run comes from stream g mod V. The rows of a step are
dealt to any number of ranks, to some one more than to others (`deal`), and a rank holds the streams that its rows come
from. So all numbers of ranks see the same global batches, and the state (per stream: where each source stands, and
which documents lie in the pool) is a few kB of JSON that any of them can continue. Where W ranks divide V each stream
is on one rank. Elsewhere a stream can be on several: each packs all of its rows and keeps its own, at most two streams
more per rank than V / W.

A row takes the oldest document of the pool, then again and again the longest that fits the room left; when none fits,
the shortest is cut to fill it, and its rest goes to the back of the queue as a piece of its own, bos first. A document
longer than a row is cut likewise, one row at a time. Starting with the oldest bounds the wait: nothing stays longer
than the pool has places. Cutting the shortest costs least context. Simulated on documents of 775 tokens in the mean, T
= 2048, 32 places: a token sees 666 tokens of its document before it, as many as with documents cut at multiples of T
alone; starting with the best fit and cutting the longest gives 585, and leaves documents waiting for 1,900 rows."""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from nanolab.cli import UserError
from nanolab.data.bestfit import BestFit
from nanolab.data.shares import Turns, share_rows
from nanolab.data.tokenizer import Tokenizer
from nanolab.runtime import Runtime

POOL = 32  # places per stream; 16 do almost as well, 128 no better
AHEAD = 16  # documents per stream and source that are tokenised in one go
AHEAD_CHARS = 4_000_000  # and the text at which to stop sooner
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, lie as far apart as can be

Label = tuple[int, int]  # (source, document)
Piece = tuple[Any, int, np.ndarray]  # label, its first text token's place in the document, bos + text tokens


class Documents(Protocol):
    """What packing asks of a source; see `corpus.Documents`."""

    name: str
    n_documents: int

    def get(self, n: int) -> str | None: ...


class Packer:
    """The pool of one stream: documents in, rows out. O(log places) per document and a copy of its tokens.

    supply() gives (label, tokens): an integer array that starts with bos and that the packer may overwrite. It is asked
    while a place is free and the pool holds less than `places` rows of text: a few long documents are enough.
    """

    def __init__(self, bos: int, supply: Callable[[], tuple[Any, np.ndarray]], places: int = POOL) -> None:
        self._supply, self._places = supply, places
        self._bos = np.array([bos])
        self._pool: BestFit[Piece] = BestFit()  # sizes: text tokens
        self._held = 0  # text tokens in the pool

    def add(self, label: Any, start: int, tokens: np.ndarray) -> None:
        """Put a piece at the back of the queue: bos and the text tokens of document `label` from `start` on."""
        self._pool.add(len(tokens) - 1, (label, start, tokens))
        self._held += len(tokens) - 1

    def pool(self) -> list[Piece]:
        """The pieces as `add` takes them, oldest first."""
        return self._pool.pieces()

    def fill(self, row: np.ndarray) -> list[Any]:
        """Fill `row` (T+1,) and return the labels of the documents in it."""
        pool, enough, room = self._pool, self._places * len(row), len(row)
        parts: list[np.ndarray] = []
        labels = []
        while True:
            while len(pool) < self._places and self._held < enough:
                label, tokens = self._supply()
                self.add(label, 0, tokens)
            n, (label, start, tokens) = (pool.largest(room - 1) or pool.smallest()) if parts else pool.oldest()
            self._held -= n
            labels.append(label)
            if n >= room:
                parts.append(tokens[:room])
                np.concatenate(parts, out=row)
                rest = tokens[room - 1 :]  # its first token has just been copied: bos takes that place
                rest[0] = self._bos[0]
                self.add(label, start + room - 1, rest)
                return labels
            parts.append(tokens)
            room -= n + 1
            if room <= 1:  # one place has room for no text: a lone bos, a target like that of any next document
                np.concatenate(parts + [self._bos] * room, out=row)
                return labels


class Cursor:
    """One source as one stream sees it."""

    def __init__(self, n: int) -> None:
        self.n = n  # the next document to enter the pool, or a blank one before it
        self.taken = 0  # text tokens that have entered it
        self.read = n  # the next document to read and tokenise
        self.ready: deque[tuple[int, np.ndarray]] = deque()  # tokenised ahead: no part of the state


class Position(Protocol):
    """Where the batches of a rank stand after one of them. It does not change when further ones are made."""

    @property
    def epoch(self) -> float: ...  # passes over the data
    def json(self, runtime: Runtime | None = None) -> dict[str, Any]: ...  # what a checkpoint keeps; a collective call
    def where(self) -> str: ...  # what the batch was made of, for messages


class Batch(NamedTuple):
    """One micro-batch of one rank."""

    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64; -1 is not a target
    n_targets: int
    position: Position  # after it


class PackedPosition(NamedTuple):
    """Where one rank's `PackedBatches` stand after a batch."""

    source: "PackedBatches"  # of which only what never changes is read
    rows: int  # handed out so far by all ranks together
    streams: dict[int, tuple[list[int], list[int], list[Piece]]]  # next documents, tokens taken, pool
    labels: list[list[Label]]  # the documents in each row of the batch

    def mine(self) -> dict[int, dict[str, Any]]:
        """The state of this rank's streams as JSON."""
        return {
            s: {
                "next": nexts,
                "taken": taken,
                "pool": [[*label, start, len(tokens) - 1] for label, start, tokens in pool],
            }
            for s, (nexts, taken, pool) in self.streams.items()
        }

    def json(self, runtime: Runtime | None = None) -> dict[str, Any]:
        """The state of all streams, the same on every rank, which any number of ranks can continue. A collective call;
        runtime: of several ranks.
        """
        if not self.source.turns.fits(self.rows):
            raise ValueError("the ranks stand inside a step, where their streams differ; ask between two steps")
        streams = {
            s: stream
            for part in (runtime.gather_objects(self.mine()) if runtime else [self.mine()])
            for s, stream in part.items()
        }
        n = self.source.n_streams
        sources = self.source.source_names()
        return {"rows": self.rows, "sources": sources, "n_streams": n, "streams": [streams[s] for s in range(n)]}

    @property
    def epoch(self) -> float:
        """Passes over the source that is furthest ahead, as this rank sees it: documents that have entered the pools of
        this rank, less the share of text that is still there, for all ranks.
        """
        sources, n_streams = self.source.sources, self.source.n_streams
        passed = [0.0] * len(sources)
        for s, (nexts, taken, pool) in self.streams.items():
            held = [0] * len(sources)
            for (source, _), _, tokens in pool:
                held[source] += len(tokens) - 1
            for i, (n, tokens) in enumerate(zip(nexts, taken)):
                passed[i] += (n - s) / n_streams * (1 - held[i] / tokens if tokens else 0)
        share = n_streams / len(self.source.mine)
        return max(p * share / documents.n_documents for p, (documents, _) in zip(passed, sources))

    def where(self) -> str:
        by_source: dict[int, set[int]] = {}
        for source, n in (label for row in self.labels for label in row):
            by_source.setdefault(source, set()).add(n)
        return "; ".join(
            f"{self.source.sources[i][0].name} documents {', '.join(map(str, sorted(ns)))}"
            for i, ns in by_source.items()
        )


class PackedBatches:
    """The training batches of one rank, for ever.

    sources: (documents, weight) pairs; tokens are drawn from them in proportion to the weights. rows_per_step: rows of
    one optimizer step over all ranks. threads: for tokenising. Raises UserError where `share_rows` does, and, when
    documents are first read, where a source holds no text."""

    def __init__(
        self,
        sources: Sequence[tuple[Documents, float]],
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        device_batch_size: int,
        rows_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 2,
    ) -> None:
        share_rows(rows_per_step * seq_len, seq_len, device_batch_size, world_size)
        self.n_streams = math.gcd(rows_per_step, 16)
        self.turns = Turns(rows_per_step, device_batch_size, rank, world_size, self.n_streams)
        self.mine = sorted({g % self.n_streams for g in self.turns.mine})  # the streams that this rank holds
        # and all of their rows in a step
        self.held = [g for g in range(rows_per_step) if g % self.n_streams in self.mine]
        self.sources, self.tokenizer, self.seq_len, self.threads = list(sources), tokenizer, seq_len, threads
        self.rank, self.world_size, self.device_batch_size = rank, world_size, device_batch_size
        self._reset()

    def _reset(self) -> None:
        self.rows = 0  # rows handed out so far by all ranks together
        self._held = 0  # how many of `held` have been packed in this step
        self._others = np.empty(self.seq_len + 1, dtype=np.int64)
        self._cursors = {s: [Cursor(s) for _ in self.sources] for s in self.mine}
        self._packers = {s: Packer(self.tokenizer.bos, lambda s=s: self._next_document(s)) for s in self.mine}
        self._labels: list[list[Label]] = []

    @property
    def position(self) -> PackedPosition:
        """After the last batch; quick enough to be asked after each."""
        streams = {}
        for s in self.mine:
            cursors = self._cursors[s]
            streams[s] = [c.n for c in cursors], [c.taken for c in cursors], self._packers[s].pool()
        return PackedPosition(self, self.rows, streams, self._labels)

    def source_names(self) -> list[list[Any]]:
        return [[documents.name, documents.n_documents] for documents, _ in self.sources]

    def next(self) -> Batch:
        """The next micro-batch of this rank."""
        places, done = self.turns.after(self.rows)
        rows = np.empty((len(places), self.seq_len + 1), dtype=np.int64)
        filled, self._labels = 0, []
        while self._held < len(self.held) and (filled < len(places) or done % self.turns.rows_per_step == 0):
            g = self.held[self._held]
            packer = self._packers[g % self.n_streams]
            if filled < len(places) and g == places[filled]:
                self._labels.append(packer.fill(rows[filled]))
                filled += 1
            else:  # another rank's: packed here as well, because what follows in the stream depends on it
                packer.fill(self._others)
            self._held += 1
        self._held = self._held if done % self.turns.rows_per_step else 0
        self.rows = done
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(half)) for half in (rows[:, :-1], rows[:, 1:]))
        return Batch(inputs, targets, targets.numel(), self.position)

    def _next_document(self, s: int) -> tuple[Label, np.ndarray]:
        """The document that enters the pool of stream s: of the source that is furthest behind its weight."""
        cursors = self._cursors[s]
        source = 0
        if len(cursors) > 1:
            source = min(range(len(cursors)), key=lambda i: cursors[i].taken / self.sources[i][1])
        cursor = cursors[source]
        if not cursor.ready:
            self._tokenize(source)
        n, tokens = cursor.ready.popleft()
        cursor.n = n + self.n_streams
        cursor.taken += len(tokens) - 1
        return (source, n), tokens

    def _tokenize(self, source: int) -> None:
        """Read and tokenise the next documents of `source` for all streams of this rank, neighbouring documents
        together.
        """
        found: list[tuple[Cursor, int, str]] = []
        chars = 0
        for depth in range(AHEAD):
            for s in self.mine:
                cursor = self._cursors[s][source]
                if len(cursor.ready) <= depth:
                    n, text = self._read(source, cursor)
                    found.append((cursor, n, text))
                    chars += len(text)
            if chars > AHEAD_CHARS:
                break
        # a text that several streams read is tokenised once, and its ids are dropped then
        last = {id(text): i for i, (_, _, text) in enumerate(found)}
        encoded: dict[int, np.ndarray] = {}
        for i, (cursor, n, text) in enumerate(found):
            if id(text) not in encoded:
                lot, chars = {}, 0
                for _, _, other in found[i:]:
                    if chars <= AHEAD_CHARS and id(other) not in encoded and id(other) not in lot:
                        lot[id(other)] = other
                        chars += len(other)
                encoded |= zip(lot, self.tokenizer.encode_arrays(list(lot.values()), self.threads))
            cursor.ready.append((n, self._document(n, encoded[id(text)])))
            if last[id(text)] == i:
                del encoded[id(text)]

    def _read(self, source: int, cursor: Cursor) -> tuple[int, str]:
        """The next document that holds text, and its number."""
        documents, _ = self.sources[source]
        skipped = 0
        while True:
            n, cursor.read = cursor.read, cursor.read + self.n_streams
            if text := documents.get(n):
                return n, text
            skipped += 1
            if skipped == documents.n_documents + 1 and not any(documents.get(i) for i in range(documents.n_documents)):
                raise UserError(
                    f"{documents.name} holds no text to train on: its {documents.n_documents} documents are empty or in"
                    " the validation set; expected at least one; check --data-dir and --val-data"
                )

    def _document(self, n: int, ids: np.ndarray) -> np.ndarray:
        """bos + ids. A document of a pool's size or more is begun at a page that depends on n, its beginning after its
        end.

        For when the corpus is one book, or a few: streams that read it side by side then read different pages.
        """
        bos = [self.tokenizer.bos]
        pages = len(ids) // self.seq_len
        middle = int(n * GOLDEN % 1 * pages) * self.seq_len if pages >= POOL else 0
        parts = [bos, ids[middle:], bos, ids[:middle]] if middle else [bos, ids]
        return np.concatenate(parts, dtype=np.int32)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that `state` was taken at, whatever the number of ranks then and now.

        Raises UserError for a state of other sources, another number of streams, or a place inside a micro-batch.
        """
        sources = self.source_names()
        if [n for _, n in state["sources"]] != [
            n for _, n in sources
        ]:  # names may differ: a run compares the contents by fingerprint
            raise UserError(
                f"the checkpoint was trained on {state['sources']} (name, documents), but the data is now {sources}; "
                "expected the same data; give the former --data or --data-dir, or start a new --run",
                "data-changed",
                then=state["sources"],
                now=sources,
            )
        micro = self.device_batch_size * self.world_size
        if state["n_streams"] != self.n_streams or not self.turns.fits(state["rows"]):
            raise UserError(
                f"the checkpoint's data state ({state['n_streams']} streams, {state['rows']} rows read) does not fit"
                f" {self.n_streams} streams and {micro} rows at a time; expected the former batch; give the"
                " --total-batch-size and --device-batch-size it had",
                "other-batch",
                rows=state["rows"],
                n_streams=state["n_streams"],
            )
        self._reset()
        self.rows = state["rows"]
        self._held = bisect_left(self.held, self.rows % self.turns.rows_per_step)
        for s in self.mine:
            saved = state["streams"][s]
            for cursor, n, taken in zip(self._cursors[s], saved["next"], saved["taken"]):
                cursor.n = cursor.read = n
                cursor.taken = taken
        pieces = [(s, *piece) for s in self.mine for piece in state["streams"][s]["pool"]]
        texts = [self.sources[source][0].get(n) or "" for _, source, n, *_ in pieces]
        for (s, source, n, start, length), ids in zip(pieces, self.tokenizer.encode_arrays(texts, self.threads)):
            tokens = self._document(n, ids)
            if start + length >= len(tokens):
                raise UserError(
                    f"document {n} of {self.sources[source][0].name} has {len(tokens) - 1} tokens, but the checkpoint"
                    f" has yet to read those from {start} to {start + length}; the text or the tokenizer has changed;"
                    " start a new --run"
                )
            tokens[start] = self.tokenizer.bos
            self._packers[s].add((source, n), start, tokens[start : start + length + 1])
