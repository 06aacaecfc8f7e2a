"""KVCache: what a model keeps of the tokens it has read, so that each new token costs one token's work.

Rows are independent texts, each at its own length. Dims: B rows, T new tokens, S slots in use, G heads, D channels. Slot j
of a row holds position j. What is kept is the layer's business: keys and values, or in MLA a rotary key and a latent.
"""

import torch
from torch import Tensor

from nanolab.config import GPTConfig, UserError
from nanolab.model.accounting import cached_shapes

FIRST_CAPACITY = 64  # slots of a cache that was given no size


class KVCache:
    """Two zero-filled tensors (rows, capacity, G, D) per layer that double when they are full, up to `limit` tokens.

    limit: default the model's sequence length; a token past it raises UserError. Unused slots are zero, never
    uninitialised: attention weighs them with 0, and 0 * NaN would be NaN. Rows are dense, 0 to B - 1; there may be room for more.
    """

    def __init__(self, config: GPTConfig, rows: int = 1, *, capacity: int = 0, limit: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        self.config, self.dtype = config, dtype
        self.limit = limit or config.sequence_len
        self.capacity = min(capacity or FIRST_CAPACITY, self.limit)
        self.lengths = [0] * rows  # the same as pos, on the host: reading pos would wait for the device
        self.pos = torch.zeros(rows, dtype=torch.int64, device=device)
        self.left: dict[str, Tensor] = {}  # name -> (B, 1, ...): what parts of the model left for the next pass
        self.k, self.v = ([torch.zeros(rows, self.capacity, *shape, dtype=dtype, device=device) for shape in shapes] for shapes in zip(*cached_shapes(config)))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.k, *self.v, *self.left.values()))

    def append(self, layer: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new tokens of every row behind its last one; returns this layer's keys and values (B, S, G, D).

        S is the longest row's length with the new tokens; a shorter row's slots past its own end are not to be attended.
        """
        B, T = k_BTGD.shape[:2]
        S = max(self.lengths) + T
        self.reserve(S)
        k, v = self.k[layer][:B], self.v[layer][:B]
        if min(self.lengths) == S - T:  # rows of one length: a plain copy
            k[:, S - T : S], v[:, S - T : S] = k_BTGD, v_BTGD
        else:
            rows = torch.arange(B, device=k.device)[:, None]
            slots = self.pos[:, None] + torch.arange(T, device=k.device)
            k[rows, slots], v[rows, slots] = k_BTGD, v_BTGD
        return k[:, :S], v[:, :S]

    def advance(self, T: int) -> None:
        """Count T tokens as stored; the model calls this once, after its last layer."""
        self.lengths = [n + T for n in self.lengths]
        self.pos += T

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens. Raises UserError past the limit, before anything is written."""
        if length > self.limit:
            raise UserError(f"token {length} does not fit a cache of {self.limit} tokens; expected prompt and reply within it; shorten one of them, e.g. --max-tokens")
        if length > self.capacity:
            self.capacity = min(max(length, 2 * self.capacity), self.limit)
            self._resize(self.k[0].size(0))

    def _resize(self, rows: int) -> None:
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros(rows, self.capacity, *old.shape[2:])
                tensors[layer][: len(old), : old.size(1)] = old

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; the others' memory is freed."""
        index = torch.tensor(rows, device=self.pos.device)
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.index_select(0, index)
        self.pos = self.pos[index]
        self.left = {name: value[index] for name, value in self.left.items()}
        self.lengths = [self.lengths[r] for r in rows]

    def put(self, rows: list[int], source: "KVCache", source_rows: list[int]) -> None:
        """Replace `rows` by `source_rows` of another cache; one source row may fill several rows."""
        S = max(source.lengths[r] for r in source_rows)
        self.reserve(S)
        to, of = torch.tensor(rows, device=self.pos.device), torch.tensor(source_rows, device=self.pos.device)
        for mine, theirs in ((self.k, source.k), (self.v, source.v)):
            for layer in range(len(mine)):
                mine[layer][to, :S] = theirs[layer][of, :S]
        self.pos[to] = source.pos[of]
        for name, value in source.left.items():
            if name not in self.left:
                self.left[name] = value.new_zeros(len(self.lengths), *value.shape[1:])
            self.left[name][to] = value[of]
        for r, s in zip(rows, source_rows):
            self.lengths[r] = source.lengths[s]

    def add(self, source: "KVCache", source_row: int) -> None:
        """A row of another cache as the new last row. Room for rows doubles when it is used up."""
        n = len(self.lengths)
        if n == self.k[0].size(0):
            self._resize(2 * n or 1)
        self.lengths.append(0)
        self.pos = torch.cat((self.pos, self.pos.new_zeros(1)))
        self.left = {name: torch.cat((value, value[:1])) for name, value in self.left.items() if n}
        self.put([n], source, [source_row])

    def remove(self, row: int) -> None:
        """The last row takes this row's place."""
        last = len(self.lengths) - 1
        if row != last:
            S = self.lengths[last]
            for tensors in (self.k, self.v):
                for x in tensors:
                    x[row, :S] = x[last, :S]
            for x in (self.pos, *self.left.values()):
                x[row] = x[last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.pos, self.left = self.pos[:last], {name: value[:last] for name, value in self.left.items()}

    def snapshot(self, row: int) -> "KVCache":
        """A copy of one row in a cache of its own, no larger than the row."""
        copy = KVCache(self.config, 1, capacity=self.lengths[row], limit=self.limit, dtype=self.dtype, device=self.pos.device)
        copy.put([0], self, [row])
        return copy
