"""What makes CPUs fast: the functions of gpt.py computed in fewer passes over memory, and `accelerate`, which puts
them into a model.

N rows, C width, V padded vocabulary. The plain loss keeps several N x V fp32 tensors for the backward pass, the largest
of a small model; the blocked one computes loss and gradient of a block of rows together while its logits are in the
cache of the processor, and keeps only gradients of x, W and b. A soft-cap of 0 is none."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanolab.model.gpt import EPS, Linear, TiedHead, cross_entropy, relu2, rms_norm, softcapped, wide

GEMM_ROWS = 1024  # rows per matrix multiplication
CACHE_ROWS = 64  # rows per pass of elementwise work: 64 x 8192 fp32 logits are 2 MB
PLACES = ("normalize", "activation", "loss", "cap")  # attributes of modules that hold one of these functions


def accelerate(model: nn.Module, device_type: str) -> None:
    """Put into every module the form of its functions that this kind of device computes fastest.

    On CUDA, where torch.compile fuses the plain ones, only the loss of a pass without gradient, which would hold all
    logits."""
    others = {cross_entropy: nats_by_blocks} if device_type == "cuda" else FASTER
    for module in model.modules():
        for place in PLACES:
            if (function := getattr(type(module), place, None)) in FASTER:
                setattr(module, place, others.get(function, function))


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


def fast_rms_norm(x: Tensor) -> Tensor:
    """`rms_norm`; without gradient also without a Function's cost, which a decoded token feels."""
    return _RMSNorm.apply(x) if torch.is_grad_enabled() else x * inverse_rms(x)


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


def fast_relu2(x: Tensor) -> Tensor:
    return _ReluSquared.apply(x) if torch.is_grad_enabled() else x.clamp_min(0).square_()


def fast_softcapped(logits: Tensor, softcap: float) -> Tensor:
    """`softcapped` by tanh(z) = 2 sigmoid(2 z) - 1, six times as fast. Not bitwise reproducible across positions: never
    use it in a loss.
    """
    return 2 * softcap * torch.sigmoid(logits * (2 / softcap)) - softcap if softcap else logits


def fast_cross_entropy(
    x: Tensor, head: nn.Module, targets: Tensor, softcap: float, vocab_size: int, reduction: str
) -> Tensor:
    """`cross_entropy` by blocks, where the head's product is the plain one."""
    if reduction == "none" or not (isinstance(head, (Linear, TiedHead)) and getattr(head, "exact", True)):
        return nats_by_blocks(x, head, targets, softcap, vocab_size, reduction)
    if torch.is_grad_enabled():
        return blocked_cross_entropy(x, head.weight, head.bias, targets, softcap, vocab_size)
    return blocked_nats(x, head, targets, softcap, vocab_size).sum()


def nats_by_blocks(
    x: Tensor, head: nn.Module, targets: Tensor, softcap: float, vocab_size: int, reduction: str
) -> Tensor:
    """`cross_entropy`, whose nats of every row are computed by blocks where there is no gradient."""
    if reduction == "none" and not torch.is_grad_enabled():
        return blocked_nats(x, head, targets, softcap, vocab_size)
    return cross_entropy(x, head, targets, softcap, vocab_size, reduction)


class _BlockedCrossEntropy(torch.autograd.Function):
    """Sum of nats, with the gradients of x, W and b computed on the way; `backward` only scales them."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, vocab_size: int
    ) -> Tensor:
        w, total = weight.to(x.dtype), torch.zeros((), dtype=wide(x.dtype), device=x.device)
        dx, dw, db = torch.empty_like(x), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        for rows, logits, y in _logit_blocks(x, w, bias, targets):
            for lo in range(0, len(y), CACHE_ROWS):
                block = slice(lo, lo + CACHE_ROWS)
                total += _loss_and_grad(logits[block], y[block], softcap, vocab_size)
            dx[rows] = logits @ w  # `logits` now holds the gradient with respect to the raw logits
            dw += logits.mT @ x[rows]
            if db is not None:
                db += logits.sum(0, dtype=db.dtype)
        ctx.save_for_backward(dx, dw, db)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        dx, dw, db = ctx.saved_tensors
        return dx * upstream, dw * upstream, None if db is None else db * upstream, None, None, None


def _logit_blocks(x: Tensor, w: Tensor, bias: Tensor | None, targets: Tensor):
    """(rows, raw logits of these rows, their targets) for each block of GEMM_ROWS rows."""
    b = None if bias is None else bias.to(x.dtype)
    for lo in range(0, x.size(0), GEMM_ROWS):
        rows = slice(lo, lo + GEMM_ROWS)
        yield rows, F.linear(x[rows], w, b), targets[rows]


def _loss_and_grad(logits: Tensor, targets: Tensor, softcap: float, vocab_size: int) -> Tensor:
    """Sum of nats of one block, whose raw logits are overwritten by d nats / d logits.

    With s = sigmoid(2 z / cap), cap * tanh(z / cap) = 2 cap s - cap, and softmax ignores the shift; the derivative of
    the cap is 4 s (1 - s)."""
    z, s = logits[:, :vocab_size].to(wide(logits.dtype)), None
    if softcap:
        s = torch.sigmoid_(z.mul_(2 / softcap))
        z = s * (2 * softcap)
    p = torch.softmax(z, -1)
    index, ignored = targets.clamp(min=0)[:, None], targets < 0
    at_target = p.gather(1, index)
    if softcap:
        nats = -at_target.log()[:, 0]  # capped logits lie within 2 * softcap of each other: p cannot underflow
    else:
        nats = torch.logsumexp(z, -1) - z.gather(1, index)[:, 0]
    p.scatter_(1, index, at_target - 1)
    grad = torch.ops.aten.sigmoid_backward(p, s).mul_(4.0) if softcap else p
    if ignored.any():  # a pass over the block that pretraining, which ignores nothing, need not pay
        grad.masked_fill_(ignored[:, None], 0.0)
    logits[:, :vocab_size] = grad
    logits[:, vocab_size:] = 0
    return nats.masked_fill(ignored, 0.0).sum()


def blocked_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, vocab_size: int
) -> Tensor:
    """Sum of nats (a scalar, at least fp32) over the rows of x (N, C) whose target (N,) is not -1, for W (V, C) and b
    (V).
    """
    return _BlockedCrossEntropy.apply(x, weight, bias, targets, softcap, vocab_size)


@torch.no_grad()
def blocked_nats(
    x: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, softcap: float, vocab_size: int
) -> Tensor:
    """Nats per row (N,), 0 where the target is -1, without ever holding all logits; no gradient."""
    size = GEMM_ROWS if x.is_cpu else 8 * GEMM_ROWS  # elsewhere few launches, and few copies in a compiled graph
    blocks = [slice(lo, lo + size) for lo in range(0, x.size(0), size)]
    return torch.cat([cross_entropy(x[rows], head, targets[rows], softcap, vocab_size, "none") for rows in blocks])


FASTER: dict[Callable, Callable] = {
    rms_norm: fast_rms_norm,
    relu2: fast_relu2,
    softcapped: fast_softcapped,
    cross_entropy: fast_cross_entropy,
}
