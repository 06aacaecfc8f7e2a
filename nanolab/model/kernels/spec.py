"""Per-layer attention settings, and the capability names that kernels declare.

Dims of all attention code: B batch, T query tokens, S keys, H query heads, G key/value heads (each shared by H/G query
heads), D size of queries and keys, E size of values.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from nanolab.cli import UserError

# compute capability of an NVIDIA GPU: (7, 5) is a T4, (9, 0) an H100; None: not known, or another device
Capability = tuple[int, int] | None
FLASH_CAPABILITY = (8, 0)  # from Ampere on

FLAGS = {  # what a kernel may be asked for beyond causal softmax attention -> the flag that asks it
    "window": "--window-pattern",
    "sink": "--softmax",
    "alibi": "--positions alibi",
    "softcap": "--score-softcap",
    "dropout": "--attn-dropout",
    "documents": "--document-mask",
    "value size": "--attention mla",
}
NEEDS = frozenset(FLAGS)


@dataclass
class AttnSpec:
    """The weights of one layer: s = scale q.k, softcap, minus slope x distance, mask, p_i = exp(s_i) / (n + sum_j
    exp(s_j)), dropout.
    """

    window: int  # keys before itself that a query sees; it always sees itself
    scale: float  # of q.k
    # ln n: a number, or (H,) fp32 which gets a gradient; None: n = 0, softmax
    log_sink: torch.Tensor | float | None = None
    slopes: torch.Tensor | None = None  # (H,) of ALiBi: score -= slope * distance, arXiv 2108.12409
    softcap: float = 0.0  # score becomes c tanh(score / c); 0: off
    dropout: float = 0.0  # share of the normalised weights that is dropped, the others grow by 1 / (1 - dropout)
    first_BT: torch.Tensor | None = None  # (B, T) int64: first position that each query may see, of a document mask

    def needs(self, T: int) -> frozenset[str]:
        """What these rules ask of a kernel on rows of T tokens. Only the caller knows of "value size" (E other than
        D).
        """
        asked = {
            "window": self.window < T - 1,
            "sink": self.log_sink is not None,
            "alibi": self.slopes is not None,
            "softcap": self.softcap > 0,
            "dropout": self.dropout > 0,
            "documents": self.first_BT is not None,
        }
        return frozenset(need for need, is_asked in asked.items() if is_asked)


def visible(q_pos: torch.Tensor, k_pos: torch.Tensor, window: int) -> torch.Tensor:
    """Boolean (..., Tq, Tk): may the query at q_pos (..., Tq) see the key at k_pos (..., Tk)?"""
    distance = q_pos[..., :, None] - k_pos[..., None, :]
    return (distance >= 0) & (distance <= window)


def seen(rules: AttnSpec, q_pos_BT: torch.Tensor, k_pos_BS: torch.Tensor) -> torch.Tensor:
    """Boolean (B or 1, T, S): causal, inside the window, inside the document. k_pos: (S,) where it is the same for all
    rows.
    """
    k_pos_BS = k_pos_BS.expand(len(q_pos_BT), -1)
    mask = visible(q_pos_BT, k_pos_BS, rules.window)
    return mask if rules.first_BT is None else mask & (k_pos_BS[:, None] >= rules.first_BT[..., None])


@dataclass
class CachedKeys:
    """Where the keys of a cache are, and which of them new queries see."""

    q_pos_BT: torch.Tensor
    k_pos_BS: torch.Tensor  # (B or 1, S); where nothing is stored yet, beyond every query
    mask_BTS: torch.Tensor  # `seen` of these
    all_seen: bool = False  # the mask is known to be true everywhere


def sink_per_head(log_sink: torch.Tensor | float, n_head: int, device: torch.device) -> torch.Tensor:
    """ln n as (H,) fp32 (fp64 stays), whichever way it was given."""
    if isinstance(log_sink, torch.Tensor):
        return log_sink
    return torch.full((n_head,), float(log_sink), device=device)


def heads_first(x_BTGD: torch.Tensor, n_head: int) -> torch.Tensor:
    """(B, H, T, D), each key/value head repeated for the query heads that share it."""
    x = x_BTGD.transpose(1, 2)
    return x if x.size(1) == n_head else x.repeat_interleave(n_head // x.size(1), dim=1)


def capability_of(device_type: str) -> Capability:
    """Of this process's GPU. AMD's have numbers of the same form that mean something else."""
    if device_type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability()


def before_ampere(capability: Capability) -> bool:
    """Volta and Turing (V100, T4, RTX 20xx): fp16 only, no flash kernels, and too little shared memory for flex's."""
    return capability is not None and capability < FLASH_CAPABILITY


def on_cuda(x: torch.Tensor) -> bool:
    """The one place where attention asks whether it runs on a GPU, so that tests without one can walk its branches."""
    return x.is_cuda


def check_flash(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, kernel: str) -> None:
    """What flash kernels demand of their inputs, whose own errors name neither the flag nor the layer."""
    (H, size), G = q_BTHD.shape[2:], k_BTGD.size(2)
    if size > 256:
        text = (
            f"--attn-kernel {kernel} takes heads of at most 256 channels, these have {size}; try a smaller --head-dim,"
            " or --attn-kernel banded"
        )
        raise UserError(text, "kernel-head-size", kernel=kernel, size=size)
    if size % 8 or k_BTGD.size(-1) != size or v_BTGD.size(-1) != size or H % G or v_BTGD.size(2) != G:
        raise ValueError(
            f"{kernel}: q {tuple(q_BTHD.shape)}, k {tuple(k_BTGD.shape)}, v {tuple(v_BTGD.shape)}; expected one head"
            " size, a multiple of 8, and shared heads"
        )
    if any(x.stride(-1) != 1 for x in (q_BTHD, k_BTGD, v_BTGD)):
        raise ValueError(
            f"{kernel}: strides {q_BTHD.stride()}, {k_BTGD.stride()}, {v_BTGD.stride()}; expected neighbouring channels"
            " side by side"
        )
    if q_BTHD.dtype not in (torch.bfloat16, torch.float16) or {k_BTGD.dtype, v_BTGD.dtype} != {q_BTHD.dtype}:
        raise ValueError(
            f"{kernel}: {q_BTHD.dtype}, {k_BTGD.dtype}, {v_BTGD.dtype}; expected bfloat16 or float16 for all three"
        )


def lacking(needs: Collection[str], where: str) -> str:
    """'it has no sink (--softmax) ...' for what a kernel is asked and lacks; '' if there is nothing."""
    named = " and no ".join(f"{need} ({FLAGS[need]})" for need in sorted(needs))
    return f"it has no {named} {where}" if needs else ""
