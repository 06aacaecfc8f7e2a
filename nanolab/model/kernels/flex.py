"""torch's flex_attention: any score and mask, compiled into one kernel. CUDA only in training, since it has no CPU
backward.

Compiling takes tens of seconds for each length of rows. Training has one; prompts and held-out texts have any, so that
passes without gradient are computed by blocks of plain operators instead (banded.py, in fp32), except inside
torch.compile, where the caller holds the length."""

from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from nanolab.model.kernels.banded import banded
from nanolab.model.kernels.spec import AttnSpec, Capability, before_ampere, lacking, on_cuda, sink_per_head

LEAST = 16  # channels that its kernel takes at least


def run(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGE: torch.Tensor, rules: AttnSpec) -> torch.Tensor:
    """(B, T, H, E). The sink scales softmax's output by S / (n + S), S = exp(lse); flex's lse, unlike flash's, has a
    gradient.
    """
    if on_cuda(q_BTHD) and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return banded(q_BTHD.float(), k_BTGD.float(), v_BTGE.float(), rules).to(q_BTHD.dtype)
    T, H, E = *q_BTHD.shape[1:3], v_BTGE.size(-1)
    q, k, v = (
        F.pad(x, (0, LEAST - x.size(-1))) if on_cuda(x) and x.size(-1) < LEAST else x for x in (q_BTHD, k_BTGD, v_BTGE)
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    blocks = (
        _blocks(T, rules.window, q.device) if rules.first_BT is None else _document_blocks(rules.first_BT, rules.window)
    )
    attend = _compiled(flex_attention) if on_cuda(q) else flex_attention
    y, aux = attend(
        q,
        k,
        v,
        score_mod=_score_mod(rules),
        block_mask=blocks,
        scale=rules.scale,
        enable_gqa=k.size(1) != H,
        return_aux=AuxRequest(lse=True),
    )
    if rules.log_sink is not None:
        y = (y * torch.sigmoid(aux.lse - sink_per_head(rules.log_sink, H, q.device)[:, None])[..., None]).to(y.dtype)
    return y.transpose(1, 2)[..., :E]


def _score_mod(rules: AttnSpec):
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
    """Which blocks of the score matrix hold visible pairs; the same for every batch.

    Kept for later passes, which may have a gradient: a tensor made in inference mode could not be saved for it.
    """

    def sees(b, h, q_pos, k_pos):
        return (q_pos >= k_pos) & (q_pos - k_pos <= window)

    with torch.inference_mode(False):
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


@cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


def missing(needs: frozenset[str], device_type: str, dtype: torch.dtype, capability: Capability) -> str:
    """Before Ampere torch gives flex its default tiles: 128 KB of shared memory for heads of 128 channels, where a T4
    has 64 and a V100 96.

    torch 2.13, torch/_inductor/template_heuristics/triton.py: FlexConfig(128, 64, num_stages=3).
    """
    if device_type != "cuda":
        return f"it trains on CUDA only, and --device-type is {device_type}"
    if before_ampere(capability):
        return f"its tiles do not fit before compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    return lacking(needs & {"dropout"}, "on cuda")
