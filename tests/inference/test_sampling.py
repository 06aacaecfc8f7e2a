"""Sampling against numpy formulas written out here: which tokens may appear, how often, and from which stream."""

import itertools

import numpy as np
import pytest
import torch

from nanolab.cli import UserError
from nanolab.inference.sampling import SamplingState, check_settings, choose, row_generators, truncate


def sample(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generators: list
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log probabilities of rows with the same settings."""
    chosen = choose(logits, [SamplingState(temperature, top_k, top_p, g) for g in generators])
    return torch.tensor([c.token for c in chosen]), torch.tensor([c.logprob for c in chosen])


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


@pytest.mark.parametrize(
    "temperature, top_k, top_p", list(itertools.product([0.5, 1.0, 2.0], [0, 1, 3, 50], [0.0, 0.3, 0.9, 1.0]))
)
def test_truncated_distribution_is_the_formula(temperature, top_k, top_p):
    logits = np.random.default_rng(3).normal(size=(6, 20)).astype(np.float32) * 2
    scores = truncate(torch.from_numpy(logits) / temperature, top_k, top_p)
    expected = np.stack([nucleus(row, temperature, top_k, top_p) for row in logits])
    np.testing.assert_allclose(scores.softmax(-1).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "top_k, top_p, kept", [(3, 1.0, [1, 2, 4]), (1, 1.0, [1]), (0, 0.55, [1, 2, 4]), (0, 0.5, [1, 2]), (4, 0.4, [1, 2])]
)
def test_ties_at_the_cut_go_to_the_lowest_ids(top_k, top_p, kept):
    probs = torch.tensor([[0.0625, 0.25, 0.25, 0.0625, 0.1875, 0.1875]])
    assert torch.isfinite(truncate(probs.log(), top_k, top_p))[0].nonzero()[:, 0].tolist() == kept


@pytest.mark.slow
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
        draws = [SamplingState(1.0, 0, 0.95, g) for g in generators]
        return [[c.token for c in choose(step[rows], draws)] for step in logits]

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


@pytest.mark.parametrize(
    "settings, flag",
    [
        ((-1.0, 0, 1.0), "--temperature"),
        ((float("nan"), 0, 1.0), "--temperature"),
        ((1.0, -2, 1.0), "--top-k"),
        ((1.0, 0, 1.5), "--top-p"),
        ((1.0, 0, 1.0, 0.0), "penalty"),
    ],
)
def test_meaningless_settings_are_refused(settings, flag):
    with pytest.raises(UserError, match=flag):
        check_settings(*settings)


def test_a_wrong_number_of_seeds_is_refused():
    with pytest.raises(UserError, match="2 seeds for 3 rows"):
        row_generators([1, 2], 3)


def test_rows_with_settings_of_their_own_are_drawn_as_each_alone():
    rng = np.random.default_rng(4)
    logits = torch.from_numpy(rng.normal(size=(40, 9, 30))).float()
    settings = [
        (0.0, 0, 1.0),
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (1.0, 5, 1.0),
        (2.0, 5, 1.0),
        (1.0, 0, 0.5),
        (1.0, 0, 0.9),
        (0.7, 5, 0.8),
        (0.0, 3, 0.5),
    ]

    def draw(members: list[int]) -> list[list[int]]:
        draws = [SamplingState(*settings[i], row_generators([i], 1)[0], 1.0 + 0.2 * (i % 2), i % 3) for i in members]
        return [[c.token for c in choose(step[members], draws)] for step in logits]

    together = draw(list(range(9)))
    for i in range(9):
        assert [[step[i]] for step in together] == draw([i])


def test_the_penalty_divides_positive_logits_of_seen_tokens_and_multiplies_negative_ones():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.2], [2.0, 1.5, -1.0, -1.2]])
    seen = torch.tensor([True, False, True, False])
    rows = [SamplingState(0.0, 0, 1.0, None, 1.5, 4, seen), SamplingState(0.0, 0, 1.0, None)]
    penalised, plain = choose(logits, rows)
    assert (penalised.token, plain.token) == (1, 0)  # 2 / 1.5 < 1.5
    assert penalised.logprob == pytest.approx(logits[0].log_softmax(-1)[1].item(), abs=1e-6)  # the model's own
    assert [i for i, _ in penalised.top] == [0, 1, 2, 3] and plain.top == ()
    n = 4000
    draws = [SamplingState(1.0, 0, 1.0, g, 1.5, 0, seen) for g in row_generators(3, n)]
    counts = np.bincount([c.token for c in choose(logits[:1].expand(n, -1), draws)], minlength=4) / n
    weights = np.exp([2 / 1.5, 1.5, -1.5, -1.2])
    np.testing.assert_allclose(counts, weights / weights.sum(), atol=0.03)


def test_the_likeliest_are_reported_with_the_models_own_log_probabilities():
    logits = torch.from_numpy(np.random.default_rng(2).normal(size=(3, 12))).float()
    chosen = choose(logits, [SamplingState(0.5, 2, 1.0, g, 1.0, n) for g, n in zip(row_generators(1, 3), (0, 2, 20))])
    assert [len(c.top) for c in chosen] == [0, 2, 12]
    for c, row in zip(chosen, logits.double().log_softmax(-1).numpy()):
        order = np.argsort(-row)[: len(c.top)]
        assert [i for i, _ in c.top] == order.tolist()
        np.testing.assert_allclose([p for _, p in c.top], row[order], atol=1e-6)
