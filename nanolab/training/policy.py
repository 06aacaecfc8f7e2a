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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanolab.runtime import Runtime

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


def logprobs(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """log pi (B, T), fp32: the model's own, of each target; 0 where the target is -1. No dropout, in training
    either.
    """
    model.eval()
    return -model(inputs, targets, reduction="none")


class PolicyLoss:
    """`fit`'s loss: the objective's sum over a micro-batch. What it measures on the way is collected for `measure`.

    The first update on a rollout is made by the weights that drew it: its own log probabilities are the old ones, to
    the bit, and it leaves them in the micro-batch for the updates to come."""

    def __init__(self, objective: Objective, max_tokens: int, runtime: Runtime):
        self.objective, self.max_tokens, self.runtime = objective, max_tokens, runtime
        self._sums = torch.zeros(3, device=runtime.device)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        o, mask = self.objective, batch.targets >= 0
        lp = logprobs(model, batch.inputs, batch.targets)
        if batch.old is None:
            batch.old = lp.detach()
        with torch.no_grad():
            cut = (clipped(lp, batch.old, batch.advantages, o.clip_low, o.clip_high) & mask).sum()
            away = k3(lp, batch.reference).sum() if batch.reference is not None else torch.zeros_like(cut)
            self._sums += torch.stack([mask.sum(), cut, away])
        return policy_loss(o, lp, batch.old, batch.reference, mask, batch.advantages, self.max_tokens)

    def measure(self) -> dict[str, float]:
        """Of the update since the last call, over all ranks: the share of tokens that the clip stopped, nats per token
        from the start model.
        """
        tokens, cut, away = self.runtime.all_reduce_(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        return {"rl/clipped": cut / tokens} | ({"rl/kl": away / tokens} if self.objective.kl else {})
