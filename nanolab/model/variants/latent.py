"""Multi-head latent attention: keys and values from one small cached vector per token. Also the table of attention
kinds.

Dims as in gpt.py, and r the latent's width, R the rotary width. Per token and layer the cache keeps r + R
numbers."""

import math

import torch
from torch import Tensor, nn

from nanolab.model.config import GPTConfig, entry, rope_of
from nanolab.model.context import AttnContext
from nanolab.model.gpt import AttentionOp, CausalSelfAttention, Linear
from nanolab.model.variants.positions import rope_dim


def ranks(c: GPTConfig) -> tuple[int, int]:
    """Widths of the latents of queries and of keys and values."""
    r = c.mla_kv_rank or 4 * c.head_dim
    return c.mla_q_rank or min(3 * r, c.n_embd), r


def rotary_width(c: GPTConfig, layer: int) -> int:
    """Channels of the rotary query and key; none on a layer without rotary positions (Kimi Linear, arXiv
    2510.26692).
    """
    return rope_dim(c) if entry(c, "positions").uses_rope(c, layer) else 0


class Rotary(nn.Module):
    """The rotary part of queries, per head from their latent, and of keys, one for all heads from the input."""

    def __init__(self, c: GPTConfig, layer: int):
        super().__init__()
        q_rank, R, bias = ranks(c)[0], rotary_width(c, layer), c.has_bias("qkv")
        self.shape, self.rope = (c.n_head, R), rope_of(c, layer)
        self.c_q = Linear(q_rank, c.n_head * R, bias)
        self.c_k = Linear(c.n_embd, R, bias)

    def forward(self, c_q: Tensor, x_BTC: Tensor, ctx: AttnContext) -> tuple[Tensor, Tensor]:
        q, k = self.c_q(c_q).unflatten(-1, self.shape), self.c_k(x_BTC)[:, :, None]
        return self.rope(q, ctx.angles), self.rope(k, ctx.angles)


class NoRotary(nn.Module):
    """The same, zero channels wide."""

    def __init__(self, c: GPTConfig, layer: int):
        super().__init__()
        self.n_head = c.n_head

    def forward(self, c_q: Tensor, x_BTC: Tensor, ctx: AttnContext) -> tuple[Tensor, Tensor]:
        B, T, _ = x_BTC.shape
        return x_BTC.new_empty(B, T, self.n_head, 0), x_BTC.new_empty(B, T, 1, 0)


class LatentAttention(nn.Module):
    """c = W_DKV x; k = [W_UK c; RoPE(W_KR x)], v = W_UV c; cached: c and the rotary key. DeepSeek-V2, arXiv 2405.04434.

    Few new tokens are decoded with W_UK and W_UV absorbed: q.(W_UK c) = (W_UK^T q).c, so that the latent itself serves
    as the one key/value head, and nothing is computed per cached token but the scores.
    """

    def __init__(self, c: GPTConfig, layer: int):
        super().__init__()
        H, D, C, bias = c.n_head, c.head_dim, c.n_embd, c.has_bias("qkv")
        (q_rank, r), R = ranks(c), rotary_width(c, layer)
        self.layer, self.shape = layer, (H, D)
        self.c_dq = Linear(C, q_rank, bias)
        self.c_uq = Linear(q_rank, H * D, bias)
        self.c_dkv = Linear(C, r, bias)
        self.c_uk = Linear(r, H * D)  # no bias: it could not be absorbed
        self.c_uv = Linear(r, H * D)
        self.rotary = (Rotary if R else NoRotary)(c, layer)
        self.qk_norm = entry(c, "qk_norm")(c, q_rank, r)  # on the latents
        self.gain = c.qk_gain**2
        self.core = AttentionOp(c, layer, D + R, D)
        self.gate = entry(c, "gate")(c)
        self.c_proj = Linear(H * D, C, c.has_bias("out"), kind="residual")
        # Per cached token and head, expanding costs 2 r D multiplications and saves T (2 r - 2 D): absorb up to this T.
        self.absorb_up_to = r * D // (r - D) if r > D else math.inf

    @staticmethod
    def score_widths(c: GPTConfig, layer: int) -> tuple[int, int]:
        return c.head_dim + rotary_width(c, layer), c.head_dim

    @staticmethod
    def decode_widths(c: GPTConfig, layer: int) -> tuple[int, int]:
        r = ranks(c)[1]
        return r + rotary_width(c, layer), r

    @staticmethod
    def cached_shapes(c: GPTConfig, layer: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (1, rotary_width(c, layer)), (1, ranks(c)[1])

    def forward(self, x_BTC: Tensor, ve: None, ctx: AttnContext) -> Tensor:
        B, T, _ = x_BTC.shape
        c_q, latent = self.qk_norm(self.c_dq(x_BTC), self.c_dkv(x_BTC))
        q_content = self.c_uq(c_q).view(B, T, *self.shape)
        q_rotary, k_rotary = self.rotary(c_q, x_BTC, ctx)
        k_rotary, latent = ctx.append(self.layer, k_rotary, latent[:, :, None])
        attend = self.absorbed if latent.size(1) > T and T <= self.absorb_up_to else self.naive
        y = attend(q_content * self.gain, q_rotary * self.gain, k_rotary, latent, ctx)
        return self.c_proj(self.gate(y, x_BTC).reshape(B, T, -1))

    def naive(self, q_content: Tensor, q_rotary: Tensor, k_rotary: Tensor, latent: Tensor, ctx: AttnContext) -> Tensor:
        """Keys and values of every head, made from the latents."""
        latent, k_rotary = latent[:, :, 0].to(q_content.dtype), k_rotary.to(q_content.dtype)
        k_content = self.c_uk(latent).unflatten(-1, self.shape)
        v = self.c_uv(latent).unflatten(-1, self.shape)
        k = torch.cat((k_content, k_rotary.expand(-1, -1, self.shape[0], -1)), dim=-1)
        return self.core(torch.cat((q_content, q_rotary), dim=-1), k, v, ctx)

    def absorbed(
        self, q_content: Tensor, q_rotary: Tensor, k_rotary: Tensor, latent: Tensor, ctx: AttnContext
    ) -> Tensor:
        """Queries brought to the latents, and the mean latent of each head brought to its values."""
        w_uk, w_uv = (up.weight.to(q_content.dtype).unflatten(0, self.shape) for up in (self.c_uk, self.c_uv))
        q = torch.cat((torch.einsum("bthd,hdr->bthr", q_content, w_uk), q_rotary), dim=-1)
        y = self.core(q, torch.cat((latent, k_rotary), dim=-1), latent, ctx)
        return torch.einsum("bthr,hdr->bthd", y, w_uv)


ATTENTIONS = {
    "mha": CausalSelfAttention,
    "gqa": CausalSelfAttention,
    "mqa": CausalSelfAttention,
    "mla": LatentAttention,
}
