"""torch's flex_attention: any score and mask, compiled into one kernel. CUDA only in training, since it has no CPU backward."""

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from nanolab.model.rules import Rules, lacking, sink_per_head


def run(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGE: torch.Tensor, rules: Rules) -> torch.Tensor:
    """(B, T, H, E). The sink scales softmax's output by S / (n + S), S = exp(lse); flex's lse, unlike flash's, has a gradient."""
    T, H = q_BTHD.shape[1:3]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGE))
    blocks = _blocks(T, rules.window, q.device) if rules.first_BT is None else _document_blocks(rules.first_BT, rules.window)
    attend = _compiled(flex_attention) if q.is_cuda else flex_attention
    y, aux = attend(
        q, k, v, score_mod=_score_mod(rules), block_mask=blocks, scale=rules.scale, enable_gqa=k.size(1) != H, return_aux=AuxRequest(lse=True)
    )
    if rules.log_sink is not None:
        y = (y * torch.sigmoid(aux.lse - sink_per_head(rules.log_sink, H, q.device)[:, None])[..., None]).to(y.dtype)
    return y.transpose(1, 2)


def _score_mod(rules: Rules):
    """Softcap, then ALiBi, or None for neither."""
    softcap, slopes = rules.softcap, rules.slopes
    if not softcap and slopes is None:
        return None

    def modify(score, b, h, q_pos, k_pos):
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[h] * (q_pos - k_pos)
        return score

    return modify


@lru_cache(maxsize=64)
def _blocks(T: int, window: int, device: torch.device) -> BlockMask:
    """Which blocks of the score matrix hold visible pairs; the same for every batch."""

    def sees(b, h, q_pos, k_pos):
        return (q_pos >= k_pos) & (q_pos - k_pos <= window)

    return _create(device)(sees, None, None, T, T, device=device)


def _document_blocks(first_BT: torch.Tensor, window: int) -> BlockMask:
    """The same inside documents; these differ from batch to batch."""

    def sees(b, h, q_pos, k_pos):
        return (q_pos >= k_pos) & (q_pos - k_pos <= window) & (k_pos >= first_BT[b, q_pos])

    B, T = first_BT.shape
    return _create(first_BT.device)(sees, B, None, T, T, device=first_BT.device)


def _create(device: torch.device):
    """Compiled, a block mask is made without its T x T pairs in memory."""
    return _compiled(create_block_mask) if device.type == "cuda" else create_block_mask


@lru_cache(maxsize=None)
def _compiled(function):
    return torch.compile(function, dynamic=False)


def missing(needs: frozenset[str], device_type: str, dtype: torch.dtype) -> str:
    if device_type != "cuda":
        return f"it trains on CUDA only, and --device-type is {device_type}"
    return lacking(needs & {"dropout"}, "on cuda")
