"""Flash attention with a sink, built on ATen's flash forward and backward and their log-sum-exp.

Dims as in spec.py."""

import math

import torch

from nanolab.model.kernels.spec import AttnSpec, check_flash, heads_first, seen, sink_per_head


def flash_attention(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, rules: AttnSpec) -> torch.Tensor:
    """Windows and sinks on flash kernels. On CPU heads are repeated; on CUDA their size must be a multiple of 8."""
    T, H = q_BTHD.shape[1:3]
    sink = None if rules.log_sink is None else sink_per_head(rules.log_sink, H, q_BTHD.device)
    if q_BTHD.device.type != "cpu":
        check_flash(q_BTHD, k_BTGD, v_BTGD, "sdpa")
        return _Flash.apply(q_BTHD, k_BTGD, v_BTGD, sink, None, rules)
    q, k, v = (heads_first(x, H).transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
    mask = None
    if rules.needs(T) & {"window", "documents"}:
        pos = torch.arange(T)
        unseen = ~seen(rules, pos[None], pos)[:, None]
        mask = torch.zeros(unseen.shape, dtype=q.dtype).masked_fill_(unseen, -math.inf)
    return _Flash.apply(q, k, v, sink, mask, rules)


class _Flash(torch.autograd.Function):
    """The flash primitives that return the log-sum-exp of each row of scores, with a sink by its means.

    y = y0 r with y0 the softmax's output and r = sigmoid(lse - ln n) = S / (n + S), S = exp(lse). The backward kernel
    makes p = exp(s - lse) and dS = p (dP - rowsum(dY Y)) from whatever lse and Y it is given; with lse' = ln(S + n) and
    y these are the weights with the sink and their gradient, exactly. The sink itself has weight 1 - r and value 0, so
    d ln n = -sum over rows of (1 - r) (dY . Y). The lse that torch returns has no gradient: scaling its output by it
    would silently lose the sink's share of dq and dk, hence this backward."""

    @staticmethod
    def forward(
        ctx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_sink: torch.Tensor | None,
        mask: torch.Tensor | None,
        rules: AttnSpec,
    ):
        """q (B, T, H, D), k and v (B, T, G, D), log_sink (H,), mask additive -> (B, T, H, D)."""
        y, lse, *random = _flash_forward(q, k, v, mask, rules)
        r = None
        if log_sink is not None:
            sink = log_sink[:, None].to(lse.dtype)
            r = torch.sigmoid(lse - sink).mT[..., None]  # (B, T, H, 1)
            y, lse = y.mul_(r), torch.logaddexp(lse, sink)
        ctx.save_for_backward(q, k, v, y, lse, r, mask, *random)
        ctx.rules = rules
        return y

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        q, k, v, y, lse, r, mask, *random = ctx.saved_tensors
        d_sink = None
        if ctx.needs_input_grad[3]:
            d_sink = -((1 - r) * (dy * y).sum(-1, keepdim=True, dtype=r.dtype)).sum((0, 1, 3))
        return *_flash_backward(dy, q, k, v, y, lse, mask, random, ctx.rules), d_sink, None, None


def _flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, rules: AttnSpec
) -> tuple[torch.Tensor, ...]:
    """(y (B, T, H, D), lse (B, H, T) in fp32, what else the backward kernel wants)."""
    T = q.size(1)
    if q.device.type != "cpu":
        flash = torch.ops.aten._flash_attention_forward.default
        return flash(q, k, v, None, None, T, T, 0.0, True, False, scale=rules.scale, **_sides(rules, T))[:4]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y, lse = flash(q, k, v, 0.0, mask is None, attn_mask=mask, scale=rules.scale)
    return y.transpose(1, 2), lse


def _flash_backward(dy, q, k, v, y, lse, mask, random, rules: AttnSpec) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv in the layout of q, k, v."""
    T = q.size(1)
    if q.device.type != "cpu":
        flash = torch.ops.aten._flash_attention_backward.default
        return flash(
            dy.contiguous(),
            q,
            k,
            v,
            y,
            lse,
            None,
            None,
            T,
            T,
            0.0,
            True,
            *random,
            scale=rules.scale,
            **_sides(rules, T),
        )
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    dy, q, k, v, y = (x.transpose(1, 2) for x in (dy, q, k, v, y))
    grads = flash(dy, q, k, v, y, lse, 0.0, mask is None, attn_mask=mask, scale=rules.scale)
    return tuple(g.transpose(1, 2) for g in grads)


def _sides(rules: AttnSpec, T: int) -> dict[str, int]:
    """How far a query of the CUDA kernel sees to its left and right; nothing said is the whole row."""
    return {"window_size_left": rules.window, "window_size_right": 0} if rules.window < T - 1 else {}
