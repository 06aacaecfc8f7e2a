"""The layer's other half: one class per activation. C is the width."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolab.model.blocks import Linear
from nanolab.model.config import GPTConfig


class _ReluSquared(torch.autograd.Function):
    """max(x, 0)^2 in two passes and its gradient 2 max(x, 0) dy in two; composed of torch's own operators it takes
    seven.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (dy * positive).mul_(2)


class MLP(nn.Module):
    """C -> 4C -> C with an activation between. An entry of `MLPS` is this with its `activation`, or a class like it."""

    activation: Callable[[Tensor], Tensor]

    def __init__(self, c: GPTConfig):
        super().__init__()
        bias = c.has_bias("mlp")
        self.c_fc = Linear(c.n_embd, 4 * c.n_embd, bias)
        self.c_proj = Linear(4 * c.n_embd, c.n_embd, bias)

    @staticmethod
    def matrices(c: GPTConfig) -> list[tuple[int, int]]:
        """(outputs, inputs) of every matrix."""
        return [(4 * c.n_embd, c.n_embd), (c.n_embd, 4 * c.n_embd)]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Relu(MLP):
    """W2 max(0, W1 x). Vaswani et al., arXiv 1706.03762."""

    activation = staticmethod(F.relu)


class Relu2(MLP):
    """W2 max(0, W1 x)^2. Primer, So et al., arXiv 2109.08668."""

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return _ReluSquared.apply(x) if torch.is_grad_enabled() else x.clamp_min(0).square_()


class Gelu(MLP):
    """W2 gelu(W1 x), gelu(x) = x Phi(x) with the exact error function. Hendrycks and Gimpel, arXiv 1606.08415."""

    activation = staticmethod(F.gelu)


class GeluTanh(MLP):
    """W2 gelu(W1 x) with gelu's tanh approximation, as in GPT-2. Hendrycks and Gimpel, arXiv 1606.08415."""

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class SwiGLU(nn.Module):
    """W2 (silu(W1 x) * W3 x), hidden width 8/3 C rounded up to a multiple of 64. Shazeer, arXiv 2002.05202."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        bias, hidden = c.has_bias("mlp"), self.hidden(c)
        self.c_gate = Linear(c.n_embd, hidden, bias)
        self.c_fc = Linear(c.n_embd, hidden, bias)
        self.c_proj = Linear(hidden, c.n_embd, bias)

    @staticmethod
    def hidden(c: GPTConfig) -> int:
        return math.ceil(8 * c.n_embd / 3 / 64) * 64

    @staticmethod
    def matrices(c: GPTConfig) -> list[tuple[int, int]]:
        C, hidden = c.n_embd, SwiGLU.hidden(c)
        return [(hidden, C), (hidden, C), (C, hidden)]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


MLPS = {"relu": Relu, "relu2": Relu2, "gelu": Gelu, "gelu_tanh": GeluTanh, "swiglu": SwiGLU}
