"""The casting linear, tables, norms.

Dims: B batch, T tokens, C width. Weights are uninitialised until `GPT.init_weights` or a checkpoint fills them; what
starts at a constant is set by a module's `init_constants`, everything else by an entry of `init.INITS`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolab.model.config import GPTConfig


class Linear(nn.Linear):
    """A linear map whose fp32 master weight is cast to the input's dtype at each use."""

    fused_head = True  # its product can be fused with the cross entropy

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        pass

    def init_constants(self) -> None:
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Embedding):
    """A table of fp32 rows, looked up and cast."""

    def reset_parameters(self) -> None:
        pass

    def look_up(self, idx: Tensor, dtype: torch.dtype) -> Tensor:
        return self(idx).to(dtype)  # by __call__: adapters hook the table


class TiedHead(nn.Module):
    """The head whose matrix is the embedding table. Press and Wolf, arXiv 1608.05859."""

    fused_head = True

    def __init__(self, table: Embedding, bias: bool):
        super().__init__()
        self._table = [table]  # in a list: its weight is a parameter of the model once, as wte
        self.bias = nn.Parameter(torch.empty(table.num_embeddings)) if bias else None

    @property
    def weight(self) -> Tensor:
        return self._table[0].weight

    init_constants = Linear.init_constants
    forward = Linear.forward


class Pass(nn.Module):
    """Gives back its first argument: the part of a model that is switched off."""

    def __init__(self, *_):
        super().__init__()

    def forward(self, x: Tensor, *_) -> Tensor:
        return x


def dropout(p: float) -> nn.Module:
    """Zero a share p of the values in training and scale the rest by 1 / (1 - p). arXiv 1207.0580."""
    return nn.Dropout(p) if p else nn.Identity()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and logits of values in `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


EPS = torch.finfo(torch.float32).eps


def inverse_rms(x: Tensor) -> Tensor:
    """(mean(x^2) + eps)^-1/2 over the last dimension, which stays as one."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    return length.square_().div_(int(x.size(-1))).add_(EPS).rsqrt_().to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """y = x r with r = (mean(x^2) + eps)^-1/2, and dx = r (dy - y mean(y dy)). On CPUs torch composes it of a dozen
    passes with fp32 copies; these are two forward and three backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        r = inverse_rms(x)
        y = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        y, r = ctx.saved_tensors
        return torch.addcmul(dy, y, (dy * y).mean(-1, keepdim=True), value=-1).mul_(r)


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without gain. arXiv 1910.07467."""
    if x.is_cuda:
        return F.rms_norm(x, (x.size(-1),), eps=EPS)
    # the same without a Function's cost, which a decoded token feels
    return _RMSNorm.apply(x) if torch.is_grad_enabled() else x * inverse_rms(x)


class Norm(nn.Module):
    """What the norms share: an optional gain and an optional bias per channel."""

    def __init__(self, width: int, gain: bool, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width)) if gain else None
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def init_constants(self) -> None:
        if self.weight is not None:
            self.weight.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()

    @staticmethod
    def n_params(width: int, gain: bool, bias: bool) -> int:
        return width * (gain + bias)


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps). Zhang and Sennrich, arXiv 1910.07467."""

    def forward(self, x: Tensor) -> Tensor:
        x = norm(x)
        if self.weight is not None:
            x = x * self.weight.to(x.dtype)
        return x if self.bias is None else x + self.bias.to(x.dtype)


class LayerNorm(Norm):
    """(x - mean(x)) / sqrt(var(x) + eps). Ba et al., arXiv 1607.06450."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x, (x.size(-1),), weight, bias, eps=1e-5)


NORMS = {"rms": RMSNorm, "layernorm": LayerNorm}


def make_norm(c: GPTConfig) -> Norm:
    """The norm of the stream, as the flags --norm, --norm-gain and --bias norm say."""
    return NORMS[c.norm](c.n_embd, c.norm_gain, c.has_bias("norm"))
