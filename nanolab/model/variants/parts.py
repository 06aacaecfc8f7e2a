"""Parts of the embedding and the residual stream. A part is a class, a line of PARTS and a flag.

It says under which `name` the model holds it (and checkpoints its parameters), at which `seam` it is called, and as
`group` or `groups` which optimizer group of the recipe `dial` trains its parameters; `init_constants` sets their
initial values. What a token has to know of those before it goes through `ctx.carry` and `set_carry`, so that it works
across the passes over a cache. Seams, in the order of a pass:

  embedding  (e_BTC, idx_BT, ctx) -> e_BTC
  layer      (x_BTC, x0_BTC, layer) -> x_BTC, before each layer; x0 is what the first one got
  values     (None, idx_BT, layer, dtype) -> (B, T, G*D) or None for a layer's values, which `mix` of that layer takes
  end        (x, middle) -> x after the last layer, (B, T, C) or (K, C); middle is the stream after the middle layer

Dims: B batch, T tokens, C width, G key/value heads, D head size."""

from typing import Any

import torch
from torch import Tensor, nn

from nanolab.model.config import GPTConfig, padded_vocab
from nanolab.model.context import AttnContext
from nanolab.model.gpt import Embedding, Identity, Linear

SMEAR_CHANNELS = 24  # leading embedding channels that steer the smear gate
VE_GATE_CHANNELS = 12  # leading channels of the normed input that steer a value embedding's gate


class Smear(nn.Module):
    """e_t + scale sigmoid(w . e_t) e_{t-1}: each embedding takes a gated share of the one before it (modded-nanogpt).

    The first token of a row has none before it, and with a document mask neither has the first of a document.
    """

    name, seam, group = "smear", "embedding", "smear_backout"

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.gate = Linear(SMEAR_CHANNELS, 1, kind="gate")
        self.scale = nn.Parameter(torch.empty(1))

    def init_constants(self) -> None:
        self.scale.zero_()

    def forward(self, e_BTC: Tensor, idx: Tensor, ctx: AttnContext) -> Tensor:
        previous = torch.cat((ctx.carry("embedding", torch.zeros_like(e_BTC[:, :1])), e_BTC[:, :-1]), dim=1)
        ctx.set_carry("embedding", e_BTC[:, -1:])
        if ctx.starts_BT is not None:
            previous = previous.masked_fill(ctx.starts_BT[..., None], 0)
        gate = self.scale[0] * torch.sigmoid(self.gate(e_BTC[..., :SMEAR_CHANNELS]))
        return e_BTC + gate * previous


class ResidualScalars(nn.Module):
    """x <- r_i x + z_i x0 before layer i, with x0 the embedding (modded-nanogpt; the idea is Highway's, arXiv
    1505.00387).
    """

    name, seam, groups = "lambdas", "layer", {"resid": "resid_lambdas", "x0": "x0_lambdas"}

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.resid = nn.Parameter(torch.empty(c.n_layer))
        self.x0 = nn.Parameter(torch.empty(c.n_layer))

    def init_constants(self) -> None:
        n = len(self.resid)
        depth = torch.linspace(0, 1, n) if n > 1 else torch.zeros(1)
        self.resid.copy_(1.15 - 0.10 * depth)
        self.x0.copy_(0.20 - 0.15 * depth)

    def forward(self, x: Tensor, x0: Tensor, layer: int) -> Tensor:
        return self.resid[layer] * x + self.x0[layer] * x0  # fp32 scalars: their steps are finer than bf16


class ValueEmbeds(nn.ModuleDict):
    """v + 3 sigmoid(W x[:12]) e with e a row of a table, by token, on every second layer, counted from the last. Value
    residual learning, arXiv 2410.17897, from a table.
    """

    name, seam, group = "value_embeds", "values", "value_embeds"

    def __init__(self, c: GPTConfig):
        size = padded_vocab(c), c.n_kv_head * c.head_dim
        super().__init__({str(i): Embedding(*size, kind="values") for i in range((c.n_layer - 1) % 2, c.n_layer, 2)})

    def forward(self, ve: None, idx: Tensor, layer: int, dtype: torch.dtype) -> Tensor | None:
        return self[str(layer)].look_up(idx, dtype) if str(layer) in self else ve

    @staticmethod
    def mix(c: GPTConfig, layer: int) -> nn.Module:
        """The module (v_BTGD, x_BTC, ve) -> v_BTGD of a layer."""
        return ValueMix(c.n_kv_head) if layer % 2 == (c.n_layer - 1) % 2 else Identity()


class ValueMix(nn.Module):
    """A layer's share of `ValueEmbeds`: v + 3 sigmoid(W x[:12]) ve."""

    def __init__(self, n_kv_head: int):
        super().__init__()
        self.gate = Linear(VE_GATE_CHANNELS, n_kv_head, kind="gate")

    def forward(self, v_BTGD: Tensor, x_BTC: Tensor, ve: Tensor) -> Tensor:
        gate = 3 * torch.sigmoid(self.gate(x_BTC[..., :VE_GATE_CHANNELS]))
        return v_BTGD + gate[..., None] * ve.view(v_BTGD.shape)


class Backout(nn.Module):
    """x - scale b with b the stream after the middle layer: what served only the middle leaves before the head
    (modded-nanogpt).
    """

    name, seam, group = "backout", "end", "smear_backout"

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))

    def init_constants(self) -> None:
        self.scale.fill_(0.2)

    def forward(self, x: Tensor, middle: Tensor) -> Tensor:
        return x - self.scale[0] * middle


# flag -> part; parts of one seam are called in this order
PARTS: dict[str, Any] = {
    "smear": Smear,
    "residual_scalars": ResidualScalars,
    "value_embeds": ValueEmbeds,
    "backout": Backout,
}
