"""torch's own fused kernels.

Dims as in spec.py."""

import torch
import torch.nn.functional as F

from nanolab.model.kernels.flash_sink import flash_attention
from nanolab.model.kernels.spec import FLAGS, AttnSpec, Capability, before_ampere, heads_first, lacking, on_cuda, seen

HALF = (torch.bfloat16, torch.float16)


def sdpa(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGE: torch.Tensor, rules: AttnSpec) -> torch.Tensor:
    """torch's own fused kernels. Windows and sinks go to the flash primitives beneath them, or take a mask on CPU and
    MPS.

    On GPUs all else goes to scaled_dot_product_attention, which takes flash or the memory-efficient kernel. The latter,
    for fp32 and for GPUs before Ampere, has no shared heads and wants head sizes of whole 16 bytes: torch would
    silently make the T x T scores instead."""
    T, size, cuda = q_BTHD.size(1), v_BTGE.size(-1), on_cuda(q_BTHD)
    needs = rules.needs(T)
    q, k, v = _equal_sizes(q_BTHD, k_BTGD, v_BTGE, multiple=8 if cuda else 1)
    if "sink" in needs or (cuda and "window" in needs):
        return flash_attention(q, k, v, rules)[..., :size]
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


def sdpa_missing(needs: frozenset[str], device_type: str, dtype: torch.dtype, capability: Capability) -> str:
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
