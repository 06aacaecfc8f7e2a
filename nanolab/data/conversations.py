"""Conversations -> rows of T+1 tokens: whole conversations side by side, each exactly once an epoch, padding where none
fits.

All conversations are measured once, before the run (`survey`). From their lengths alone follows which of them share
which row of which epoch (`pack`), so the number of rows is known, row g is the same on any number of ranks, and the
state of a run is g. A row takes the conversation that has waited longest, then again and again the longest that fits
the room left. One that is longer than a row never waits: it is cropped, left out or refused before anything is packed.

Rows of pretraining text can be mixed in (`replay`), evenly and at fixed places. Dims: B rows, T tokens, N
conversations."""

import hashlib
import threading
import zlib
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from nanolab.cli import UserError, nearest
from nanolab.data.chat import Message, Rendered, render
from nanolab.data.packing import Batch, PackedBatches, Turns, share_rows
from nanolab.data.tokenizer import Tokenizer
from nanolab.runtime import Runtime, progress

# Conversations that wait for a row they fit. Padding of rows of 512 with 64, 256, 1024 places: 2.6, 1.4, 0.9 % (25,000
# chats and school problems of 276 tokens in the mean); but the more wait, the more alike are those that are left at an
# epoch's end.
PLACES = 256
ARRIVAL_BITS = 32
IGNORED = -1  # a target that is not counted


class Conversations(Protocol):
    """What is asked of a task or mixture. Conversation i is the same whenever it is asked for."""

    def __len__(self) -> int: ...
    def example(self, i: int) -> Any: ...  # has `messages`, see chat.py


def crop(rendered: Rendered, room: int, end: int) -> Rendered:
    """The beginning of a conversation up to its last whole assistant turn within `room` tokens; empty if there is none.

    end: the id of assistant_end, which text never yields.
    """
    ids, mask = rendered
    cut = next((i for i in range(min(room, len(ids)), 0, -1) if ids[i - 1] == end), 0)
    return Rendered(ids[:cut], mask[:cut])


def drop(rendered: Rendered, room: int, end: int) -> Rendered:
    """Nothing of it."""
    return Rendered([], [])


# --long: what becomes of a conversation that is longer than a row. refuse: it is counted, then `survey` raises.
LONG: dict[str, Callable[[Rendered, int, int], Rendered]] = {"crop": crop, "drop": drop, "refuse": drop}


class Reader:
    """Conversation i as it goes into a row of `room` tokens."""

    def __init__(self, conversations: Conversations, tokenizer: Tokenizer, room: int, long: str = "crop") -> None:
        if long not in LONG:
            raise UserError(
                f"--long {long!r} is unknown; expected one of"
                f" {', '.join(LONG)}{nearest(long, list(LONG), prefix='--long ')}"
            )
        self.conversations, self.tokenizer, self.room, self.long = conversations, tokenizer, room, long
        self.end = tokenizer.special("<|assistant_end|>")

    def __len__(self) -> int:
        return len(self.conversations)

    def read(self, i: int) -> tuple[Rendered, int]:
        """(what is kept of conversation i, perhaps nothing; the tokens it had)."""
        return self.fit(self.conversations.example(i).messages)

    def fit(self, messages: Sequence[Message]) -> tuple[Rendered, int]:
        """The same of these messages. Nothing is kept where no turn would be trained on."""
        rendered = render(self.tokenizer, messages)
        n = len(rendered.ids)
        kept = rendered if n <= self.room else LONG[self.long](rendered, self.room, self.end)
        return (kept if any(kept.mask) else Rendered([], [])), n


@dataclass(frozen=True)
class Survey:
    """What is known of all conversations before the run."""

    lengths: np.ndarray  # (N,) int32: tokens kept; 0 where nothing is
    n_tokens: int  # kept, of all conversations
    n_supervised: int  # those of them that are trained on
    n_cropped: int
    n_dropped: int  # longer than a row, with nothing left of them
    longest: int  # tokens, before cropping
    room: int  # T + 1
    fingerprint: str  # of every token and its mask
    n_turns: int = 0  # the assistant's, of all conversations, before cropping
    n_masked: int = 0  # of these, marked as not to be trained on
    n_silent: int = 0  # conversations left out because every turn that fits a row is marked so
    n_disobeyed: int = 0  # users' and system's turns marked as to be trained on, which they are not

    @property
    def n_kept(self) -> int:
        return int((self.lengths > 0).sum())


def survey(reader: Reader, runtime: Runtime) -> Survey:
    """Read every conversation once, the ranks sharing the work. A collective call.

    Raises UserError where there is nothing to train on, and for long conversations with `--long refuse`.
    """
    n = len(reader)
    mine = range(runtime.rank, n, runtime.world_size)
    # tokens before and after, those trained on, checksum; turns, those masked, those disobeyed
    found = np.zeros((len(mine), 7), dtype=np.int64)
    for row, i in enumerate(progress(mine, "measuring conversations", len(mine))):
        messages = reader.conversations.example(i).messages
        (ids, mask), before = reader.fit(messages)
        turns = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
        disobeyed = sum(message.get("weight", 0) for message in messages if message["role"] != "assistant")
        checksum = zlib.crc32(np.array([ids, mask], dtype=np.int32).tobytes())
        found[row] = before, len(ids), sum(mask), checksum, len(turns), turns.count(0), disobeyed
    table = np.zeros((n, 7), dtype=np.int64)
    for rank, part in enumerate(runtime.gather_objects(found)):
        table[rank :: runtime.world_size] = part
    before, kept, trained, _, turns, masked, disobeyed = table.T
    silent = (kept == 0) & (masked > 0) & ((before <= reader.room) | (masked == turns))
    too_long = np.flatnonzero(before > reader.room)
    if len(too_long) and reader.long == "refuse":
        raise UserError(
            f"{len(too_long)} of {n} conversations are longer than a row: number {too_long[0]} has"
            f" {before[too_long[0]]} tokens, the longest {before.max()}; expected at most {reader.room}; try"
            f" --max-seq-len {before.max() - 1} if the model was trained on such rows, or --long crop"
        )
    if not kept.any():
        seen = (
            f"all {n} conversations are longer than a row of {reader.room} tokens, without an assistant's turn that"
            " fits"
            if n
            else "there are no conversations"
        )
        if silent.any():
            seen = (
                f"no assistant's turn of {n} conversations is left to train on: {masked.sum()} of {turns.sum()} turns"
                " are marked as not to be trained on"
            )
        advice = (
            "mark fewer turns, or try a longer --max-seq-len"
            if silent.any()
            else "try a longer --max-seq-len"
            if n
            else "check --tasks"
        )
        raise UserError(
            f"{seen}; expected at least one to train on; {advice}",
            "nothing-to-train-on",
            conversations=n,
            turns=int(turns.sum()),
            masked=int(masked.sum()),
        )
    digest = hashlib.sha256(
        repr((reader.room, reader.long)).encode() + table[:, :4].astype("<i8").tobytes()
    ).hexdigest()
    return Survey(
        kept.astype(np.int32),
        int(kept.sum()),
        int(trained.sum()),
        int(((kept > 0) & (kept < before)).sum()),
        int(((kept == 0) & ~silent).sum()),
        int(before.max()),
        reader.room,
        digest,
        int(turns.sum()),
        int(masked.sum()),
        int(silent.sum()),
        int(disobeyed.sum()),
    )


def pack(lengths: np.ndarray, order: Sequence[int], room: int, places: int = PLACES) -> Iterator[list[int]]:
    """The conversations of each row: each of `order` once, none longer than `room`. O(log places) per conversation.

    A row begins with the one that has waited longest, so none waits for more than `places` rows.
    """
    queue = iter(order)
    keys: list[int] = []  # (length, arrival) in one integer, sorted
    waiting: dict[int, int] = {}  # key -> conversation, in order of arrival

    arrivals = 0
    while True:
        row: list[int] = []
        left = room
        while True:
            while len(keys) < places and (i := next(queue, None)) is not None:
                key = int(lengths[i]) << ARRIVAL_BITS | arrivals
                arrivals += 1
                insort(keys, key)
                waiting[key] = i
            if not row:
                if not keys:
                    return
                key = next(iter(waiting))
            elif place := bisect_right(keys, left << ARRIVAL_BITS | (1 << ARRIVAL_BITS) - 1):
                key = keys[place - 1]
            else:
                break
            del keys[bisect_left(keys, key)]
            row.append(waiting.pop(key))
            left -= key >> ARRIVAL_BITS
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


class Place(NamedTuple):
    """Where a `ConversationBatches` stands after a batch."""

    rows: int  # handed out so far by all ranks together
    replay: Any  # where the text stands; None without
    labels: list[list[int]]  # the conversations in each row of the last batch; a row of text or padding has none


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
        raw = hashlib.blake2b(repr((self.seed, epoch)).encode(), digest_size=16).digest()
        # a frozen stream (NEP 19)
        order = np.random.RandomState(np.frombuffer(raw, dtype="<u4")).permutation(len(self.survey.lengths))
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
        return Batch(inputs, targets, int((targets >= 0).sum()))

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

    def snapshot(self) -> Place:
        """Where this rank stands now; quick enough to be taken after every batch."""
        return Place(self.rows, self.replay.snapshot() if self.replay else None, self._labels)

    def local_state(self, at: Place) -> dict[str, Any]:
        """The state as JSON: the same on every rank."""
        text = self.replay.merge([self.replay.local_state(at.replay)]) if self.replay else None
        return {"rows": at.rows, "conversations": self.survey.fingerprint, "replay": text}

    def merge(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state of those of all ranks."""
        return states[0]

    def state_dict(self) -> dict[str, Any]:
        return self.local_state(self.snapshot())

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

    @property
    def epoch(self) -> float:
        return self.epoch_at(self.snapshot())

    def epoch_at(self, at: Place) -> float:
        return self.epochs_in(at.rows)

    def epochs_in(self, rows: int) -> float:
        """Passes over the conversations in so many rows of the run."""
        row = rows - self._texts(rows)
        epoch = self._epoch_of(row)
        if self.epochs is not None and epoch >= self.epochs:
            return float(self.epochs)
        first, end = self.conversation_rows(epoch), self.conversation_rows(epoch + 1)
        return epoch + (row - first) / (end - first)

    def where(self) -> str:
        """The conversations in the last batch, for messages."""
        return self.where_at(self.snapshot())

    def where_at(self, at: Place) -> str:
        found = sorted(i for row in at.labels for i in row)
        text = ["text"] if self.replay and not all(at.labels) else []
        return (
            " and ".join([f"conversations {', '.join(map(str, found))} of the mixture"] * bool(found) + text)
            or "padding"
        )


def check_share(share: float) -> Fraction:
    """The share of rows that are text, exact. Raises UserError unless it is at least 0 and below 1."""
    if not 0 <= share < 1:
        raise UserError(
            f"--replay is {share:g}; expected a share of the rows, at least 0 and below 1; try --replay 0.2"
        )
    return Fraction(share).limit_denominator(10_000)


class StagePlace(NamedTuple):
    """Where a `Staged` stands after a batch."""

    rows: int  # of all stages, handed out so far by all ranks together
    stage: int
    at: Place


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
        return self.parts[self.stage][1].next()

    def snapshot(self) -> StagePlace:
        at = self.parts[self.stage][1].snapshot()
        return StagePlace(sum(rows for rows, _ in self.parts[: self.stage]) + at.rows, self.stage, at)

    def local_state(self, at: StagePlace) -> dict[str, Any]:
        return {"stage": at.stage, **self.parts[at.stage][1].local_state(at.at)}

    def merge(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return states[0]

    def state_dict(self) -> dict[str, Any]:
        return self.local_state(self.snapshot())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage = state["stage"]
        self.parts[self.stage][1].load_state_dict(state)

    def epoch_at(self, at: StagePlace) -> float:
        """Passes over the conversations of the stage."""
        return self.parts[at.stage][1].epoch_at(at.at)

    def where_at(self, at: StagePlace) -> str:
        stage = f"stage {at.stage + 1}: " if len(self.parts) > 1 else ""
        return stage + self.parts[at.stage][1].where_at(at.at)


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
