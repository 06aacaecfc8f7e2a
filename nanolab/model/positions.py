"""How a token knows where it is. Dims: B batch, T tokens, H heads, D head size."""

import torch


def rope_angles(positions: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles, each (..., T, 1, D/2) in `dtype`, for `positions` (..., T). RoFormer, arXiv 2104.09864.

    Computed for the positions at hand instead of read from a table: it costs a few microseconds a step, and there is no
    table end to run past.
    """
    half = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    inv_freq = base ** (-half / head_dim)
    angle = positions.float()[..., None] * inv_freq
    return angle.cos().to(dtype)[..., None, :], angle.sin().to(dtype)[..., None, :]


def rotate(x_BTHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) by minus the angle, as the reference harness does (its weights then fit ours)."""
    a, b = x_BTHD.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
