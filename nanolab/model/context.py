"""What one forward pass tells every layer of its tokens: positions, documents, the cache. Dims as in gpt.py."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nanolab.model.kernels.spec import AttnSpec, CachedKeys, seen

Angles = tuple[Tensor, Tensor]  # cos and sin, each (B, T, 1, rotated channels / 2)


@dataclass
class AttnContext:
    """One forward pass: what every layer needs to know of its tokens."""

    pos_BT: Tensor  # B is 1 where all rows are alike
    angles: Angles | None = None  # cos and sin, of the layers with rotary positions
    slopes: Tensor | None = None  # (H,)
    first_BT: Tensor | None = None  # first position of the token's document, with a document mask
    starts_BT: Tensor | None = None  # whether the token begins a document, with a document mask
    cache: Any = None  # inference.cache.KVCache
    by_window: dict[int, CachedKeys] = field(default_factory=dict)  # made once for all layers with the same window

    def keys(self, layer: int, rules: AttnSpec) -> CachedKeys:
        """Of the keys that `append` has returned for this layer."""
        if rules.window not in self.by_window:
            k_pos, all_stored = self.cache.positions(layer, self.pos_BT.size(1))
            all_seen = (
                all_stored and self.pos_BT.size(1) == 1 and k_pos.size(1) <= rules.window + 1 and rules.first_BT is None
            )
            self.by_window[rules.window] = CachedKeys(self.pos_BT, k_pos, seen(rules, self.pos_BT, k_pos), all_seen)
        return self.by_window[rules.window]

    def append(self, layer: int, a_BTGD: Tensor, b_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer caches of the new tokens -> the same of all tokens so far."""
        return (a_BTGD, b_BTGD) if self.cache is None else self.cache.append(layer, a_BTGD, b_BTGD)

    def carry(self, name: str, default: Tensor) -> Tensor:
        """What the last pass over these rows left under `name`, (B, 1, ...), or `default`."""
        return default if self.cache is None else self.cache.carry.get(name, default)

    def set_carry(self, name: str, value: Tensor) -> None:
        """Leave (B, 1, ...) for the next pass over these rows."""
        if self.cache is not None:
            self.cache.carry[name] = value.clone()  # not a view of all tokens of the pass


class Documents(nn.Module):
    """Where the document of each token begins, so that attention can stay inside it."""

    def __init__(self, bos: int):
        super().__init__()
        self.bos = bos

    def forward(self, ctx: AttnContext, idx: Tensor) -> AttnContext:
        ctx.starts_BT = idx == self.bos
        begun = torch.where(ctx.starts_BT, ctx.pos_BT, 0)
        before = ctx.carry("document", torch.zeros_like(begun[:, :1]))
        ctx.first_BT = torch.cat((before, begun), dim=1).cummax(1).values[:, 1:]
        ctx.set_carry("document", ctx.first_BT[:, -1:])
        return ctx
