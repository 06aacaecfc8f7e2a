"""What GPUs demand of the calls of operators and kernels, checked on tensors without numbers."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)


class Demands(TorchDispatchMode):
    """Checks each call of an operator that is strict on GPUs against its documentation and counts them; notes what is T
    x T.

    Flash: torch's sdp_utils and the kernels' own checks. _scaled_mm: cuBLASLt's rules for 8-bit floats, as torch 2.13's
    meta function has them."""

    def __init__(self, T: int = 0, ampere: bool = True):
        super().__init__()
        self.T, self.ampere, self.counts, self.squares = T, ampere, {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] = self.counts.get(func, 0) + 1
        if func in (aten._flash_attention_forward.default, aten._flash_attention_backward.default):
            backward = func is aten._flash_attention_backward.default
            self.flash(*args[backward : backward + 3])
            assert not backward or args[0].is_contiguous() and args[0].dtype == args[1].dtype
            assert all(isinstance(kwargs.get(f"window_size_{side}", 0), int) for side in ("left", "right"))
        if func is aten._scaled_mm.default:
            a, b = args[:2]
            assert a.stride(1) == 1 and a.stride(0) >= a.size(1) and b.stride(0) == 1 and b.stride(1) >= b.size(0)
            assert a.size(1) == b.size(0) and not any(size % 16 for size in (a.size(1), *b.shape)), (a.shape, b.shape)
            assert not a.dtype == b.dtype == torch.float8_e5m2, "two of the coarse format cannot be multiplied"
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and self.T and x.shape[-2:] == (self.T, self.T):
                self.squares.append(func)
        return out

    def flash(self, q, k, v):
        assert self.ampere, "flash kernels need compute capability 8.0"
        assert q.dtype in HALF and q.dtype == k.dtype == v.dtype
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert q.size(-1) == k.size(-1) == v.size(-1) <= 256 and q.size(-1) % 8 == 0
        assert k.shape == v.shape and q.size(2) % k.size(2) == 0 and q.shape[:2] == k.shape[:2]


def fused(capability):
    """F.scaled_dot_product_attention as a GPU has it: the flash kernel, or the memory-efficient one, never the T x T
    scores.
    """

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert attn_mask is None and is_causal and scale is not None
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.size(-1) == k.size(-1) == v.size(-1)
        if not (q.dtype in HALF and capability >= (8, 0) and q.size(-1) <= 256):
            assert q.dtype != torch.bfloat16 or capability >= (8, 0)
            assert not enable_gqa and q.size(1) == k.size(1), "the memory-efficient kernel has no shared heads"
            assert q.size(-1) * q.element_size() % 16 == 0, "nor head sizes that are not whole 16 bytes"
        return q + 0 * (k.mean() + v.mean())

    return attend


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """The arguments of FlashAttention 3's function."""
    Demands().flash(q, k, v)
    assert causal and window_size[1] == 0 and q.dtype == torch.bfloat16
    return q + 0 * (k.mean() + v.mean())


def flex_attention(
    q,
    k,
    v,
    score_mod=None,
    block_mask=None,
    scale=None,
    enable_gqa=False,
    return_lse=False,
    kernel_options=None,
    *,
    return_aux=None,
):
    assert min(q.size(-1), v.size(-1)) >= 16 and q.size(-1) == k.size(-1), (
        "torch/_inductor/kernel/flex refuses heads of fewer channels"
    )
    assert enable_gqa or q.size(1) == k.size(1)
    aux = type("Aux", (), {"lse": q.float().sum(-1)})
    return q[..., :1].expand(*q.shape[:-1], v.size(-1)) + 0 * (k.mean() + v.mean()), aux
