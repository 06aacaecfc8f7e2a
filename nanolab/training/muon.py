"""Muon: the update of stacks of equally shaped matrices. Momentum, orthogonalisation, variance reduction, cautious
decay.

Shapes: k matrices of m rows and n columns. Sums and norms are fp32; only the iteration of `polar_express` runs in
`dtype`."""

import math

import torch
from torch import Tensor

# Polar Express (https://arxiv.org/abs/2505.16932): the odd quintics a x + b x^3 + c x^5 whose composition is the best
# approximation of sign(x) on [1e-3, 1]. Each is the minimax polynomial on the interval that the one before leaves over,
# its lower end no less than 0.02 of its upper one ("cushion"), and is applied to x / 1.02 (safety against bf16, not in
# the last). tests/training/test_muon.py derives the table again by Remez exchange.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557794, 15.87876991520745),
    (4.0429299351667325, -2.8089174659087086, 0.5000178451051306),
    (3.8916678022926643, -2.7724841532176865, 0.5060648178503395),
    (3.285753657755656, -2.3681294933425403, 0.46449024233003156),
    (2.3465413258596373, -1.7097828382687053, 0.4232355116930521),
)


def polar_express(x: Tensor, steps: int = 5) -> Tensor:
    """x (k, m, n), m <= n, singular values at most 1 -> same singular vectors, singular values near 1.

    After five steps those that were 0.001 or more lie within 0.142 of 1; smaller ones have grown up to 990-fold.
    """
    for a, b, c in POLAR_EXPRESS[:steps]:
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x


def orthogonalise(g: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """g (k, m, n) fp32 -> (k, m, n) `dtype`, rows balanced, then orthogonalised on the short side. A zero matrix stays
    zero.
    """
    m, n = g.shape[-2:]
    rows = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
    # MuonEq: every row gets the root mean square of the row norms.
    scale = torch.linalg.vector_norm(rows, dim=-2, keepdim=True) / math.sqrt(m) / rows.clamp_min(1e-6)
    total = torch.linalg.vector_norm(rows * scale, dim=-2, keepdim=True)
    x = (g * (scale / (1.01 * total + 1e-6))).to(dtype)
    return polar_express(x, steps) if m <= n else polar_express(x.mT, steps).mT


def muon_update_(
    p: Tensor,
    g: Tensor,
    momentum: Tensor,
    second: Tensor,
    *,
    lr: float,
    mu: float,
    beta2: float,
    weight_decay: float,
    steps: int,
    dtype: torch.dtype,
) -> None:
    """One step on p (k, m, n) in place, with its gradients g (left as they are) and its state.

    momentum: (k, m, n). second: (k, m, 1) where m >= n, else (k, 1, n): running mean squares of rows or columns.
    The direction has Frobenius norm sqrt(min(m, n)), and lr multiplies it as it is: the shape's factor
    sqrt(max(1, m / n)) is the caller's.
    """
    m, n = p.shape[-2:]
    momentum.lerp_(g, 1 - mu)
    u = orthogonalise(torch.lerp(g, momentum, mu), steps, dtype).float()

    # NorMuon (https://arxiv.org/abs/2510.05491): divide rows (columns of a wide matrix) by the root of their running
    # mean square. Muon+ (Frobenius norm sqrt(min(m, n))) comes before it and an equal norm is restored after it; all
    # three are factors per row, so that the matrix itself is read once and scaled once.
    along, across = (-1, -2) if m >= n else (-2, -1)
    length = p.size(along)
    square = u.square().mean(dim=along, keepdim=True)
    norm = (square.sum(dim=across, keepdim=True) * length).sqrt()
    plus = math.sqrt(min(m, n)) / norm.clamp_min(1e-6)
    square *= plus.square()
    second.lerp_(square, 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    after = ((square * scale.square()).sum(dim=across, keepdim=True) * length).sqrt()
    u *= plus * scale * (norm * plus / after.clamp_min(1e-10)) * lr

    # Cautious decay: only where it pulls the same way as the update.
    if weight_decay:
        agree = torch.mul(u, p).ge_(0)
        p.addcmul_(p, agree, value=-lr * weight_decay)
    p.sub_(u)
