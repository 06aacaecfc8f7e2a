"""FlashAttention-3 (arXiv 2407.08608) for Hopper GPUs, from a prebuilt binary that the `kernels` package fetches on
first use.

Read, not run: transformers 5 and trl take version 1 of the same repository, and its builds for torch's stable ABI (2.9
and later, CUDA 12.8 and 13.0), which kernels 0.16 and later find, are reported to load under torch 2.13.
LOCAL_KERNELS=kernels-community/flash-attn3=FOLDER takes a build from a folder instead."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanolab.cli import UserError
from nanolab.model.kernels.spec import (
    AttnSpec,
    Capability,
    capability_of,
    check_flash,
    lacking,
    on_cuda,
    seen,
    sink_per_head,
)

REPOSITORY = "kernels-community/flash-attn3"  # its publisher is one that kernels trusts without being told to
VERSION = 1  # of the interface: a branch, whose builds may be renewed
CAPABILITY = (9, 0)
OFFERS = frozenset({"window", "sink"})

Attend = Callable[..., "torch.Tensor | tuple[torch.Tensor, ...]"]


def run(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, rules: AttnSpec) -> torch.Tensor:
    """(B, T, H, D). The kernel takes head sizes that are multiples of 8 and scales scores by 1/sqrt(size), so any other
    scale goes into q.
    """
    attend, _ = probed(q_BTHD.device.type)
    if rules.log_sink is not None:
        return _with_virtual_key(attend, q_BTHD, k_BTGD, v_BTGD, rules)
    size, is_full = q_BTHD.size(-1), rules.window >= q_BTHD.size(1) - 1
    q, k, v = (F.pad(x, (0, -size % 8)) if size % 8 else x for x in (q_BTHD, k_BTGD, v_BTGD))
    gain = rules.scale * math.sqrt(q.size(-1))
    return _call(attend, q if math.isclose(gain, 1) else q * gain, k, v, -1 if is_full else rules.window)[..., :size]


def _call(attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int) -> torch.Tensor:
    """Some builds return (y, log-sum-exp). The gradient of q is summed in any order unless told otherwise; torch cannot
    tell it.
    """
    if on_cuda(q):
        check_flash(q, k, v, "fa3")
    y = attend(q, k, v, causal=True, window_size=(left, 0), deterministic=torch.are_deterministic_algorithms_enabled())
    return y[0] if isinstance(y, tuple) else y


def _with_virtual_key(
    attend: Attend, q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, rules: AttnSpec
) -> torch.Tensor:
    """Full causal attention with a key in front of all others whose score is ln n and whose value is 0.

    The problem stays square by a query in front, whose row is dropped. Two further channels make the score: the queries
    hold ln n there, in two parts lest bf16 round it, the virtual key holds ones, the other keys zeros. ln n is in the
    queries since heads that share a key may have sinks of their own. Head sizes are multiples of 8."""
    T, H, D = q_BTHD.shape[1:]
    if rules.window < T - 1:  # a layer that is full at the training length is not on longer rows
        raise UserError(
            f"--attn-kernel fa3 has no sink on rows of {T} tokens, longer than the model's {rules.window}; try"
            " --attn-kernel sdpa"
        )
    size = D + 2 + -(D + 2) % 8
    log_n = sink_per_head(rules.log_sink, H, q_BTHD.device) * math.sqrt(size)
    head = log_n.to(q_BTHD.dtype)
    tail = (log_n - head).detach().to(q_BTHD.dtype)  # without gradient: the two add up to ln n, which gets it once
    parts = torch.stack((head, tail), -1).expand(*q_BTHD.shape[:2], H, 2)
    q = torch.cat((q_BTHD * (rules.scale * math.sqrt(size)), parts), -1)
    q = F.pad(q, (0, size - D - 2, 0, 0, 1, 0))
    k, v = (F.pad(x, (0, size - D, 0, 0, 1, 0)) for x in (k_BTGD, v_BTGD))
    k[:, 0, :, D : D + 2] = 1
    return _call(attend, q, k, v, -1)[:, 1:, :, :D]


def missing(needs: frozenset[str], device_type: str, dtype: torch.dtype, capability: Capability) -> str:
    """Loads the kernel only where nothing else stands against it."""
    if capability and (reason := _not_hopper(device_type, capability)):
        return reason
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16 only, and NANOLAB_DTYPE is {str(dtype).removeprefix('torch.')}"
    if lacks := lacking(needs - OFFERS, "at all"):
        return lacks
    if {"window", "sink"} <= needs:
        return lacking({"sink"}, "beside a window (--window-pattern)")
    return _not_hopper(device_type, capability) or probed(device_type)[1]


_FOUND: dict[
    str, tuple[Attend | None, str]
] = {}  # by device type; a dict and no lru_cache, which torch.compile would look through


def probed(device_type: str) -> tuple[Attend | None, str]:
    """(kernel, "") or (None, why not), found out once."""
    if device_type not in _FOUND:
        _FOUND[device_type] = probe(device_type, capability_of(device_type), load)
    return _FOUND[device_type]


def load() -> Attend:
    from kernels import get_kernel

    return get_kernel(REPOSITORY, version=VERSION).flash_attn_func


def _not_hopper(device_type: str, capability: Capability) -> str:
    if capability == CAPABILITY:
        return ""
    here = (
        f"this one has {capability[0]}.{capability[1]}"
        if capability
        else f"there is none for --device-type {device_type}"
    )
    return f"it needs a Hopper GPU (compute capability 9.0), and {here}"


def probe(device_type: str, capability: Capability, load: Callable[[], Attend]) -> tuple[Attend | None, str]:
    """Load the kernel and launch it, forward and backward, against torch's own attention. -> (kernel, "") or (None, why
    not).

    Anything may fail here (no package, no network, a binary for another torch, a launch), and whatever it is, other
    kernels can do the work: so every exception becomes a reason."""
    if reason := _not_hopper(device_type, capability):
        return None, reason
    try:
        attend = load()
        _check(attend, device_type)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "kernels":
            return None, "it needs the kernels package; type bash runs/setup.sh gpu"
        return None, f"{REPOSITORY} failed with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return attend, ""


def _check(attend: Attend, device_type: str) -> None:
    """One small full and one windowed problem, two query heads to a key. bf16 results differ by about 1 % of their
    norm.
    """
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 32, heads, 64, generator=g).to(device_type, torch.bfloat16).requires_grad_()
        for heads in (2, 1, 1)
    )
    pos = torch.arange(32, device=device_type)
    for left in (-1, 8):
        mask = seen(AttnSpec(left % 32, 1.0), pos[None], pos)[:, None]
        want = F.scaled_dot_product_attention(
            *(x.float().transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
        ).transpose(1, 2)
        y = _call(attend, q, k, v, left)
        pairs = zip(
            (y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))),
            (want, *torch.autograd.grad(want.square().sum(), (q, k, v))),
        )
        for got, wanted in pairs:
            if not (got.float() - wanted.float()).norm() < 0.05 * wanted.float().norm():
                raise ArithmeticError(f"its results on a small problem with window {left} are wrong")
