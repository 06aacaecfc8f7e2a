"""The table of attention kernels, and the choice between them for each layer and machine.

Every kernel has the signature (q_BTHD, k_BTGD, v_BTGE, rules) -> y_BTHE, for T queries and T keys at positions
0..T-1. To add one: a file with a function and its `missing`, and a line in KERNELS."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanolab.cli import UserError, nearest
from nanolab.model.kernels import fa3, flex
from nanolab.model.kernels.banded import banded
from nanolab.model.kernels.reference import eager
from nanolab.model.kernels.sdpa import sdpa, sdpa_missing
from nanolab.model.kernels.spec import AttnSpec, Capability, capability_of


@dataclass(frozen=True)
class Kernel:
    # (q_BTHD, k_BTGD, v_BTGE, rules) -> y_BTHE
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttnSpec], torch.Tensor]
    # (needs, device type, dtype, capability) -> why it cannot train with these, or ""
    missing: Callable[[frozenset[str], str, torch.dtype, Capability], str]


def _nothing(needs: frozenset[str], device_type: str, dtype: torch.dtype, capability: Capability) -> str:
    return ""


KERNELS = {
    "eager": Kernel(eager, _nothing),
    "sdpa": Kernel(sdpa, sdpa_missing),
    "banded": Kernel(banded, _nothing),
    "flex": Kernel(flex.run, flex.missing),
    "fa3": Kernel(fa3.run, fa3.missing),
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
