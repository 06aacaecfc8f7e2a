"""Parts of the embedding and of the residual stream.

Dims: B batch, T tokens, C width, G key/value heads, D head size."""

import torch
from torch import Tensor, nn

from nanolab.model.blocks import Linear
from nanolab.model.config import GPTConfig

SMEAR_CHANNELS = 24  # leading embedding channels that steer the smear gate


class Smear(nn.Module):
    """e_t + scale sigmoid(w . e_t) e_{t-1}: each embedding takes a gated share of the one before it (modded-nanogpt).

    The first token of a row has none before it, and with a document mask neither has the first of a document.
    """

    def __init__(self):
        super().__init__()
        self.gate = Linear(SMEAR_CHANNELS, 1)
        self.scale = nn.Parameter(torch.empty(1))

    def init_constants(self) -> None:
        self.scale.zero_()

    def forward(self, e_BTC: Tensor, reading) -> Tensor:
        previous = torch.cat((reading.left("embedding", torch.zeros_like(e_BTC[:, :1])), e_BTC[:, :-1]), dim=1)
        reading.leave("embedding", e_BTC[:, -1:])
        if reading.starts_BT is not None:
            previous = previous.masked_fill(reading.starts_BT[..., None], 0)
        gate = self.scale[0] * torch.sigmoid(self.gate(e_BTC[..., :SMEAR_CHANNELS]))
        return e_BTC + gate * previous


class ResidualScalars(nn.Module):
    """x <- r_i x + z_i x0 before layer i, with x0 the embedding (modded-nanogpt; the idea is Highway's, arXiv
    1505.00387).
    """

    def __init__(self, n_layer: int):
        super().__init__()
        self.resid = nn.Parameter(torch.empty(n_layer))
        self.x0 = nn.Parameter(torch.empty(n_layer))

    def init_constants(self) -> None:
        n = len(self.resid)
        depth = torch.linspace(0, 1, n) if n > 1 else torch.zeros(1)
        self.resid.copy_(1.15 - 0.10 * depth)
        self.x0.copy_(0.20 - 0.15 * depth)

    def forward(self, x: Tensor, x0: Tensor, layer: int) -> Tensor:
        return self.resid[layer] * x + self.x0[layer] * x0  # fp32 scalars: their steps are finer than bf16


class Backout(nn.Module):
    """x - scale b with b the stream after the middle layer: what served only the middle leaves before the head
    (modded-nanogpt).
    """

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))

    def init_constants(self) -> None:
        self.scale.fill_(0.2)

    def forward(self, x: Tensor, middle: Tensor) -> Tensor:
        return x - self.scale[0] * middle


VE_GATE_CHANNELS = 12  # leading channels of the normed input that steer a value embedding's gate


def has_value_embedding(c: GPTConfig, layer: int) -> bool:
    """Every second layer, counted from the last."""
    return c.value_embeds and layer % 2 == (c.n_layer - 1) % 2


class ValueMix(nn.Module):
    """v + 3 sigmoid(W x[:12]) e with e a row of a table, by token. Value residual learning, arXiv 2410.17897, from a
    table.
    """

    def __init__(self, n_kv_head: int):
        super().__init__()
        self.gate = Linear(VE_GATE_CHANNELS, n_kv_head)

    def forward(self, v_BTGD: Tensor, x_BTC: Tensor, ve: Tensor) -> Tensor:
        gate = 3 * torch.sigmoid(self.gate(x_BTC[..., :VE_GATE_CHANNELS]))
        return v_BTGD + gate[..., None] * ve.view(v_BTGD.shape)
