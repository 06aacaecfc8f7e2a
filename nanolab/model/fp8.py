"""Linear layers whose three products run in 8-bit floats in training: Float8Linear, and how a model is converted to it.

Every tensor is scaled by one number of its own, taken from its largest entry at each use (dynamic, tensorwise scaling;
FP8 formats: arXiv 2209.05433). M tokens, K inputs, N outputs. Ranks scale by their own share of a batch, so that a run
on several ranks is not bit-identical to one on a single rank."""

import torch
from torch import nn

from nanolab.cli import UserError
from nanolab.model.gpt import Linear

VALUES = torch.float8_e4m3fn  # of inputs and weights: 4 bits of exponent, 3 of mantissa, up to 448
GRADIENTS = torch.float8_e5m2  # a wider range, a coarser grid: up to 57344
SMALLEST_AMAX = 1e-12
TILE = 16  # _scaled_mm's inner dimension, and both of its second operand, are multiples of this on GPUs


def quantise(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(x scaled and rounded to `dtype`, the fp32 scalar that scales it back). The largest |entry| becomes the format's
    largest.

    Row-major, whatever the layout of x. NaN or infinity anywhere in x makes every product with it NaN, so that a run
    stops."""
    largest = torch.finfo(dtype).max
    scale = (largest / x.abs().amax().double().clamp(min=SMALLEST_AMAX)).float()
    return (x.float() * scale).clamp(-largest, largest).to(dtype).contiguous(), scale.reciprocal()


class _Float8Product(torch.autograd.Function):
    """x (M, K) @ w (N, K)^T in x's dtype; backward gives dx in x's dtype and dw in fp32, from what was quantised in
    forward.

    torch._scaled_mm wants its second operand column-major. Fast accumulation keeps fewer bits of the running sum:
    enough for activations, not for gradients."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if w.size(0) % TILE or w.size(1) % TILE:
            raise ValueError(
                f"an 8-bit product with a weight of {tuple(w.shape)}; expected multiples of {TILE}, which GPUs demand"
                " (see `eligible`)"
            )
        (x8, x_back), (w8, w_back) = quantise(x, VALUES), quantise(w, VALUES)
        ctx.save_for_backward(x8, x_back, w8, w_back)
        return torch._scaled_mm(x8, w8.mT, scale_a=x_back, scale_b=w_back, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x8, x_back, w8, w_back = ctx.saved_tensors
        dy8, dy_back = quantise(dy, GRADIENTS)
        dx = torch._scaled_mm(
            dy8, _column_major(w8), scale_a=dy_back, scale_b=w_back, out_dtype=dy.dtype, use_fast_accum=False
        )
        dy8, x8 = _whole_tiles(dy8), _whole_tiles(x8)  # here the tokens are the inner dimension
        dw = torch._scaled_mm(
            dy8.mT.contiguous(),
            _column_major(x8),
            scale_a=dy_back,
            scale_b=x_back,
            out_dtype=torch.float32,
            use_fast_accum=False,
        )
        return dx, dw


def _column_major(x8: torch.Tensor) -> torch.Tensor:
    return x8.mT.contiguous().mT


def _whole_tiles(x8: torch.Tensor) -> torch.Tensor:
    """Zero rows up to a multiple of TILE; they add nothing to a sum over rows."""
    missing = -x8.size(0) % TILE
    return torch.cat((x8, x8.new_zeros(missing, x8.size(1)))) if missing else x8


class Float8Linear(Linear):
    """`Linear` with its products in 8-bit floats: fp32 master weight and weight gradient, output in the input's dtype.
    In evaluation mode it is `Linear`, as evaluation and sampling should be.

    Parameters have the same names and shapes as `Linear`'s. Fast only inside torch.compile, which fuses the scaling
    passes."""

    @property
    def exact(self) -> bool:
        """Whether the product is the one that `Linear` computes, which the loss may do by itself (cpu.py)."""
        return not self.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.exact:
            return super().forward(x)
        y = _Float8Product.apply(x.reshape(-1, self.in_features), self.weight).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def eligible(linear: nn.Linear) -> bool:
    """Large enough to gain, and of a size that the GPU's product takes; gates are neither."""
    return all(size % TILE == 0 and size >= 128 for size in (linear.in_features, linear.out_features))


def convert(model: nn.Module) -> int:
    """Put a Float8Linear in the place of every eligible `Linear` inside `model`, with the same parameters; returns how
    many.

    Before compiling and in any order with loading weights and building the optimizer. Raises UserError where the
    model's device cannot multiply 8-bit floats."""
    device = next(model.parameters()).device
    if why := missing(device):
        raise UserError(
            f"--fp8: {why}; expected an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper), or a CPU; leave"
            " --fp8 out"
        )
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is Linear and eligible(child)
    ]
    for parent, name, linear in places:
        with torch.device("meta"):
            replacement = Float8Linear(
                linear.in_features, linear.out_features, bias=linear.bias is not None, kind=linear.kind
            )
        replacement.weight, replacement.bias = linear.weight, linear.bias
        setattr(parent, name, replacement.train(linear.training))
    return len(places)


def missing(device: torch.device) -> str:
    """Why `device` cannot run Float8Linear, or "". Told by a product of the smallest size; the meta device can
    everything.
    """
    if device.type == "meta":
        return ""
    try:
        one = torch.ones((), device=device)
        a, b = (torch.zeros(TILE, TILE, device=device).to(dtype) for dtype in (GRADIENTS, VALUES))
        torch._scaled_mm(a, b.mT, scale_a=one, scale_b=one, out_dtype=torch.float32)
    except (RuntimeError, TypeError) as error:
        return f"this {device.type} device cannot multiply 8-bit floats ({str(error).splitlines()[0]})"
    return ""
