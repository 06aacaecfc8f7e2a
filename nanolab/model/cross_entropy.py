"""Head, soft-cap and cross entropy in one, a block of rows at a time. N rows, C width, V padded vocabulary.

The plain form keeps several N x V fp32 tensors for the backward pass, the largest of a small model. This one computes
loss and gradient of a block of rows together while its logits are in the cache, and keeps only gradients of x, W and b.
A soft-cap of 0 is none.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanolab.model.blocks import wide

GEMM_ROWS = 1024  # rows per matrix multiplication
CACHE_ROWS = 64  # rows per pass of elementwise work: 64 x 8192 fp32 logits are 2 MB


def plain_cross_entropy(
    x: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, softcap: float, vocab_size: int
) -> Tensor:
    """Nats per row (N,), at least fp32, 0 where the target is -1: the definition. head: x (N, C) -> logits (N, V)."""
    logits = head(x)[:, :vocab_size]
    return F.cross_entropy(
        softcapped(logits.to(wide(logits.dtype)), softcap), targets, ignore_index=-1, reduction="none"
    )


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), for losses. Gemma 2, arXiv 2408.00118, section 2."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def quickly_softcapped(logits: Tensor, softcap: float) -> Tensor:
    """The same by tanh(z) = 2 sigmoid(2 z) - 1, six times as fast on CPUs, for logits that are looked at: a number's
    last bit depends on its place in the tensor, so that of two losses that should be equal the difference would not be
    0."""
    return 2 * softcap * torch.sigmoid(logits * (2 / softcap)) - softcap if softcap else logits


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
    return torch.cat([plain_cross_entropy(x[rows], head, targets[rows], softcap, vocab_size) for rows in blocks])
