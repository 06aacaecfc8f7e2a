"""Logits -> token ids: repetition penalty, temperature, top-k, top-p, one random stream per row, log probabilities.

Sampling inverts the cumulative distribution with one uniform number per row and step. The uniforms come from CPU
generators, one per row, so a row's text depends on its own seed and logits alone: not on its neighbours in the batch,
on the batch's size, or on the kind of device. Dims: B rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanolab.cli import UserError

COLDEST = 1e-5  # below this temperature the softmax is greedy to within fp32, and dividing by it overflows
AT_ONCE = 32  # uniform numbers that a row takes from its generator at a time


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


def check_settings(temperature: float, top_k: int, top_p: float, repetition_penalty: float = 1.0) -> None:
    """Raise UserError for settings that have no meaning."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature is {temperature}; expected 0 (greedy) or more; try --temperature 0.8")
    if top_k < 0:
        raise UserError(f"top-k is {top_k}; expected 0 (off) or a number of tokens; try --top-k 50")
    if not 0 <= top_p <= 1:
        raise UserError(f"top-p is {top_p}; expected a probability mass from 0 to 1 (off); try --top-p 0.9")
    if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
        raise UserError(f"repetition penalty is {repetition_penalty}; expected above 0, 1 being off; try 1.1")


@dataclass
class SamplingState:
    """How one row chooses its tokens: settings, random stream, and the tokens that a repetition penalty is about."""

    temperature: float
    top_k: int
    top_p: float
    generator: torch.Generator
    repetition_penalty: float = 1.0
    logprobs: int = 0  # likeliest tokens to report at each step
    seen: Tensor | None = None  # (V,) bool, where there is a penalty

    def __post_init__(self) -> None:
        self._uniforms: list[float] = []

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    def uniform(self) -> float:
        """The stream's next number in [0, 1), the same one until it is `spent`: a step that fails and is done again
        draws what it would have drawn.
        """
        if not self._uniforms:
            self._uniforms = torch.rand(AT_ONCE, generator=self.generator).tolist()[::-1]
        return self._uniforms[-1]

    def spent(self) -> None:
        """The number has chosen a token."""
        self._uniforms.pop()


class Choice(NamedTuple):
    token: int
    logprob: float  # the model's own, in nats, before penalty, temperature and truncation
    top: tuple[tuple[int, float], ...] = ()  # the `logprobs` likeliest (token, logprob), best first


@torch.no_grad()
def choose(logits: Tensor, rows: Sequence[SamplingState]) -> list[Choice]:
    """One token per row of logits (B, V), each by its own settings; rows that differ in temperature or top-p are drawn
    together.

    Order: repetition penalty (1 is off), temperature, top-k (0 is off), top-p (1 is off). Temperature 0 takes the best
    token, ties going to the lowest id."""
    logits = logits.float()
    scores = penalised(logits, rows)
    groups: dict[tuple[int, bool] | None, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(None if row.greedy else (row.top_k, row.top_p < 1), []).append(i)
    ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for kind, members in groups.items():
        part = scores if len(groups) == 1 else scores[members]
        # argmax: the first of several maxima
        new = part.argmax(-1) if kind is None else drawn(part, *kind, [rows[i] for i in members])
        ids = new if len(groups) == 1 else ids.index_copy(0, torch.tensor(members, device=ids.device), new)
    scaled = logits.log_softmax(-1)
    logprobs = scaled.gather(-1, ids[:, None])[:, 0]
    tokens, values = torch.stack((ids.double(), logprobs.double())).tolist()  # both in one reading of the device
    top = likeliest(scaled, rows) if any(row.logprobs > 0 for row in rows) else [()] * len(rows)
    for row in rows:
        if not row.greedy:
            row.spent()
    return [Choice(int(token), value, best) for token, value, best in zip(tokens, values, top)]


def drawn(scores: Tensor, top_k: int, nucleus: bool, rows: Sequence[SamplingState]) -> Tensor:
    """Tokens (B,) of rows that agree in top-k and in whether they use top-p."""
    settings = torch.tensor([[row.temperature, row.top_p, row.uniform()] for row in rows]).to(scores.device)
    temperature, top_p, uniforms = settings.split(1, dim=-1)
    return invert_cdf(truncate(scores / temperature, top_k, top_p if nucleus else 1.0).softmax(-1), uniforms[:, 0])


def likeliest(logprobs: Tensor, rows: Sequence[SamplingState]) -> list[tuple[tuple[int, float], ...]]:
    values, ids = logprobs.topk(min(max(row.logprobs for row in rows), logprobs.size(-1)))
    return [tuple(zip(i[: max(0, row.logprobs)], v)) for row, i, v in zip(rows, ids.tolist(), values.tolist())]


def penalised(logits: Tensor, rows: Sequence[SamplingState]) -> Tensor:
    """Logits of tokens that a row has seen, divided by its penalty where positive and multiplied where not. CTRL, arXiv
    1909.05858.
    """
    members = [i for i, row in enumerate(rows) if row.seen is not None]
    if not members:
        return logits
    seen = torch.stack([rows[i].seen for i in members])
    by = torch.tensor([[rows[i].repetition_penalty] for i in members], device=logits.device)
    scores, part = logits.clone(), logits[members]
    scores[members] = torch.where(seen, torch.where(part > 0, part / by, part * by), part)
    return scores


def truncate(scores: Tensor, top_k: int, top_p: float | Tensor) -> Tensor:
    """Scores (B, V) with -inf outside the top-k tokens and outside the nucleus among them. top_p: a number, or (B, 1).

    The nucleus is the smallest set of best tokens whose probability is at least `top_p`; it is never empty
    (https://arxiv.org/abs/1904.09751). Exactly as many tokens are kept as that says: of equal scores, the lowest ids.
    """
    V = scores.size(-1)
    k = min(top_k or V, V)
    nucleus = isinstance(top_p, Tensor) or top_p < 1
    if k == V and not nucleus:
        return scores
    best = scores.topk(k).values  # descending
    keep = torch.full_like(best[:, :1], k, dtype=torch.int64)
    if nucleus:
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
