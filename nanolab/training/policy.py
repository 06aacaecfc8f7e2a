"""The policy-gradient objective as tables: what a reply's advantage is, how tokens are weighed, when a ratio is
clipped.

For a reply i with tokens t that the policy itself drew, the loss is

    L = 1/Z * sum_i sum_t w_it * ( -min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i) + kl * k3_it )
    r_it = pi(o_it | before) / pi_old(o_it | before)

A_i is an entry of ADVANTAGES, (w, Z) one of NORMALISERS, and a named algorithm is a row of ALGORITHMS. pi_old is the
policy that drew the reply: in the first update after a rollout r is 1, its gradient that of log pi, and nothing is
clipped, so that the first update is REINFORCE with these advantages and weights whatever the clip. All functions take
plain tensors. Dims: P prompts, G replies to each, B replies, T tokens of a padded row. The mask (B, T) is true for the
trained tokens: what the policy drew, its end of turn included; not the prompt, a tool's output or padding.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanolab.cli import UserError, nearest
from nanolab.training.config import RLConfig

STD_EPS = 1e-4  # beside the standard deviation, so that rewards which differ by rounding do not become advantages of 1


# Advantages: rewards (P, G) -> (P, G). A group of equal rewards gives exact zeros: an optimizer that is indifferent to
# the scale of a gradient (Adam, Muon) would make a full step of what rounding leaves of 0.1 - mean(0.1, 0.1, 0.1).


def mean_centred(rewards: Tensor) -> Tensor:
    """r_i - mean(r): the group's mean as the baseline of REINFORCE (Williams 1992); Dr. GRPO, arXiv 2503.20783."""
    from_first = rewards - rewards[:, :1]
    return from_first - from_first.mean(1, keepdim=True)


def standardised(rewards: Tensor) -> Tensor:
    """(r_i - mean(r)) / (std(r) + 1e-4), std over the G replies (divided by G): GRPO, arXiv 2402.03300, section
    4.1.2.
    """
    centred = mean_centred(rewards)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + STD_EPS)


def leave_one_out(rewards: Tensor) -> Tensor:
    """r_i - mean of the other replies' rewards = G / (G - 1) * (r_i - mean(r)): RLOO, arXiv 2402.14740."""
    G = rewards.size(1)
    return mean_centred(rewards) * (G / (G - 1))


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": mean_centred,
    "standardised": standardised,
    "leave_one_out": leave_one_out,
}


class Normaliser(NamedTuple):
    """weights(mask (B, T) of 0. and 1., max_tokens) -> w (B, T); total(mask) -> these replies' share of Z, which is
    summed over the batch.
    """

    weights: Callable[[Tensor, int], Tensor]
    total: Callable[[Tensor], int]


def _tokens(mask: Tensor) -> int:
    return int(mask.sum())


def _replies(mask: Tensor) -> int:
    return mask.size(0)


NORMALISERS: dict[str, Normaliser] = {
    # the mean over all tokens of the batch: every token counts alike, so long replies count more (DAPO, arXiv
    # 2503.14476, section 3.3)
    "token": Normaliser(lambda mask, max_tokens: mask, _tokens),
    # the mean over replies of the mean over tokens, 1/|o_i|: every reply counts alike (GRPO, arXiv 2402.03300, eq. 3)
    "sequence": Normaliser(lambda mask, max_tokens: mask / mask.sum(1, keepdim=True).clamp(min=1), _replies),
    # sums over tokens divided by a constant, so that a token's weight knows nothing of its reply's length (Dr. GRPO,
    # arXiv 2503.20783)
    "constant": Normaliser(lambda mask, max_tokens: mask / max_tokens, _replies),
}


@dataclass(frozen=True)
class Objective:
    """A choice on each axis."""

    advantage: str = "mean"
    normaliser: str = "token"
    clip_low: float = 0.0  # 0: no lower bound
    clip_high: float = 0.0  # 0: no upper bound
    kl: float = 0.0  # weight of the divergence from the start model; 0: none, and no such model is held


ALGORITHMS: dict[str, Objective] = {
    # Williams 1992 (doi 10.1007/BF00992696) with the group's mean as baseline, averaged over tokens
    "reinforce": Objective(),
    # arXiv 2402.03300, eq. 3; kl 0.04 as in its section 4.2, the clip is PPO's (arXiv 1707.06347)
    "grpo": Objective("standardised", "sequence", 0.2, 0.2, 0.04),
    # arXiv 2503.20783: neither 1/|o_i| nor the standard deviation, and no divergence
    "dr_grpo": Objective("mean", "constant", 0.2, 0.2),
}


def ratios(logprobs: Tensor, old: Tensor) -> Tensor:
    return (logprobs - old).exp()


def surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) of every token: (B, T) from logprobs and old (B, T), advantages (B,).

    PPO's clipped objective, arXiv 1707.06347, eq. 7, with two bounds as in DAPO (arXiv 2503.14476, section 3.1). Where
    the ratio has moved past its bound in the direction that A rewards, the value is constant and the gradient exactly
    zero; past the other bound nothing is clipped."""
    r, A = ratios(logprobs, old), advantages[:, None]
    if not low and not high:
        return -r * A
    return -torch.minimum(r * A, r.clamp(*_bounds(low, high)) * A)


def clipped(logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """(B, T) bool: the tokens whose gradient the clip has set to zero."""
    r, A = ratios(logprobs, old), advantages[:, None]
    lower, upper = _bounds(low, high)
    return ((A > 0) & (r > upper)) | ((A < 0) & (r < lower))


def _bounds(low: float, high: float) -> tuple[float, float]:
    return (1 - low if low else 0.0), (1 + high if high else torch.inf)


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = log pi_ref - log pi, of every token.

    An estimate of KL(pi || pi_ref) that is never negative (Schulman, http://joschu.net/blog/kl-approx.html; GRPO, eq.
    4).
    Its gradient, (1 - exp(d)) * grad log pi, vanishes where pi = pi_ref; in expectation over the policy's own tokens it
    is
    the gradient of KL(pi_ref || pi).
    """
    d = reference - logprobs
    return d.exp() - d - 1


def policy_loss(
    objective: Objective,
    logprobs: Tensor,
    old: Tensor,
    reference: Tensor | None,
    mask: Tensor,
    advantages: Tensor,
    max_tokens: int,
) -> Tensor:
    """The sum over B replies: divided by Z of the whole batch, the loss L of this module's docstring."""
    nats = surrogate(logprobs, old, advantages, objective.clip_low, objective.clip_high)
    if reference is not None:
        nats = nats + objective.kl * k3(logprobs, reference)
    return (nats * NORMALISERS[objective.normaliser].weights(mask.to(nats.dtype), max_tokens)).sum()


def objective_of(cfg: RLConfig) -> Objective:
    """The algorithm that `cfg` names, with the choices it makes on single axes. Raises UserError, naming what is
    close.
    """
    _known("algorithm", cfg.algorithm, ALGORITHMS)
    row = ALGORITHMS[cfg.algorithm]
    names = {"advantage": cfg.advantage, "normaliser": cfg.normaliser}
    numbers = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high, "kl": cfg.kl}
    chosen = dataclasses.replace(
        row, **{k: v for k, v in names.items() if v}, **{k: v for k, v in numbers.items() if v != -1}
    )
    _known("advantage", chosen.advantage, ADVANTAGES)
    _known("normaliser", chosen.normaliser, NORMALISERS)
    if not 0 <= chosen.clip_low < 1:
        raise UserError(
            f"--clip-low is {chosen.clip_low:g}; expected at least 0 (off) and below 1: ratios end at 1 - clip-low; try"
            " --clip-low 0.2"
        )
    for name in ("clip_high", "kl"):
        if not 0 <= getattr(chosen, name) < torch.inf:
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} is {getattr(chosen, name):g}; expected 0 (off) or more; try --{flag}"
                f" {getattr(ALGORITHMS['grpo'], name):g}"
            )
    return chosen


def _known(flag: str, name: str, table: dict) -> None:
    if name not in table:
        raise UserError(
            f"{flag} {name!r} is unknown; expected one of"
            f" {', '.join(table)}{nearest(name, list(table), prefix=f'--{flag} ')}"
        )
