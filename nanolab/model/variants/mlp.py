"""The layer's other half: one class per activation. C is the width."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from nanolab.model.config import GPTConfig
from nanolab.model.gpt import MLP, Linear


class Relu(MLP):
    """W2 max(0, W1 x). Vaswani et al., arXiv 1706.03762."""

    activation = staticmethod(F.relu)


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
        bias, hidden = c.has_bias("mlp"), math.ceil(8 * c.n_embd / 3 / 64) * 64
        self.c_gate = Linear(c.n_embd, hidden, bias)
        self.c_fc = Linear(c.n_embd, hidden, bias, kind="hidden")
        self.c_proj = Linear(hidden, c.n_embd, bias, kind="residual")

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


MLPS = {"relu": Relu, "relu2": MLP, "gelu": Gelu, "gelu_tanh": GeluTanh, "swiglu": SwiGLU}
