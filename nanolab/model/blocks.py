"""The parts of a layer that are not attention: the casting linear, norms, MLPs, and what mixes the residual stream.

Dims: B batch, T tokens, C width. Weights are uninitialised until `GPT.init_weights` or a checkpoint fills them; what
starts at a constant is set by a module's `init_constants`, everything else by an entry of `init.INITS`."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolab.model.config import GPTConfig

SMEAR_CHANNELS = 24  # leading embedding channels that steer the smear gate


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


class Smear(nn.Module):
    """e_t + scale sigmoid(w . e_t) e_{t-1}: each embedding takes a gated share of the one before it (modded-nanogpt).

    The first token of a row has none before it, and with a document mask neither has the first of a document.
    """

    def __init__(self):
        super().__init__()
        self.gate = Linear(SMEAR_CHANNELS, 1)
        self.scale = nn.Parameter(torch.empty(1))

    def init_constants(self) -> None:
        self.scale.zero_()

    def forward(self, e_BTC: Tensor, reading) -> Tensor:
        previous = torch.cat((reading.left("embedding", torch.zeros_like(e_BTC[:, :1])), e_BTC[:, :-1]), dim=1)
        reading.leave("embedding", e_BTC[:, -1:])
        if reading.starts_BT is not None:
            previous = previous.masked_fill(reading.starts_BT[..., None], 0)
        gate = self.scale[0] * torch.sigmoid(self.gate(e_BTC[..., :SMEAR_CHANNELS]))
        return e_BTC + gate * previous


class ResidualScalars(nn.Module):
    """x <- r_i x + z_i x0 before layer i, with x0 the embedding (modded-nanogpt; the idea is Highway's, arXiv
    1505.00387).
    """

    def __init__(self, n_layer: int):
        super().__init__()
        self.resid = nn.Parameter(torch.empty(n_layer))
        self.x0 = nn.Parameter(torch.empty(n_layer))

    def init_constants(self) -> None:
        n = len(self.resid)
        depth = torch.linspace(0, 1, n) if n > 1 else torch.zeros(1)
        self.resid.copy_(1.15 - 0.10 * depth)
        self.x0.copy_(0.20 - 0.15 * depth)

    def forward(self, x: Tensor, x0: Tensor, layer: int) -> Tensor:
        return self.resid[layer] * x + self.x0[layer] * x0  # fp32 scalars: their steps are finer than bf16


class Backout(nn.Module):
    """x - scale b with b the stream after the middle layer: what served only the middle leaves before the head
    (modded-nanogpt).
    """

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))

    def init_constants(self) -> None:
        self.scale.fill_(0.2)

    def forward(self, x: Tensor, middle: Tensor) -> Tensor:
        return x - self.scale[0] * middle
