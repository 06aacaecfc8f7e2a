"""Conversations -> rows of T+1 tokens: whole conversations side by side, each exactly once an epoch, padding where none
fits.

All conversations are measured once, before the run (`survey`). From their lengths alone follows which of them share
which row of which epoch (`pack`), so the number of rows is known, row g is the same on any number of ranks, and the
state of a run is g. A row takes the conversation that has waited longest, then again and again the longest that fits
the room left. One that is longer than a row never waits: it is cropped, left out or refused before anything is packed.

Rows of pretraining text can be mixed in (`replay`), evenly and at fixed places. Dims: B rows, T tokens, N
conversations."""

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from nanolab.cli import UserError
from nanolab.data.bestfit import BestFit
from nanolab.data.chat import Rendered
from nanolab.data.packing import Batch, PackedBatches
from nanolab.data.shares import Turns, share_rows
from nanolab.data.survey import Reader, Survey
from nanolab.files import key_shuffler
from nanolab.runtime import Runtime

# Conversations that wait for a row they fit. Padding of rows of 512 with 64, 256, 1024 places: 2.6, 1.4, 0.9 % (25,000
# chats and school problems of 276 tokens in the mean); but the more wait, the more alike are those that are left at an
# epoch's end.
PLACES = 256
IGNORED = -1  # a target that is not counted


def pack(lengths: np.ndarray, order: Sequence[int], room: int, places: int = PLACES) -> Iterator[list[int]]:
    """The conversations of each row: each of `order` once, none longer than `room`. O(log places) per conversation.

    A row begins with the one that has waited longest, so none waits for more than `places` rows.
    """
    queue, pool = iter(order), BestFit()
    while True:
        row: list[int] = []
        left = room
        while True:
            while len(pool) < places and (i := next(queue, None)) is not None:
                pool.add(int(lengths[i]), i)
            if not len(pool):
                break
            if (found := pool.largest(left) if row else pool.oldest()) is None:
                break
            left -= found[0]
            row.append(found[1])
        if not row:
            return
        yield row


class Layout(NamedTuple):
    """The rows of one epoch: row r holds members[starts[r] : starts[r + 1]]."""

    members: np.ndarray
    starts: np.ndarray


def side_by_side(found: Sequence[Rendered], T: int, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """One row, inputs (T,) and targets (T,): the conversations one after another, then bos that nothing is asked of."""
    ids, mask = np.full(T + 1, bos, dtype=np.int64), np.zeros(T + 1, dtype=np.int64)
    at = 0
    for one in found:
        ids[at : at + len(one.ids)], mask[at : at + len(one.ids)] = one.ids, one.mask
        at += len(one.ids)
    return ids[:-1], np.where(mask[1:] == 1, ids[1:], IGNORED)


class RowPosition(NamedTuple):
    """Where one rank's `ConversationBatches` stand after a batch."""

    source: "ConversationBatches"  # of which only what never changes is read
    rows: int  # handed out so far by all ranks together
    replay: Any  # where the text stands; None without
    labels: list[list[int]]  # the conversations in each row of the batch; a row of text or padding has none

    def json(self, runtime: Runtime | None = None) -> dict[str, Any]:
        """The state, which every rank knows without the others."""
        text = self.replay.json() if self.replay else None
        return {"rows": self.rows, "conversations": self.source.survey.fingerprint, "replay": text}

    @property
    def epoch(self) -> float:
        return self.source.epochs_in(self.rows)

    def where(self) -> str:
        found = sorted(i for row in self.labels for i in row)
        text = ["text"] if self.replay and not all(self.labels) else []
        return (
            " and ".join([f"conversations {', '.join(map(str, found))} of the mixture"] * bool(found) + text)
            or "padding"
        )


class ConversationBatches:
    """The training batches of one rank: rows of conversations, epoch after epoch, and rows of text among them.

    rows_per_step: rows of one optimizer step over all ranks. epochs: after so many only padding follows; None: never.
    replay: text, made with one row at a time for a single rank: every rank packs all of it, and takes its own rows;
    `share`
    of all rows come from it. Raises UserError where `share_rows` does.
    """

    def __init__(
        self,
        reader: Reader,
        surveyed: Survey,
        *,
        device_batch_size: int,
        rows_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 42,
        epochs: int | None = None,
        replay: PackedBatches | None = None,
        share: float = 0.0,
    ) -> None:
        share_rows(rows_per_step * (reader.room - 1), reader.room - 1, device_batch_size, world_size)
        self.turns = Turns(rows_per_step, device_batch_size, rank, world_size, rows_per_step)
        self.reader, self.survey, self.device_batch_size, self.rank, self.world_size = (
            reader,
            surveyed,
            device_batch_size,
            rank,
            world_size,
        )
        self.seed, self.epochs, self.replay, self.share = seed, epochs, replay, check_share(share)
        self.T = reader.room - 1
        self.rows = 0
        self._labels: list[list[int]] = []
        self._ends = [0]  # row of conversations at which each epoch begins
        self._layout = lru_cache(2)(self._pack_epoch)
        # of _ends: batches are made in a thread of their own, and the loop asks for the epoch
        self._counting = threading.Lock()

    def _pack_epoch(self, epoch: int) -> Layout:
        order = key_shuffler(self.seed, epoch).permutation(len(self.survey.lengths))
        order = order[self.survey.lengths[order] > 0]
        rows = list(pack(self.survey.lengths, order.tolist(), self.reader.room))
        starts = np.cumsum([0, *map(len, rows)])
        return Layout(np.array([i for row in rows for i in row], dtype=np.int64), starts)

    def conversation_rows(self, epochs: int) -> int:
        """Rows of conversations in the first `epochs` epochs."""
        if len(self._ends) <= epochs:
            with self._counting:
                while len(self._ends) <= epochs:
                    self._ends.append(self._ends[-1] + len(self._layout(len(self._ends) - 1).starts) - 1)
        return self._ends[epochs]

    def rows_in(self, epochs: int) -> int:
        """Rows of the run, those of text among them, until each conversation has been seen `epochs` times."""
        wanted = self.conversation_rows(epochs)
        g = int(wanted / (1 - self.share))
        while g - self._texts(g) < wanted:
            g += 1
        while g - 1 - self._texts(g - 1) >= wanted:
            g -= 1
        return g

    def padding(self, epochs: int) -> float:
        """Share of the places in the rows of conversations that is padding."""
        return 1 - epochs * self.survey.n_tokens / (self.conversation_rows(epochs) * self.reader.room)

    def _texts(self, g: int) -> int:
        """Rows of text among the first `g` rows."""
        return g * self.share.numerator // self.share.denominator

    def next(self) -> Batch:
        """The next micro-batch of this rank."""
        made, self._labels = [], []
        places, done = self.turns.after(self.rows)
        for g in range(self.rows, done):
            mine = g % self.turns.rows_per_step in places
            if self._texts(g + 1) > self._texts(g):
                text = self.replay.next()  # read on every rank: its order is one for all
                if mine:
                    made.append((text.inputs[0].numpy(), text.targets[0].numpy()))
                    self._labels.append([])
            elif mine:
                members = self._members(g - self._texts(g))
                made.append(side_by_side([self.reader.read(i)[0] for i in members], self.T, self.reader.tokenizer.bos))
                self._labels.append(members)
        self.rows = done
        inputs, targets = (
            torch.from_numpy(np.array(half, dtype=np.int64).reshape(-1, self.T))
            for half in (zip(*made) if made else ((), ()))
        )
        return Batch(inputs, targets, int((targets >= 0).sum()), self.position)

    def _members(self, row: int) -> list[int]:
        """The conversations of a row of conversations, counted over epochs; none after the last epoch."""
        epoch = self._epoch_of(row)
        if self.epochs is not None and epoch >= self.epochs:
            return []
        members, starts = self._layout(epoch)
        r = row - self.conversation_rows(epoch)
        return members[starts[r] : starts[r + 1]].tolist()

    def _epoch_of(self, row: int) -> int:
        while self._ends[-1] <= row and (self.epochs is None or len(self._ends) <= self.epochs):
            self.conversation_rows(len(self._ends))
        return bisect_right(self._ends, row) - 1

    @property
    def position(self) -> RowPosition:
        """After the last batch; quick enough to be asked after each."""
        return RowPosition(self, self.rows, self.replay.position if self.replay else None, self._labels)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that `state` was taken at, whatever the number of ranks then and now.

        Raises UserError for a state of other conversations, and for a place inside a micro-batch.
        """
        if state["conversations"] != self.survey.fingerprint:
            raise UserError(
                "the checkpoint was trained on other conversations: their text, order or tokens differ from what"
                " --tasks and --data give now; expected the same; put the former files back, or start a new --run"
            )
        micro = self.device_batch_size * self.world_size
        if not self.turns.fits(state["rows"]):
            raise UserError(
                f"the checkpoint has read {state['rows']} rows, which {micro} rows at a time do not reach; expected the"
                " former batch; give the --device-batch-size it had"
            )
        self.rows = state["rows"]
        if self.replay:
            self.replay.load_state_dict(state["replay"])

    def epochs_in(self, rows: int) -> float:
        """Passes over the conversations in so many rows of the run."""
        row = rows - self._texts(rows)
        epoch = self._epoch_of(row)
        if self.epochs is not None and epoch >= self.epochs:
            return float(self.epochs)
        first, end = self.conversation_rows(epoch), self.conversation_rows(epoch + 1)
        return epoch + (row - first) / (end - first)


def check_share(share: float) -> Fraction:
    """The share of rows that are text, exact. Raises UserError unless it is at least 0 and below 1."""
    if not 0 <= share < 1:
        raise UserError(
            f"--replay is {share:g}; expected a share of the rows, at least 0 and below 1; try --replay 0.2"
        )
    return Fraction(share).limit_denominator(10_000)


class StagePosition(NamedTuple):
    """Where a `Staged` stands after a batch."""

    stage: int
    of: int  # stages
    before: int  # rows of the stages before it
    at: RowPosition

    @property
    def rows(self) -> int:
        return self.before + self.at.rows

    def json(self, runtime: Runtime | None = None) -> dict[str, Any]:
        return {"stage": self.stage, **self.at.json()}

    @property
    def epoch(self) -> float:
        """Passes over the conversations of the stage."""
        return self.at.epoch

    def where(self) -> str:
        return (f"stage {self.stage + 1}: " if self.of > 1 else "") + self.at.where()


class Staged:
    """Batches of one stage after another.

    parts: (rows of all ranks together, batches) of each stage; the last goes on past its rows. Stages may share a
    replay."""

    def __init__(self, parts: Sequence[tuple[int, ConversationBatches]]) -> None:
        self.parts, self.stage = list(parts), 0

    def next(self) -> Batch:
        rows, batches = self.parts[self.stage]
        if batches.rows >= rows and self.stage + 1 < len(self.parts):
            self.stage += 1
        batch = self.parts[self.stage][1].next()
        return batch._replace(position=self._place(batch.position))

    @property
    def position(self) -> StagePosition:
        return self._place(self.parts[self.stage][1].position)

    def _place(self, at: RowPosition) -> StagePosition:
        return StagePosition(self.stage, len(self.parts), sum(rows for rows, _ in self.parts[: self.stage]), at)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage = state["stage"]
        self.parts[self.stage][1].load_state_dict(state)


def held_out_rows(reader: Reader, max_tokens: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Rows to evaluate on, inputs (N, T) and targets (N, T): the first conversations, until they have `max_tokens` (-1:
    all).

    Raises UserError where none fits a row.
    """
    found, left = [], max_tokens if max_tokens >= 0 else 1 << 62
    for i in range(len(reader)):
        if left <= 0:
            break
        kept, _ = reader.read(i)
        if kept.ids:
            found.append(kept)
            left -= len(kept.ids)
    return packed_rows(reader, found)


def packed_rows(reader: Reader, found: Sequence[Rendered]) -> tuple[np.ndarray, np.ndarray]:
    """The same of what `reader` kept of some conversations."""
    if not found:
        raise UserError(
            f"no held-out conversation fits a row of {reader.room} tokens; expected at least one to evaluate on; try"
            " --eval-every -1 or other --tasks",
            "nothing-held-out",
        )
    rows = pack(np.array([len(one.ids) for one in found]), range(len(found)), reader.room)
    made = [side_by_side([found[i] for i in row], reader.room - 1, reader.tokenizer.bos) for row in rows]
    inputs, targets = (np.stack(half) for half in zip(*made))
    return inputs, targets
