"""Head, soft-cap and cross entropy in one, a block of rows at a time. N rows, C width, V padded vocabulary.

The plain form keeps several N x V fp32 tensors for the backward pass, the largest of a small model. This one computes
loss and gradient of a block of rows together while its logits are in the cache, and keeps only gradients of x and W.
"""

import torch
import torch.nn.functional as F

GEMM_ROWS = 1024  # rows per matrix multiplication
CACHE_ROWS = 64  # rows per pass of elementwise work: 64 x 8192 fp32 logits are 2 MB


def plain_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float, vocab_size: int) -> torch.Tensor:
    """Nats per row (N,) fp32, 0 where the target is -1: the definition."""
    logits = softcapped(F.linear(x, weight.to(x.dtype))[:, :vocab_size].float(), softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


def softcapped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap * tanh(logits / softcap): Gemma 2, arXiv 2408.00118, section 2."""
    return softcap * torch.tanh(logits / softcap)


class _BlockedCrossEntropy(torch.autograd.Function):
    """Sum of nats, with the gradients of x and W computed on the way; `backward` only scales them."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float, vocab_size: int) -> torch.Tensor:
        w, total = weight.to(x.dtype), torch.zeros((), dtype=torch.float32, device=x.device)
        dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for rows, logits, y in _logit_blocks(x, w, targets):
            for lo in range(0, len(y), CACHE_ROWS):
                block = slice(lo, lo + CACHE_ROWS)
                total += _loss_and_grad(logits[block], y[block], softcap, vocab_size)
            dx[rows] = logits @ w  # `logits` now holds the gradient with respect to the raw logits
            dw += logits.mT @ x[rows]
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        dx, dw = ctx.saved_tensors
        return dx * upstream, dw * upstream, None, None, None


def _logit_blocks(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor):
    """(rows, raw logits of these rows, their targets) for each block of GEMM_ROWS rows."""
    for lo in range(0, x.size(0), GEMM_ROWS):
        rows = slice(lo, lo + GEMM_ROWS)
        yield rows, F.linear(x[rows], w), targets[rows]


def _loss_and_grad(logits: torch.Tensor, targets: torch.Tensor, softcap: float, vocab_size: int) -> torch.Tensor:
    """Sum of nats of one block, whose raw logits are overwritten by d nats / d logits.

    With s = sigmoid(2 z / cap), cap * tanh(z / cap) = 2 cap s - cap, and softmax ignores the shift; the derivative of the
    cap is 4 s (1 - s). (sigmoid is vectorised better than tanh on CPUs.)
    """
    s = torch.sigmoid_(logits[:, :vocab_size].float().mul_(2 / softcap))
    p = torch.softmax(s * (2 * softcap), -1)  # cannot underflow: capped logits lie within 2 * softcap of each other
    index, ignored = targets.clamp(min=0)[:, None], targets < 0
    at_target = p.gather(1, index)
    p.scatter_(1, index, at_target - 1)
    grad = torch.ops.aten.sigmoid_backward(p, s).mul_(4.0)
    if ignored.any():  # a pass over the block that pretraining, which ignores nothing, need not pay
        grad.masked_fill_(ignored[:, None], 0.0)
    logits[:, :vocab_size] = grad
    logits[:, vocab_size:] = 0
    return -at_target.log()[:, 0].masked_fill(ignored, 0.0).sum()


def blocked_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float, vocab_size: int) -> torch.Tensor:
    """Sum of nats (a scalar, fp32) over the rows of x (N, C) whose target (N,) is not -1, for W (V, C)."""
    return _BlockedCrossEntropy.apply(x, weight, targets, softcap, vocab_size)


@torch.no_grad()
def blocked_nats(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float, vocab_size: int) -> torch.Tensor:
    """Nats per row (N,) fp32, 0 where the target is -1, without ever holding all logits; no gradient."""
    nats = torch.empty(x.size(0), dtype=torch.float32, device=x.device)
    for rows, logits, y in _logit_blocks(x, weight.to(x.dtype), targets):
        capped = softcapped(logits[:, :vocab_size].float(), softcap)
        nats[rows] = F.cross_entropy(capped, y, ignore_index=-1, reduction="none")
    return nats
