"""Conversations as they go into rows, and what is known of all of them before a run."""

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nanolab.cli import UserError, nearest
from nanolab.data.chat import Message, Rendered, render
from nanolab.data.tokenizer import Tokenizer
from nanolab.runtime import Runtime
from nanolab.terminal import progress


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
