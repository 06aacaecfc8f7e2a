"""Attention as its formula says: the reference that the other kernels are tested against, and queries over a cache.

Dims as in spec.py."""

import math

import torch
import torch.nn.functional as F

from nanolab.model.kernels.spec import AttnSpec, CachedKeys, seen, sink_per_head


def definition(
    q_BTHD: torch.Tensor,
    k_BSGD: torch.Tensor,
    v_BSGE: torch.Tensor,
    rules: AttnSpec,
    q_pos_BT: torch.Tensor,
    k_pos_BS: torch.Tensor,
    mask_BTS: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, T, H, E): the formula of `AttnSpec`, for queries at q_pos (B or 1, T) over keys at k_pos (B or 1, S) or (S,).

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


def _weights(s_BHTS: torch.Tensor, rules: AttnSpec) -> torch.Tensor:
    """exp(s_i) / (n + sum_j exp(s_j)), scaled by exp(-max) where max has no gradient: it cancels."""
    if rules.log_sink is None:
        return s_BHTS.softmax(-1)
    sink = sink_per_head(rules.log_sink, s_BHTS.size(1), s_BHTS.device).to(s_BHTS.dtype)[:, None, None]
    largest = torch.maximum(s_BHTS.amax(-1, keepdim=True), sink).detach()
    e = torch.exp(s_BHTS - largest)
    return e / (e.sum(-1, keepdim=True) + torch.exp(sink - largest))


def eager(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGE: torch.Tensor, rules: AttnSpec) -> torch.Tensor:
    """The definition in fp32 (of fp64, in fp64): the reference that the other kernels are tested against."""
    wide = torch.promote_types(q_BTHD.dtype, torch.float32)
    pos = torch.arange(q_BTHD.size(1), device=q_BTHD.device)
    return definition(q_BTHD.to(wide), k_BTGD.to(wide), v_BTGE.to(wide), rules, pos[None], pos).to(q_BTHD.dtype)


def cached(
    q_BTHD: torch.Tensor, k_BSGD: torch.Tensor, v_BSGE: torch.Tensor, rules: AttnSpec, keys: CachedKeys
) -> torch.Tensor:
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
