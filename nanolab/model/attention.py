"""Causal attention: kernels that compute it, and the layer around them.

Dims: B batch, T tokens, H query heads, G key/value heads, D head size, S keys. A window of w lets a query see itself and
the w keys before it. Every kernel has the signature (q_BTHD, k_BTGD, v_BTGD, window) -> y_BTHD and scores scaled by
1/sqrt(D).
"""

import math
from functools import lru_cache
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

from nanolab.config import GPTConfig
from nanolab.model.accounting import VE_GATE_CHANNELS
from nanolab.model.blocks import Linear, norm
from nanolab.model.positions import rotate



def visible(q_pos: torch.Tensor, k_pos: torch.Tensor, window: int) -> torch.Tensor:
    """Boolean (..., Tq, Tk): may the query at q_pos (..., Tq) see the key at k_pos (..., Tk)?"""
    distance = q_pos[..., :, None] - k_pos[..., None, :]
    return (distance >= 0) & (distance <= window)


def eager(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, window: int) -> torch.Tensor:
    """The definition, in fp32 with a T x T mask: the reference that the other kernels are tested against."""
    T, H, D = q_BTHD.shape[1:]
    q, k, v = (_heads_first(x, H).float() for x in (q_BTHD, k_BTGD, v_BTGD))
    pos = torch.arange(T, device=q.device)
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(~visible(pos, pos, window), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).to(q_BTHD.dtype)


def sdpa(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, window: int) -> torch.Tensor:
    """torch's scaled_dot_product_attention: flash kernels for full causal attention, a boolean mask for windows."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
    T = q.size(2)
    if window >= T - 1:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    else:
        pos = torch.arange(T, device=q.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(pos, pos, window), enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


BLOCK = 128  # query rows per block of `banded`: its scores (128 x up to T per head) stay in the processor's cache


class _Banded(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v on (N, T, D) tensors, N = batch x heads, one block of query rows at a time.

    Keys outside the causal band are never multiplied, so a full layer costs T^2/2 and a windowed one T*(window + BLOCK),
    forward and backward, and nothing of size T x T is made. Probabilities are kept for the backward pass. With P the
    probabilities and dY the upstream gradient: dV = P^T dY, dP = dY V^T, dS = P (dP - rowsum(dP P)), dQ = dS K, dK = dS^T Q.
    """

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        T, D = q.shape[1:]
        y, kept = torch.empty_like(q), []
        for lo, hi, first in _bands(T, window):
            mask = _band_mask(hi - lo, lo - first, window, q.dtype, q.device)
            scores = torch.baddbmm(mask, q[:, lo:hi], k[:, first:hi].mT, alpha=1 / math.sqrt(D))
            p = torch.softmax(scores, -1)
            y[:, lo:hi] = torch.bmm(p, v[:, first:hi])
            kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        q, k, v, *kept = ctx.saved_tensors
        T, D = q.shape[1:]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (lo, hi, first), p in zip(_bands(T, ctx.window), kept):
            dv[:, first:hi].baddbmm_(p.mT, dy[:, lo:hi])
            dp = torch.bmm(dy[:, lo:hi], v[:, first:hi].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, lo:hi] = torch.bmm(ds, k[:, first:hi]).mul_(1 / math.sqrt(D))
            dk[:, first:hi].baddbmm_(ds.mT, q[:, lo:hi], alpha=1 / math.sqrt(D))
        return dq, dk, dv, None


def _bands(T: int, window: int) -> list[tuple[int, int, int]]:
    """(first row, end row, first key) of each block of query rows."""
    return [(lo, min(lo + BLOCK, T), max(0, lo - window)) for lo in range(0, T, BLOCK)]


@lru_cache(maxsize=64)
def _band_mask(rows: int, before: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0 where a block of `rows` queries may see the `before` keys ahead of it and its own, -inf elsewhere."""
    keys = torch.arange(-before, rows, device=device)
    mask = torch.zeros(rows, before + rows, dtype=dtype, device=device)
    return mask.masked_fill_(~visible(keys[before:], keys, window), -math.inf)


def banded(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, window: int) -> torch.Tensor:
    """Blocks of rows against their band of keys, in the compute dtype: the fast path of CPUs, with its own backward."""
    B, T, H, D = q_BTHD.shape
    q, k, v = (_heads_first(x, H).reshape(B * H, T, D) for x in (q_BTHD, k_BTGD, v_BTGD))
    return _Banded.apply(q, k, v, window).view(B, H, T, D).transpose(1, 2)


def _heads_first(x_BTGD: torch.Tensor, n_head: int) -> torch.Tensor:
    """(B, H, T, D), each key/value head repeated for the query heads that share it."""
    x = x_BTGD.transpose(1, 2)
    return x if x.size(1) == n_head else x.repeat_interleave(n_head // x.size(1), dim=1)


def cached(q_BTHD: torch.Tensor, k_BSGD: torch.Tensor, v_BSGD: torch.Tensor, q_pos_BT: torch.Tensor, window: int) -> torch.Tensor:
    """Attention of new queries over a cache whose slot j of every row holds position j."""
    keys = torch.arange(k_BSGD.size(1), device=q_BTHD.device)
    mask = visible(q_pos_BT, keys.expand(q_pos_BT.size(0), -1), window)[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


KERNELS: dict[str, Callable[..., torch.Tensor]] = {"eager": eager, "sdpa": sdpa, "banded": banded}


def default_kernel(device_type: str) -> str:
    """The fastest kernel that every machine of this kind has."""
    return "banded" if device_type == "cpu" else "sdpa"


class CausalSelfAttention(nn.Module):
    """Multi-head attention with QK norm, rotary positions, optional sharing of key/value heads and value embeddings."""

    def __init__(self, config: GPTConfig, has_value_embedding: bool):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        self.qk_gain = config.qk_gain
        self.c_q = Linear(config.n_embd, self.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(VE_GATE_CHANNELS, self.n_kv_head) if has_value_embedding else None

    def forward(self, x, ve, cos, sin, window, kernel, cache=None, layer=0, q_pos=None) -> torch.Tensor:
        """x (B, T, C), ve (B, T, G*D) or None, cos/sin from `rope_angles` -> (B, T, C)."""
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if self.ve_gate is not None:  # value residual, arXiv 2410.17897, here from a table and gated per head in (0, 3)
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))
            v = v + gate[..., None] * ve.view(B, T, self.n_kv_head, self.head_dim)
        q, k = (norm(rotate(z, cos, sin)) for z in (q, k))
        q = q * self.qk_gain**2  # the gain of q and of k, in one multiplication
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if k.size(1) == T:  # nothing was cached before: plain causal attention
            y = kernel(q, k, v, window)
        else:
            y = cached(q, k, v, q_pos, window)
        return self.c_proj(y.reshape(B, T, -1))
