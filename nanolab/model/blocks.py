"""The parts of a layer that are not attention: the casting linear, the norm, the MLP."""

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Linear):
    """A linear map without bias whose fp32 master weight is cast to the input's dtype at each use.

    Its memory is left uninitialised: `GPT.init_weights` or a checkpoint fills it.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """A table of fp32 rows, looked up and cast. Its memory is left uninitialised, as `Linear`'s."""

    def reset_parameters(self) -> None:
        pass

    def look_up(self, idx: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return F.embedding(idx, self.weight).to(dtype)


EPS = torch.finfo(torch.float32).eps


class _RMSNorm(torch.autograd.Function):
    """y = x r with r = (mean(x^2) + eps)^-1/2, and dx = r (dy - y mean(y dy)). On CPUs torch composes it of a dozen passes
    with fp32 copies; these are two forward and three backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = length.square_().div_(x.size(-1)).add_(EPS).rsqrt_().to(x.dtype)
        y = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> torch.Tensor:
        y, r = ctx.saved_tensors
        return torch.addcmul(dy, y, (dy * y).mean(-1, keepdim=True), value=-1).mul_(r)


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMS norm over the last dimension, without gain. arXiv 1910.07467."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS) if x.is_cuda else _RMSNorm.apply(x)


class _ReluSquared(torch.autograd.Function):
    """max(x, 0)^2 in two passes and its gradient 2 max(x, 0) dy in two; composed of torch's own operators it takes seven."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> torch.Tensor:
        (positive,) = ctx.saved_tensors
        return (dy * positive).mul_(2)


class MLP(nn.Module):
    """C -> 4C -> C with squared ReLU (Primer, arXiv 2109.08668)."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.c_fc = Linear(n_embd, 4 * n_embd)
        self.c_proj = Linear(4 * n_embd, n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(_ReluSquared.apply(self.c_fc(x)))
