"""PrefixCache: the KV caches of earlier token sequences, so that shared prefixes are computed once."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from nanolab.inference.cache import KVCache
from nanolab.runtime import out_of_memory

log = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    cache: KVCache  # of one row, not to be written to
    logits: Tensor | None  # (V,) after the tokens, where they were kept

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes + (0 if self.logits is None else self.logits.nbytes)


class PrefixCache:
    """Token sequences and the KV cache of each, within `room` bytes.

    Evicts first what is a prefix of another entry, then the least recently used. Snapshots are only valid for the
    weights that produced them; create a new cache after changing weights.
    """

    def __init__(self, room: int):
        self.room, self.used = room, 0
        # The least recently used first. An OrderedDict would hash each key, all its tokens, when it is walked over.
        self.kept: dict[tuple[int, ...], Snapshot] = {}
        self.contained: set[int] = set()  # id() of those that a longer one begins with, so that no key is hashed

    def find(self, prompt: tuple[int, ...]) -> Snapshot | None:
        """The longest snapshot that the prompt begins with; one of the whole prompt must have logits."""
        best: tuple[int, ...] = ()
        for ids, found in self.kept.items():
            if (
                len(best) < len(ids) <= len(prompt)
                and prompt[len(ids) - 1] == ids[-1]
                and begins(prompt, ids)
                and (len(ids) < len(prompt) or found.logits is not None)
            ):
                best = ids
        if not best:
            return None
        self.kept[best] = self.kept.pop(best)
        return self.kept[best]

    def keep(self, tokens: Sequence[int], nbytes: int, make: Callable[[], tuple[KVCache, Tensor | None]]) -> None:
        """Keep what `make` returns: the cache of one row that has read `tokens`, and logits. Does nothing, and evicts
        nothing, for one larger than the room.
        """
        ids = tuple(tokens)
        if ids in self.kept:
            self.kept[ids] = self.kept.pop(ids)
            return
        if nbytes > self.room:
            return
        while self.used + nbytes > self.room:
            oldest = next(iter(self.kept))
            self.drop(next((old for old, found in self.kept.items() if id(found) in self.contained), oldest))
        try:
            new = self.kept[ids] = Snapshot(*make())
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            log.warning("no memory for a snapshot: all %d were dropped", len(self.kept))
            return self.clear()
        self.used += new.nbytes
        n, last = len(ids), ids[-1]
        for old, found in self.kept.items():  # thousands, for each prompt: the last token decides, without a call
            if len(old) < n:
                if ids[len(old) - 1] == old[-1] and begins(ids, old):
                    self.contained.add(id(found))
            elif old[n - 1] == last and len(old) > n and begins(old, ids):
                self.contained.add(id(new))

    def drop(self, ids: tuple[int, ...]) -> None:
        found = self.kept.pop(ids)
        self.used -= found.nbytes
        self.contained.discard(id(found))

    def forget(self, tokens: Sequence[int]) -> None:
        """Drop every snapshot that `tokens` begin with."""
        for ids in [ids for ids in self.kept if tuple(tokens[: len(ids)]) == ids]:
            self.drop(ids)

    def clear(self) -> None:
        self.kept.clear()
        self.contained.clear()
        self.used = 0


def begins(long: tuple[int, ...], short: tuple[int, ...]) -> bool:
    """Whether `long`, which is not shorter, begins with `short`. The last token decides most pairs without copying the
    others.
    """
    return long[len(short) - 1] == short[-1] and long[: len(short)] == short
