"""Prefixes: snapshots of what the model has read, so that a conversation's next turn begins where the last one ended."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from nanolab.inference.cache import KVCache


class Prefixes:
    """Token sequences and the cache that a row of them leaves; what was used longest ago goes first when `room` bytes are full.

    A snapshot is worth something only to the weights that made it: whoever changes weights makes a new one of these.
    """

    def __init__(self, room: int):
        self.room, self.used = room, 0
        self.kept: OrderedDict[tuple[int, ...], tuple[KVCache, Tensor | None]] = OrderedDict()

    def find(self, prompt: tuple[int, ...]) -> tuple[KVCache, Tensor | None] | None:
        """The longest snapshot that the prompt begins with: its cache of one row, not to be written to, and the logits (V,)
        behind it where they were kept, without which a snapshot of the whole prompt is of no use."""
        fitting = [ids for ids, (_, logits) in self.kept.items() if (len(ids) < len(prompt) or logits is not None) and prompt[: len(ids)] == ids]
        if not fitting:
            return None
        best = max(fitting, key=len)
        self.kept.move_to_end(best)
        return self.kept[best]

    def keep(self, tokens: Sequence[int], cache: KVCache, logits: Tensor | None = None) -> None:
        """Take a cache of one row that has read `tokens`; one that alone is larger than the room is not kept."""
        ids = tuple(tokens)
        if ids in self.kept:
            self.kept.move_to_end(ids)
            return
        self.kept[ids] = cache, logits
        self.used += size(*self.kept[ids])
        while self.used > self.room:
            self.used -= size(*self.kept.popitem(last=False)[1])


def size(cache: KVCache, logits: Tensor | None) -> int:
    return cache.nbytes + (0 if logits is None else logits.nbytes)
