"""Logits -> token ids: temperature, top-k, top-p, one random stream per row.

Sampling inverts the cumulative distribution with one uniform number per row and step. The uniforms come from CPU
generators, one per row, so a row's text depends on its own seed and logits alone: not on its neighbours in the batch,
on the batch's size, or on the kind of device. Dims: B rows, V vocabulary.
"""

import math
from typing import Sequence

import torch
from torch import Tensor

from nanolab.config import UserError

COLDEST = 1e-5  # below this temperature the softmax is greedy to within fp32, and dividing by it overflows


def row_generators(seed: int | Sequence[int], rows: int) -> list[torch.Generator]:
    """One CPU generator per row.

    An int gives each row its own stream, and row r's stream does not depend on how many rows there are. A list gives
    one seed per row; row r then samples what it would sample alone, in a batch of one with `seed=seed[r]`.
    """
    if not isinstance(seed, int):
        if len(seed) != rows:
            raise UserError(f"{len(seed)} seeds for {rows} rows; expected one seed, or one per row")
        return [row_generators(s, 1)[0] for s in seed]
    source = torch.Generator().manual_seed(seed)
    return [torch.Generator().manual_seed(int(s)) for s in torch.randint(2**62, (rows,), generator=source)]


def check_settings(temperature: float, top_k: int, top_p: float) -> None:
    """Raise UserError for settings that have no meaning."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature is {temperature}; expected 0 (greedy) or more; try --temperature 0.8")
    if top_k < 0:
        raise UserError(f"top-k is {top_k}; expected 0 (off) or a number of tokens; try --top-k 50")
    if not 0 <= top_p <= 1:
        raise UserError(f"top-p is {top_p}; expected a probability mass from 0 to 1 (off); try --top-p 0.9")


@torch.no_grad()
def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Draw one token per row from logits (B, V).

    Order: temperature, then top-k (0 is off), then top-p (1 is off). Temperature 0 takes the best token, ties going to
    the lowest id. Returns ids (B,) int64 and logprobs (B,) fp32: the model's own log probability of each chosen token,
    in nats, before temperature and truncation.
    """
    check_settings(temperature, top_k, top_p)
    logits = logits.float()
    if temperature < COLDEST:
        ids = logits.argmax(-1)  # documented to return the first of several maxima
    else:
        scores = truncate(logits / temperature, top_k, top_p)
        uniforms = torch.cat([torch.rand(1, generator=g) for g in generators]).to(logits.device)
        ids = invert_cdf(scores.softmax(-1), uniforms)
    chosen = logits.gather(-1, ids[:, None])[:, 0]
    return ids, chosen - logits.logsumexp(-1)


def truncate(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores (B, V) with -inf outside the top-k tokens and outside the nucleus among them.

    The nucleus is the smallest set of best tokens whose probability is at least `top_p`; it is never empty
    (https://arxiv.org/abs/1904.09751). Exactly as many tokens are kept as that says: of equal scores, the lowest ids.
    """
    V = scores.size(-1)
    k = min(top_k or V, V)
    if k == V and top_p >= 1:
        return scores
    best = scores.topk(k).values  # descending
    keep = torch.full_like(best[:, :1], k, dtype=torch.int64)
    if top_p < 1:
        mass_before = best.softmax(-1).cumsum(-1).roll(1, -1)
        mass_before[:, 0] = 0
        keep = (mass_before < top_p).sum(-1, keepdim=True).clamp(min=1)
    cut = best.gather(-1, keep - 1)
    above, level = scores > cut, scores == cut
    kept = above | (level & (level.cumsum(-1) <= keep - above.sum(-1, keepdim=True)))
    return scores.masked_fill(~kept, -math.inf)


def invert_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which each row's cumulative probability (B, V) first exceeds its uniform number (B,) in [0, 1).

    A parallel cumulative sum is not quite monotone, so a token of probability 0 is ruled out by name; where rounding
    leaves no token beyond the target, the likeliest stands in.
    """
    cdf = probs.cumsum(-1)
    beyond = (cdf > uniforms[:, None] * cdf[:, -1:]) & (probs > 0)
    return torch.where(beyond.any(-1), beyond.byte().argmax(-1), probs.argmax(-1))
