"""Blocks of query rows against their band of keys: attention for CPUs, and for whatever no other kernel can do."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from nanolab.model.kernels.spec import AttnSpec, heads_first, sink_per_head, visible

BLOCK = 128  # query rows per block: a block's scores (128 x up to T per head) stay in the processor's cache


class _Banded(torch.autograd.Function):
    """Attention on (N, T, D) tensors, N = batch x heads, one block of query rows at a time.

    Keys outside the causal band are never multiplied, so a full layer costs T^2/2 and a windowed one T*(window +
    BLOCK), forward and backward, and nothing of size T x T is made. Probabilities are kept for the backward pass. With
    P the probabilities and dY the upstream gradient: dV = P^T dY, dP = dY V^T, dS = P (dP - rowsum(dP P)), dQ = dS K,
    dK = dS^T Q.

    With a sink, k and v come with one more row in front, and every band begins one row earlier: the score of that row
    is ln n whatever it held, its probability is noted and then set to 0, so that all products above stay as they are.
    The sink's probability p0 meets a value of 0, hence d ln n = -sum over rows of p0 (dY . Y)."""

    @staticmethod
    def forward(
        ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_sink: torch.Tensor | None, rules: AttnSpec
    ) -> torch.Tensor:
        """q (N, T, D), k (N, T, D), v (N, T, E), log_sink (H,) or None -> (N, T, E). With a sink k and v have T + 1
        rows.
        """
        T, extra = q.size(1), k.size(1) - q.size(1)
        y, kept, learns = q.new_empty(*q.shape[:2], v.size(2)), [], any(ctx.needs_input_grad)
        for lo, hi, first in _bands(T, rules.window):
            keys = slice(first, hi + extra)
            mask = _band_mask(hi - lo, lo - first + extra, rules.window, q.dtype, q.device)
            tanh, p0, keep = None, None, None
            if rules.softcap:
                tanh = torch.bmm(q[:, lo:hi], k[:, keys].mT).mul_(rules.scale / rules.softcap).tanh_()
                scores = torch.add(mask, tanh, alpha=rules.softcap)
            else:
                scores = torch.baddbmm(mask, q[:, lo:hi], k[:, keys].mT, alpha=rules.scale)
            if rules.slopes is not None or rules.first_BT is not None:
                _add_positions(scores, rules, lo, hi, first - extra)
            if extra:
                scores.view(-1, len(log_sink), *scores.shape[1:])[..., 0] = log_sink[:, None]
            p = torch.softmax(scores, -1)
            if extra:
                p0 = p[..., 0].clone() if ctx.needs_input_grad[3] else None
                p[..., 0] = 0
            if rules.dropout:
                dropped, keep = torch.native_dropout(p, rules.dropout, True)
                y[:, lo:hi] = torch.bmm(dropped, v[:, keys])
            else:
                y[:, lo:hi] = torch.bmm(p, v[:, keys])
            if learns:
                kept += [p, tanh, p0, keep]
        ctx.save_for_backward(q, k, v, y if ctx.needs_input_grad[3] else None, log_sink, *kept)
        ctx.rules = rules
        return y

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        q, k, v, y, log_sink, *kept = ctx.saved_tensors
        T, extra, rules, d_sink = q.size(1), k.size(1) - q.size(1), ctx.rules, None
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        if y is not None:
            d_sink, dy_y = torch.zeros_like(log_sink), (dy * y).sum(-1, dtype=log_sink.dtype)
        for i, (lo, hi, first) in enumerate(_bands(T, rules.window)):
            p, tanh, p0, keep = kept[4 * i : 4 * i + 4]
            keys = slice(first, hi + extra)
            dp = torch.bmm(dy[:, lo:hi], v[:, keys].mT)
            if keep is None:
                dv[:, keys].baddbmm_(p.mT, dy[:, lo:hi])
            else:
                grow = 1 / (1 - rules.dropout)
                dv[:, keys].baddbmm_(torch.ops.aten.native_dropout_backward(p, keep, grow).mT, dy[:, lo:hi])
                dp = torch.ops.aten.native_dropout_backward(dp, keep, grow)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            if tanh is not None:
                ds -= ds * tanh * tanh
            if d_sink is not None:
                d_sink -= (p0 * dy_y[:, lo:hi]).view(-1, len(d_sink), hi - lo).sum((0, 2))
            dq[:, lo:hi] = torch.bmm(ds, k[:, keys]).mul_(rules.scale)
            dk[:, keys].baddbmm_(ds.mT, q[:, lo:hi], alpha=rules.scale)
        return dq, dk, dv, d_sink, None


def _bands(T: int, window: int) -> list[tuple[int, int, int]]:
    """(first row, end row, first key) of each block of query rows."""
    return [(lo, min(lo + BLOCK, T), max(0, lo - window)) for lo in range(0, T, BLOCK)]


@lru_cache(maxsize=64)
def _band_mask(rows: int, before: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0 where a block of `rows` queries may see the `before` keys ahead of it and its own, -inf elsewhere."""
    with torch.inference_mode(False):  # a pass with a gradient may come later
        keys = torch.arange(-before, rows, device=device)
        mask = torch.zeros(rows, before + rows, dtype=dtype, device=device)
        return mask.masked_fill_(~visible(keys[before:], keys, window), -math.inf)


def _add_positions(scores: torch.Tensor, rules: AttnSpec, lo: int, hi: int, first: int) -> None:
    """ALiBi and the document mask, onto the scores (N, rows, keys) of queries lo..hi-1 against keys first..hi-1."""
    q_pos, k_pos = torch.arange(lo, hi, device=scores.device), torch.arange(first, hi, device=scores.device)
    if rules.slopes is not None:
        H = len(rules.slopes)
        penalty = rules.slopes[:, None, None] * (q_pos[:, None] - k_pos)
        scores.view(-1, H, *scores.shape[1:]).sub_(penalty.to(scores.dtype))
    if rules.first_BT is not None:
        unseen = k_pos < rules.first_BT[:, None, lo:hi, None]
        scores.view(len(rules.first_BT), -1, *scores.shape[1:]).masked_fill_(unseen, -math.inf)


def banded(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGE: torch.Tensor, rules: AttnSpec) -> torch.Tensor:
    """(B, T, H, E) by blocks, in the compute dtype: scores and ln n are rounded to it, the softmax inside is fp32."""
    B, T, H, _ = q_BTHD.shape
    q, k, v = (heads_first(x, H) for x in (q_BTHD, k_BTGD, v_BTGE))
    sink = None
    if rules.log_sink is not None:
        sink = sink_per_head(rules.log_sink, H, q.device)
        k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
    q, k, v = (x.reshape(B * H, *x.shape[2:]) for x in (q, k, v))
    return _Banded.apply(q, k, v, sink, rules).view(B, H, T, -1).transpose(1, 2)
