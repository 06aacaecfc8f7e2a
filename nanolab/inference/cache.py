"""KVCache: what a model keeps of the tokens it has read, so that each new token costs one token's work.

Rows are independent texts, each at its own length. Dims: B rows, T new tokens, S keys, G heads, D channels. What is
kept is the layer's business: keys and values, or in MLA a rotary key and a latent. Position p of a row lies in slot p
mod R, where R is one more than the layer's window: a ring that holds what the next token may see. Without a window R is
`limit`."""

import math

import torch
from torch import Tensor

from nanolab.cli import UserError
from nanolab.model.accounting import cached_shapes
from nanolab.model.config import GPTConfig, windows

FIRST_CAPACITY = 64  # slots of a cache that was given no size
NOWHERE = 1 << 40  # the position of a slot that holds nothing: no query sees it


def ring_sizes(c: GPTConfig, limit: int) -> list[int]:
    """R of each layer."""
    return [min(w + 1, limit) if w < c.sequence_len else limit for w in windows(c)]


def most_bytes(c: GPTConfig, rows: int, dtype: torch.dtype) -> int:
    """Of the keys and values of a cache in which so many rows have come, each as long as the model reads; room for rows
    doubles.
    """
    places = 1 << (rows - 1).bit_length()
    values = sum(
        min(ring, c.sequence_len) * math.prod(shape)
        for pair, ring in zip(cached_shapes(c), ring_sizes(c, c.sequence_len))
        for shape in pair
    )
    return places * values * dtype.itemsize


def ring_positions(newest_B: Tensor, slots: int, ring: int) -> Tensor:
    """(B, slots): the position that each slot holds in rows whose last position is `newest`, NOWHERE for none."""
    newest = newest_B[:, None]
    held = newest - (newest - torch.arange(slots, device=newest_B.device)) % ring
    return held.masked_fill(held < 0, NOWHERE)


class KVCache:
    """Two zero-filled tensors (rows, slots, G, D) per layer that double when they are full, up to the ring or `limit`
    tokens.

    limit: default the model's sequence length; a token past it raises UserError. Unused slots are zero, never
    uninitialised: attention weighs them with 0, and 0 * NaN would be NaN. Rows are dense, 0 to B - 1; there may be room
    for more."""

    def __init__(
        self,
        config: GPTConfig,
        rows: int = 1,
        *,
        capacity: int = 0,
        limit: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.config, self.dtype = config, dtype
        self.limit = limit or config.sequence_len
        self.rings = ring_sizes(config, self.limit)
        self.capacity = min(capacity or FIRST_CAPACITY, self.limit)
        self.lengths = [0] * rows  # the same as pos, on the host: reading pos would wait for the device
        self.pos = torch.zeros(rows, dtype=torch.int64, device=device)
        self.carry: dict[str, Tensor] = {}  # name -> (B, 1, ...): what parts of the model carry to the next pass
        self.memory = object()  # another one when keys and values lie elsewhere, of any layer
        self._parts: dict[tuple[int, int], list[Tensor]] = {}
        self._places: dict[int, Tensor] = {}  # by ring: the slots of the pass's new tokens, counted through all rows
        shapes = list(zip(cached_shapes(config), self.rings))
        self.k, self.v = (
            [torch.zeros(rows, min(self.capacity, ring), *pair[i], dtype=dtype, device=device) for pair, ring in shapes]
            for i in range(2)
        )

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.k, *self.v, *self.carry.values()))

    def row_bytes(self, row: int) -> int:
        """Of a snapshot of that row."""
        values = sum(
            min(self.lengths[row], ring) * math.prod(x.shape[2:])
            for ring, pair in zip(self.rings, zip(self.k, self.v))
            for x in pair
        )
        return values * self.k[0].element_size() + sum(x[row].nbytes for x in self.carry.values())

    def wipe(self, row: int) -> None:
        """Zeros in place of what the row holds, since whatever comes in its place weighs its unused slots with 0, and 0
        * NaN is NaN.
        """
        for x in (*self.k, *self.v):
            x[row].zero_()

    def append(self, layer: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new tokens of every row after its last one; returns the keys and values (B, S, G, D) that their
        queries may see.

        `positions` says where these are: in slot order while nothing is overwritten, and for one new token; else what
        the ring held, and then the new ones. For one new token they are as stored, for several in the dtype of those.
        """
        (B, T), ring, longest = k_BTGD.shape[:2], self.rings[layer], max(self.lengths)
        self.reserve(longest + T)
        k, v = self.k[layer], self.v[layer]
        if B < k.size(0):
            k, v = k[:B], v[:B]
        if longest + T <= ring or T == 1:
            self._store(ring, (k, v), (k_BTGD, v_BTGD))
            S = min(longest + T, ring)
            return (k[:, :S], v[:, :S]) if T == 1 else (k[:, :S].to(k_BTGD.dtype), v[:, :S].to(v_BTGD.dtype))
        held = min(longest, ring)
        both = (
            torch.cat((k[:, :held].to(k_BTGD.dtype), k_BTGD), dim=1),
            torch.cat((v[:, :held].to(v_BTGD.dtype), v_BTGD), dim=1),
        )
        self._store(ring, (k, v), (k_BTGD, v_BTGD))
        return both

    def positions(self, layer: int, T: int) -> tuple[Tensor, bool]:
        """(B or 1, S) positions of the keys that `append` has just returned for T new tokens, and whether every slot of
        them is in use in every row, where T is 1."""
        ring, longest = self.rings[layer], max(self.lengths)
        level = min(self.lengths) == longest
        if longest + T <= ring:
            return torch.arange(longest + T, device=self.pos.device)[None], level
        pos = self.pos[:1] if level else self.pos
        if T == 1:
            return ring_positions(pos, ring, ring), level
        new = pos[:, None] + torch.arange(T, device=pos.device)
        return torch.cat((ring_positions(pos - 1, min(longest, ring), ring), new), dim=1), False

    def _store(self, ring: int, to: tuple[Tensor, Tensor], new_BTGD: tuple[Tensor, Tensor]) -> None:
        T = new_BTGD[0].size(1)
        at, skip = self.lengths[0] % ring, max(0, T - ring)
        if at + T <= ring and min(self.lengths) == max(self.lengths):  # rows of one length: a plain copy
            for old, new in zip(to, new_BTGD):
                old[:, at : at + T] = new
            return
        if ring not in self._places:
            rows, steps = (torch.arange(n, m, device=self.pos.device) for n, m in ((0, len(self.lengths)), (skip, T)))
            self._places[ring] = (rows[:, None] * to[0].size(1) + (self.pos[:, None] + steps) % ring).flatten()
        for old, new in zip(to, new_BTGD):
            slots = old.view(old.size(0) * old.size(1), *old.shape[2:])
            slots.index_copy_(0, self._places[ring], new[:, skip:].flatten(0, 1).to(old.dtype))

    def parts(self, rows: int, slots: int) -> list[Tensor]:
        """The first slots of the first rows: of the keys of all layers, then of the values. Made once, and let go of
        when they move.
        """
        if (rows, slots) not in self._parts:
            self._parts[rows, slots] = [x[:rows, :slots] for x in (*self.k, *self.v)]
        return self._parts[rows, slots]

    def _move(self) -> None:
        self.memory, self._parts = object(), {}

    def advance(self, T: int) -> None:
        """Count T tokens as stored; the model calls this once, after its last layer."""
        self.lengths = [n + T for n in self.lengths]
        self.pos += T
        self._places = {}

    def reserve(self, length: int, rows: int = 0) -> None:
        """Make room for rows of `length` tokens, and for `rows` of them. Raises UserError past the limit, before
        anything is written.
        """
        if length > self.limit:
            raise UserError(
                f"token {length} does not fit a cache of {self.limit} tokens; expected prompt and reply within it;"
                " shorten one of them, e.g. --max-tokens"
            )
        if length > self.capacity or rows > self.k[0].size(0):
            if length > self.capacity:
                self.capacity = min(max(length, 2 * self.capacity), self.limit)
            self._resize(max(rows, self.k[0].size(0)))

    def _resize(self, rows: int) -> None:
        self._move()
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                slots = min(self.capacity, self.rings[layer])
                if (rows, slots) != old.shape[:2]:
                    tensors[layer] = old.new_zeros(rows, slots, *old.shape[2:])
                    tensors[layer][: len(old), : old.size(1)] = old

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; the others' memory is freed."""
        self._move()
        index = torch.tensor(rows, device=self.pos.device)
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.index_select(0, index)
        self.pos = self.pos[index]
        self.carry = {name: value[index] for name, value in self.carry.items()}
        self.lengths = [self.lengths[r] for r in rows]

    def put(self, rows: list[int], source: "KVCache", source_rows: list[int]) -> None:
        """Replace `rows` by `source_rows` of another cache; one source row may fill several rows."""
        S = max(source.lengths[r] for r in source_rows)
        self.reserve(S)
        one = len(rows) == 1  # a plain copy: by a tensor of one index it took a CPU four times as long
        to, of = (some[0] if one else torch.tensor(some, device=self.pos.device) for some in (rows, source_rows))
        for mine, theirs in ((self.k, source.k), (self.v, source.v)):
            for layer, ring in enumerate(self.rings):
                mine[layer][to, : min(S, ring)] = theirs[layer][of, :S]
        self.pos[to] = source.pos[of]
        for name, value in source.carry.items():
            if name not in self.carry:
                self.carry[name] = value.new_zeros(len(self.lengths), *value.shape[1:])
            self.carry[name][to] = value[of]
        for r, s in zip(rows, source_rows):
            self.lengths[r] = source.lengths[s]

    def add(self, source: "KVCache", source_row: int) -> None:
        """A row of another cache as the new last row. Room for rows doubles when it is used up."""
        n = len(self.lengths)
        if n == self.k[0].size(0):
            self._resize(2 * n or 1)
        self.lengths.append(0)
        self.pos = torch.cat((self.pos, self.pos.new_zeros(1)))
        self.carry = {name: torch.cat((value, value[:1])) for name, value in self.carry.items() if n}
        self.put([n], source, [source_row])

    def remove(self, row: int) -> None:
        """The last row takes this row's place."""
        last = len(self.lengths) - 1
        if row != last:
            S = self.lengths[last]
            for x in (*self.k, *self.v):
                x[row, :S] = x[last, :S]
            for x in (self.pos, *self.carry.values()):
                x[row] = x[last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.pos, self.carry = self.pos[:last], {name: value[:last] for name, value in self.carry.items()}

    def snapshot(self, row: int) -> "KVCache":
        """A copy of one row in a cache of its own, no larger than the row."""
        copy = KVCache(
            self.config, 1, capacity=self.lengths[row], limit=self.limit, dtype=self.dtype, device=self.pos.device
        )
        copy.put([0], self, [row])
        return copy
