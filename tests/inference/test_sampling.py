"""Sampling against numpy formulas written out here: which tokens may appear, how often, and from which stream."""

import itertools

import numpy as np
import pytest
import torch

from nanolab.config import UserError
from nanolab.inference.sampling import row_generators, sample, truncate


def nucleus(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution by definition, in float64: sort by (-logit, id), cut after k, cut when the mass reaches p."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: top_k or len(order)]
    weights = np.exp((logits[order].astype(np.float64) - logits[order[0]]) / temperature)
    probs = weights / weights.sum()
    kept, mass = [], 0.0
    for i, p in zip(order, probs):
        kept.append((i, p))
        mass += p
        if mass >= top_p:
            break
    out = np.zeros(len(logits))
    for i, p in kept:
        out[i] = p
    return out / out.sum()


@pytest.mark.parametrize("temperature, top_k, top_p", list(itertools.product([0.5, 1.0, 2.0], [0, 1, 3, 50], [0.0, 0.3, 0.9, 1.0])))
def test_truncated_distribution_is_the_formula(temperature, top_k, top_p):
    logits = np.random.default_rng(3).normal(size=(6, 20)).astype(np.float32) * 2
    scores = truncate(torch.from_numpy(logits) / temperature, top_k, top_p)
    expected = np.stack([nucleus(row, temperature, top_k, top_p) for row in logits])
    np.testing.assert_allclose(scores.softmax(-1).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("top_k, top_p, kept", [(3, 1.0, [1, 2, 4]), (1, 1.0, [1]), (0, 0.55, [1, 2, 4]), (0, 0.5, [1, 2]), (4, 0.4, [1, 2])])
def test_ties_at_the_cut_go_to_the_lowest_ids(top_k, top_p, kept):
    probs = torch.tensor([[0.0625, 0.25, 0.25, 0.0625, 0.1875, 0.1875]])
    assert torch.isfinite(truncate(probs.log(), top_k, top_p))[0].nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.5, 0, 0.8), (1.0, 6, 0.9)])
def test_frequencies_pass_a_chi_square_test(temperature, top_k, top_p):
    logits = np.random.default_rng(11).normal(size=12).astype(np.float32)
    expected, n = nucleus(logits, temperature, top_k, top_p), 20_000
    ids, _ = sample(torch.from_numpy(logits).expand(n, -1), temperature, top_k, top_p, row_generators(5, n))
    counts = np.bincount(ids.numpy(), minlength=12)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi2 = ((counts[kept] - n * expected[kept]) ** 2 / (n * expected[kept])).sum()
    freedom = kept.sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 4, f"chi-square {chi2:.1f} with {freedom} degrees of freedom"


def test_greedy_takes_the_best_token_and_the_lowest_of_equals():
    logits = torch.zeros(3, 50)
    logits[0, [7, 3, 40]] = 2.0
    logits[1, 49] = 1e-3
    for temperature in (0.0, 1e-9):
        assert sample(logits, temperature, 0, 1.0, row_generators(1, 3))[0].tolist() == [3, 49, 0]


def test_logprob_is_the_models_own_whatever_the_settings():
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 9)))
    x = logits.numpy()
    expected = x - np.log(np.exp(x).sum(-1, keepdims=True))
    for temperature, top_k in ((0.0, 0), (0.3, 2), (1.0, 0)):
        ids, logprobs = sample(logits, temperature, top_k, 1.0, row_generators(1, 4))
        np.testing.assert_allclose(logprobs.numpy(), expected[np.arange(4), ids.numpy()], atol=1e-6)


def test_a_row_draws_the_same_alone_and_among_others():
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(30, 5, 40)))  # 30 steps, 5 rows

    def draw(rows: list[int], generators: list[torch.Generator]) -> list[list[int]]:
        return [sample(step[rows], 1.0, 0, 0.95, generators)[0].tolist() for step in logits]

    together = draw([0, 1, 2, 3, 4], row_generators([10, 11, 12, 13, 14], 5))
    for r in range(5):
        assert [[step[r]] for step in together] == draw([r], row_generators(10 + r, 1))
    assert len({tuple(step[r] for step in together) for r in range(5)}) == 5


def test_one_seed_gives_rows_of_their_own_that_do_not_depend_on_their_number():
    first = [g.initial_seed() for g in row_generators(7, 8)]
    assert len(set(first)) == 8
    assert first[:3] == [g.initial_seed() for g in row_generators(7, 3)]
    assert not set(first) & {g.initial_seed() for g in row_generators(8, 8)}


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4 + 1, -3e4]])
    for temperature in (1e-4, 1.0, 1e4):
        ids, logprobs = sample(logits, temperature, 0, 0.9, row_generators(1, 2))
        assert torch.isfinite(logprobs).all() and ((0 <= ids) & (ids < 3)).all()


@pytest.mark.parametrize("settings, flag", [((-1.0, 0, 1.0), "--temperature"), ((float("nan"), 0, 1.0), "--temperature"), ((1.0, -2, 1.0), "--top-k"), ((1.0, 0, 1.5), "--top-p")])
def test_meaningless_settings_are_refused(settings, flag):
    with pytest.raises(UserError, match=flag):
        sample(torch.zeros(1, 4), *settings, row_generators(1, 1))


def test_a_wrong_number_of_seeds_is_refused():
    with pytest.raises(UserError, match="2 seeds for 3 rows"):
        row_generators([1, 2], 3)
