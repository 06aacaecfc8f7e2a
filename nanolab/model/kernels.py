"""Kernels of causal attention: the definition, what computes it fast on which machine, and the choice between them.

Dims as in rules.py. Every kernel has the signature (q_BTHD, k_BTGD, v_BTGE, rules) -> y_BTHE, for T queries and T keys
at positions 0..T-1; `cached` is for new queries over a cache. To add a kernel: a function, a `missing`, a line in
KERNELS."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanolab.cli import UserError, nearest
from nanolab.model import flash3, flex
from nanolab.model.banded import banded
from nanolab.model.rules import (
    FLAGS,
    NEEDS,
    Capability,
    Keys,
    Rules,
    before_ampere,
    capability_of,
    check_flash,
    heads_first,
    lacking,
    on_cuda,
    seen,
    sink_per_head,
    visible,
)

__all__ = ["KERNELS", "NEEDS", "Kernel", "Rules", "cached", "choose_kernel", "definition", "eager", "sdpa", "visible"]

HALF = (torch.bfloat16, torch.float16)


def definition(
    q_BTHD: torch.Tensor,
    k_BSGD: torch.Tensor,
    v_BSGE: torch.Tensor,
    rules: Rules,
    q_pos_BT: torch.Tensor,
    k_pos_BS: torch.Tensor,
    mask_BTS: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, T, H, E): the formula of `Rules`, for queries at q_pos (B or 1, T) over keys at k_pos (B or 1, S) or (S,).

    mask: what `seen` gives for these, where it is known.

    Products are in the dtype of q, the softmax in fp32 (of fp64, in fp64). Its exponentials are taken from the largest
    of the scores and ln n, so that neither very negative scores nor a row that sees no key is a problem where there is
    a sink; the latter gives 0. Without a sink every query must see a key."""
    (B, T, H, D), (S, G) = q_BTHD.shape, k_BSGD.shape[1:3]
    # N: query heads of a group, times T
    q_BGND = q_BTHD.view(B, T, G, H // G, D).permute(0, 2, 3, 1, 4).reshape(B, G, -1, D)
    s = (q_BGND @ k_BSGD.permute(0, 2, 3, 1)).view(B, H, T, S)
    s = s.to(torch.promote_types(s.dtype, torch.float32)) * rules.scale
    if rules.softcap:
        s = rules.softcap * torch.tanh(s / rules.softcap)
    if rules.slopes is not None:
        s = s - rules.slopes[:, None, None] * (q_pos_BT[:, :, None] - torch.atleast_2d(k_pos_BS)[:, None])[:, None]
    mask = seen(rules, q_pos_BT, k_pos_BS) if mask_BTS is None else mask_BTS
    p = _weights(s.masked_fill(~mask[:, None], -math.inf), rules)
    if rules.dropout:
        p = F.dropout(p, rules.dropout)
    return (p.to(q_BTHD.dtype).view(B, G, -1, S) @ v_BSGE.transpose(1, 2)).view(B, H, T, -1).transpose(1, 2)


def _weights(s_BHTS: torch.Tensor, rules: Rules) -> torch.Tensor:
    """exp(s_i) / (n + sum_j exp(s_j)), scaled by exp(-max) where max has no gradient: it cancels."""
    if rules.log_sink is None:
        return s_BHTS.softmax(-1)
    sink = sink_per_head(rules.log_sink, s_BHTS.size(1), s_BHTS.device).to(s_BHTS.dtype)[:, None, None]
    largest = torch.maximum(s_BHTS.amax(-1, keepdim=True), sink).detach()
    e = torch.exp(s_BHTS - largest)
    return e / (e.sum(-1, keepdim=True) + torch.exp(sink - largest))


def eager(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGE: torch.Tensor, rules: Rules) -> torch.Tensor:
    """The definition in fp32 (of fp64, in fp64): the reference that the other kernels are tested against."""
    wide = torch.promote_types(q_BTHD.dtype, torch.float32)
    pos = torch.arange(q_BTHD.size(1), device=q_BTHD.device)
    return definition(q_BTHD.to(wide), k_BTGD.to(wide), v_BTGE.to(wide), rules, pos[None], pos).to(q_BTHD.dtype)


def cached(q_BTHD: torch.Tensor, k_BSGD: torch.Tensor, v_BSGE: torch.Tensor, rules: Rules, keys: Keys) -> torch.Tensor:
    """(B, T, H, E): T new queries over what a cache holds, which may be wider than they are: products are in its
    dtype.
    """
    wide_BTHD = q_BTHD.to(k_BSGD.dtype)
    if rules.log_sink is not None or rules.slopes is not None or rules.softcap:
        return definition(wide_BTHD, k_BSGD, v_BSGE, rules, keys.q_pos_BT, keys.k_pos_BS, keys.mask_BTS).to(
            q_BTHD.dtype
        )
    q, k, v = (x.transpose(1, 2) for x in (wide_BTHD, k_BSGD, v_BSGE))
    mask = None if keys.all_seen else keys.mask_BTS[:, None]
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=rules.scale, enable_gqa=bool(q.size(1) != k.size(1))
    )
    return y.transpose(1, 2).to(q_BTHD.dtype)


def sdpa(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGE: torch.Tensor, rules: Rules) -> torch.Tensor:
    """torch's own fused kernels. Windows and sinks go to the flash primitives beneath them, or take a mask on CPU and
    MPS.

    On GPUs all else goes to scaled_dot_product_attention, which takes flash or the memory-efficient kernel. The latter,
    for fp32 and for GPUs before Ampere, has no shared heads and wants head sizes of whole 16 bytes: torch would
    silently make the T x T scores instead."""
    T, size, cuda = q_BTHD.size(1), v_BTGE.size(-1), on_cuda(q_BTHD)
    needs = rules.needs(T)
    q, k, v = _equal_sizes(q_BTHD, k_BTGD, v_BTGE, multiple=8 if cuda else 1)
    if "sink" in needs or (cuda and "window" in needs):
        return _flash(q, k, v, rules)[..., :size]
    if cuda and q.dtype != torch.bfloat16:
        k, v = (heads_first(x, q.size(2)).transpose(1, 2) for x in (k, v))
    mask = None
    if needs & {"window", "documents"}:
        pos = torch.arange(T, device=q.device)
        mask = seen(rules, pos[None], pos)[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=rules.dropout,
        is_causal=mask is None,
        scale=rules.scale,
        enable_gqa=q.size(1) != k.size(1),
    )
    return y.transpose(1, 2)[..., :size]


def _equal_sizes(*x: torch.Tensor, multiple: int = 1) -> list[torch.Tensor]:
    """All with the largest one's head size, by zeros: these change neither q.k nor, once cut off, the output."""
    size = max(z.size(-1) for z in x)
    size += -size % multiple
    return [F.pad(z, (0, size - z.size(-1))) if z.size(-1) < size else z for z in x]


def _flash(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, rules: Rules) -> torch.Tensor:
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
        rules: Rules,
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, rules: Rules
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


def _flash_backward(dy, q, k, v, y, lse, mask, random, rules: Rules) -> tuple[torch.Tensor, ...]:
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


def _sides(rules: Rules, T: int) -> dict[str, int]:
    """How far a query of the CUDA kernel sees to its left and right; nothing said is the whole row."""
    return {"window_size_left": rules.window, "window_size_right": 0} if rules.window < T - 1 else {}


def _sdpa_missing(needs: frozenset[str], device_type: str, dtype: torch.dtype, capability: Capability) -> str:
    unable, where = {"alibi", "softcap"}, f"on {device_type} in {str(dtype).removeprefix('torch.')}"
    if device_type == "cuda":
        old = before_ampere(capability)
        if old and dtype == torch.bfloat16:
            return (
                "it computes in bfloat16 from compute capability 8.0 on, and this GPU has"
                f" {capability[0]}.{capability[1]}; try NANOLAB_DTYPE=float16"
            )
        unable |= {"documents"} if dtype in HALF and not old else {"documents", "window", "sink"}
        where += f" before compute capability 8.0 (this GPU has {capability[0]}.{capability[1]})" if old else ""
    elif device_type != "cpu":
        unable |= {"sink"}
    on_flash = needs & ({"sink", "window"} if device_type == "cuda" else {"sink"})
    if "dropout" in needs and on_flash:  # the flash primitives are called without it
        return lacking({"dropout"}, f"beside {' and '.join(f'{need} ({FLAGS[need]})' for need in sorted(on_flash))}")
    return lacking(needs & unable, where)


@dataclass(frozen=True)
class Kernel:
    # (q_BTHD, k_BTGD, v_BTGE, rules) -> y_BTHE
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Rules], torch.Tensor]
    # (needs, device type, dtype, capability) -> why it cannot train with these, or ""
    missing: Callable[[frozenset[str], str, torch.dtype, Capability], str]


def _nothing(needs: frozenset[str], device_type: str, dtype: torch.dtype, capability: Capability) -> str:
    return ""


KERNELS = {
    "eager": Kernel(eager, _nothing),
    "sdpa": Kernel(sdpa, _sdpa_missing),
    "banded": Kernel(banded, _nothing),
    "flex": Kernel(flex.run, flex.missing),
    "fa3": Kernel(flash3.run, flash3.missing),
}
PREFERENCE = {  # fastest first
    "cuda": ("fa3", "sdpa", "flex", "banded", "eager"),
    "mps": ("sdpa", "banded", "eager"),
    "cpu": ("banded", "sdpa", "eager"),
}


def choose_kernel(
    needs: frozenset[str], device_type: str, dtype: torch.dtype, asked: str = "", capability: Capability = None
) -> str:
    """The fastest kernel that can do what a layer needs on this kind of machine, or `asked` if that one can.

    capability: of the GPU; default: this machine's. Raises UserError that names --attn-kernel, the flags that need more
    than it has, and the kernels that have it."""
    capability = capability or capability_of(device_type)
    able = [
        name for name in PREFERENCE[device_type] if not KERNELS[name].missing(needs, device_type, dtype, capability)
    ]
    if not asked:
        return able[0]
    if asked not in KERNELS:
        raise UserError(
            f"--attn-kernel {asked!r} is unknown; expected one of {', '.join(KERNELS)}{nearest(asked, list(KERNELS))}"
        )
    if reason := KERNELS[asked].missing(needs, device_type, dtype, capability):
        raise UserError(
            f"--attn-kernel {asked} cannot run this model: {reason}; expected one of {', '.join(able)}; try"
            f" --attn-kernel {able[0]}"
        )
    return asked


def kernel_line(
    layers: list[tuple[str, frozenset[str]]],
    device_type: str,
    dtype: torch.dtype,
    asked: str = "",
    capability: Capability = None,
) -> str:
    """'sdpa x 9 (not fa3: it needs ...), flex x 3 (...)': the kernel of every layer, and why not a faster one. layers:
    (kernel, needs).
    """
    capability = capability or capability_of(device_type)

    def why(name: str, needs: frozenset[str]) -> str:
        if asked:
            return " (--attn-kernel)"
        faster = PREFERENCE[device_type][: PREFERENCE[device_type].index(name)]
        reasons = "; ".join(
            f"not {other}: {KERNELS[other].missing(needs, device_type, dtype, capability)}" for other in faster
        )
        return f" ({reasons})" if reasons else ""

    counts = Counter((name, why(name, needs)) for name, needs in layers)
    return ", ".join(f"{name} x {n}{text}" for (name, text), n in counts.items())
