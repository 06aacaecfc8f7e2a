"""Verdicts of the lab against simulated truth, published tables, brute force and scipy's distributions."""

import importlib.util
import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from nanolab.cli import UserError
from nanolab.lab.repeated import crossing, nominal, overall
from nanolab.lab.stats import (
    LOOKS,
    difference_variance,
    holm,
    minimum_detectable,
    pooled_variance,
    seeds_needed,
    threshold,
    verdicts,
)

BASE = (1.0, 1.4, 1.1, 1.3, 1.2, 1.5, 1.05, 1.25)
FAR = [x - 0.3 + e for x, e in zip(BASE, (0.01, -0.01, 0.02, -0.02, 0.01, 0.0, -0.01, 0.0))]
NEAR = [x + e for x, e in zip(BASE, (0.02, -0.01, 0.02, -0.02, 0.01, 0.0, -0.01, 0.0))]


@pytest.fixture(scope="module")
def lab_rates():
    path = Path(__file__).parents[2] / "dev" / "lab_rates.py"
    spec = importlib.util.spec_from_file_location("nanolab_dev_lab_rates", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def at_most(rate: float, promised: float, n: int = 10_000) -> bool:
    """Not above what is promised by more than three standard errors of n studies."""
    return rate <= promised + 3 * np.sqrt(promised * (1 - promised) / n)


# The levels of the looks


@pytest.mark.parametrize(("looks", "z"), [(1, 1.960), (2, 2.178), (3, 2.289), (4, 2.361), (5, 2.413)])
def test_levels_of_known_variance_are_pococks(looks, z):
    """Pocock 1977, table 1; with hundreds of seeds between looks, t is nearly normal."""
    from scipy.special import ndtr

    at = tuple(400 * (j + 1) for j in range(looks))
    assert crossing([2 * ndtr(-z)], at, tuple(n - 1.0 for n in at))[0] == pytest.approx(0.05, abs=2e-4)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize(
    ("looks", "arms", "prior"),
    [((3, 5, 8), 1, 0), ((3, 5, 8), 4, 0), ((3, 5, 8), 2, 4.5), ((2, 3, 4), 1, 0), ((3, 4, 5, 9), 2, 30)],
)
@pytest.mark.slow
def test_crossing_is_what_simulated_studies_do(looks, arms, prior, sides):
    from scipy.stats import t

    n, levels, rng = 100_000, np.array([0.002, 0.02, 0.2]), np.random.default_rng(0)
    x, more = rng.standard_normal((n, arms, looks[-1])), rng.chisquare(prior, n) if prior else 0
    least = np.ones(n)
    for m in looks:
        df, square = arms * (m - 1) + prior, x[:, :, :m].var(-1, ddof=1).sum(1) * (m - 1) + more
        value = x[:, 0, :m].mean(-1) / np.sqrt(square / df / m)
        least = np.minimum(least, sides * t.sf(np.abs(value) if sides == 2 else value, df))
    dfs = tuple(float(arms * (m - 1) + prior) for m in looks)
    found, error = crossing(levels, looks, dfs, sides), np.sqrt(levels * (1 - levels) / n)
    assert (np.abs((least[:, None] <= levels).mean(0) - found) < 5 * error).all()


def test_overall_and_nominal_are_inverse_and_agree_with_crossing():
    looks, dfs = (3, 5, 8), (8.0, 16.0, 28.0)
    for level in (0.05, 0.05 / 7, 1e-5):
        p = nominal(level, looks, dfs)
        assert overall(np.array([p]), looks, dfs)[0] == pytest.approx(level)
        assert crossing([p], looks, dfs)[0] == pytest.approx(level, rel=0.05 if level < 1e-3 else 1e-3)
    assert overall(np.array([0.0, 1.0]), looks, dfs) == pytest.approx([0, 1])


# The parts of a verdict


def test_holm_is_the_closed_test():
    """An arm is rejected where every set of arms that holds it is rejected by Bonferroni."""
    rng = np.random.default_rng(0)
    for p in rng.random((50, 4)) ** 3:
        sets = [s for r in range(1, 5) for s in itertools.combinations(range(4), r)]
        closed = [max(min(1, len(s) * min(p[i] for i in s)) for s in sets if arm in s) for arm in range(4)]
        assert holm(p) == pytest.approx(closed)


def test_pooled_variance_is_the_residual_of_a_linear_model():
    y = np.random.default_rng(0).standard_normal((5, 6)) + np.arange(6)
    columns = [np.repeat(np.eye(5), 6, axis=0), np.tile(np.eye(6), (5, 1))]
    *_, rank, _ = (fit := np.linalg.lstsq(design := np.hstack(columns), y.ravel(), rcond=None))
    residual = ((y.ravel() - design @ fit[0]) ** 2).sum()
    variance, per_seed, used = pooled_variance(y[None], np.ones((1, 5), bool))
    assert used.all() and per_seed[0] * 5 == y.size - rank
    assert variance[0] == pytest.approx(2 * residual / (y.size - rank))
    variance, _, _ = pooled_variance(y[None, :2], np.ones((1, 2), bool))
    assert variance[0] == pytest.approx(np.var(y[1] - y[0], ddof=1))


def test_a_row_far_noisier_than_the_others_is_judged_by_itself():
    y = np.random.default_rng(0).standard_normal((1, 6, 5))
    y[0, 3] *= 100
    square, times, _ = difference_variance(y, np.ones((1, 6), bool), "pooled", None)
    assert times.tolist() == [[4, 4, 1, 4, 4]]
    assert square[0, 2] == pytest.approx(np.var(y[0, 3] - y[0, 0], ddof=1)) and square[0, [0, 1, 3, 4]].max() < 10
    y[0, 0] *= 1000
    assert difference_variance(y, np.ones((1, 6), bool), "pooled", None)[1].tolist() == [[1] * 5]


def test_a_noise_study_moderates_the_variance_unless_it_contradicts():
    """Smyth 2004: (d0 s0^2 + d s^2) / (d0 + d), with d0 + d degrees of freedom."""
    s = np.std(np.subtract(NEAR, BASE), ddof=1)
    (found,) = verdicts(BASE, {"near": NEAR}, matters=0.1, prior=(0.03, 9.0))
    assert (found.sd, found.df) == (pytest.approx(np.sqrt((9 * 0.03**2 + 7 * s**2) / 16)), 16)
    assert found.variance == "own, moderated"
    (found,) = verdicts(BASE, {"near": NEAR}, matters=0.1, prior=(0.001, 9.0))
    assert (found.sd, found.df, found.variance) == (pytest.approx(s), 7, "own")


@pytest.mark.slow
def test_one_arm_and_one_look_are_the_paired_t_test():
    from scipy import stats

    (found,) = verdicts(BASE, {"near": NEAR}, matters=0.1, looks=[8])
    oracle = stats.ttest_rel(NEAR, BASE)
    assert found.p == pytest.approx(oracle.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval(0.95)))
    sides = [
        stats.ttest_1samp(np.subtract(NEAR, BASE), m, alternative=a) for m, a in ((0.1, "less"), (-0.1, "greater"))
    ]
    assert found.p_equivalent == pytest.approx(max(side.pvalue for side in sides))


# Verdicts


def test_each_verdict_and_its_direction():
    noise = [x + e for x, e in zip(BASE, (0.3, -0.2, 0.25, -0.3, 0.2, -0.2, 0.3, -0.25))]
    arms = {"far": FAR, "same": BASE, "near": NEAR, "noise": noise, "lost": [*BASE[:7], float("inf")]}
    for lower, word in ((True, "better"), (False, "worse")):
        found = verdicts(BASE, arms, matters=0.1, lower_is_better=lower, variance="own")
        assert [e.verdict for e in found] == [word, "identical", "equivalent", "unresolved", "diverged"]
    assert [e.seeds_needed is None for e in found] == [True, True, True, False, True]
    far, same, _, _, lost = found
    assert far.mean == pytest.approx(-0.3) and far.low < far.mean < far.high < 0
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert (lost.mean, lost.low, lost.high, lost.sd, lost.p) == (None, None, None, None, 1)
    assert json.loads(json.dumps([asdict(e) for e in found], allow_nan=False))[0]["arm"] == "far"


def test_seeds_between_looks_wait_and_those_after_the_last_are_not_read():
    def judged(n, m=9):
        return verdicts(
            BASE[:n] + (9.9,) * (n - 8), {"far": (FAR + [0.0])[:m], "near": (NEAR + [9.0])[:n]}, matters=0.1
        )

    assert [(e.n, e.seeds) for n in (1, 2, 3, 4, 5, 7, 8, 9) for e in judged(n)[:1]] == [
        (0, 1), (0, 2), (3, 3), (3, 4), (5, 5), (5, 7), (8, 8), (8, 9),
    ]  # fmt: skip
    for few, more in ((3, 4), (5, 7), (8, 9)):
        assert [{**asdict(e), "seeds": 0} for e in judged(few)] == [{**asdict(e), "seeds": 0} for e in judged(more)]
    before = judged(2)[0]
    assert (before.verdict, before.low, before.p, before.seeds_needed) == ("unresolved", None, 1, None)
    stopped, went_on = judged(8, m=3)
    assert (stopped.n, went_on.n) == (3, 8)
    assert (stopped.mean, stopped.low) == (judged(3)[0].mean, judged(3)[0].low)


def test_equal_differences_show_no_noise_and_settle_nothing():
    """Decimals leave rounding errors between them, which are no noise either."""
    base, shifted = (0.1, 0.7, 0.2), (0.1 + 0.1, 0.7 + 0.1, 0.2 + 0.1)
    assert np.ptp(np.subtract(shifted, base)) > 0
    (found,) = verdicts(base, {"shifted": shifted}, matters=0.01)
    assert (found.verdict, found.low, found.high, found.p) == ("unresolved", None, None, 1)
    assert found.mean == pytest.approx(0.1)


def test_a_row_that_repeats_another_adds_nothing_to_the_pool():
    base, near, far = np.random.default_rng(0).standard_normal((3, 8))
    alone = verdicts(base, {"near": near, "far": far}, matters=0.1)
    twice = verdicts(base, {"near": near, "far": far, "again": far, "same": base}, matters=0.1)
    assert [(e.sd, e.df, e.variance) for e in twice[:2]] == [(e.sd, e.df, e.variance) for e in alone]
    assert [(e.df, e.variance) for e in alone] == [(14, "pooled")] * 2


# Power


@pytest.mark.parametrize(
    ("n", "seen"),
    [(3, (3.28, 6.6, 8.1, 10.4)), (5, (1.70, 2.5, 2.8, 3.2)), (8, (1.16, 1.5, 1.7, 1.8)), (10, (1.00, 1.3, 1.4, 1.5))],
)
def test_the_least_effect_seen_is_that_of_an_independent_table(n, seen):
    """Computed before this code was written: one look, an arm's own variance, 1, 4, 6 and 10 arms."""
    found = [minimum_detectable(n, arms=arms, looks=[n], variance="own") for arms in (1, 4, 6, 10)]
    assert found == pytest.approx(seen, rel=0.035)


@pytest.mark.slow
def test_power_is_that_of_scipys_noncentral_t():
    from scipy.stats import nct, t

    for n, more in ((3, 0), (8, 0), (5, 9.0)):
        prior, dfs = (1.0, more) if more else None, tuple(m - 1.0 + more for m in LOOKS)
        effect, df = minimum_detectable(n, arms=4, variance="own", prior=prior), n - 1 + more
        cut = t.isf(nominal(0.05 / 4, LOOKS, dfs) / 2, df)
        assert nct.sf(cut, df, effect * np.sqrt(n)) == pytest.approx(0.8, abs=1e-4)


def test_seeds_needed_are_the_fewest():
    for effect in (4.0, 1.6, 0.7):
        plan = {"arms": 4, "looks": (3, 5, 8)}
        n = seeds_needed(effect * 0.1, 0.1, **plan)
        fewer = max((m for m in LOOKS if m < n), default=None) if n <= 8 else n - 1
        assert minimum_detectable(n, **plan) <= effect
        assert fewer is None or minimum_detectable(fewer, **plan) > effect
    assert (n, seeds_needed(4, arms=4)) == (n, 3) and n > 8


def test_an_unresolved_arm_says_how_many_seeds_would_settle_it():
    arm = [x + e for x, e in zip(BASE, (0.5, 0.0, 0.45, -0.1, 0.4, 0.0, 0.5, -0.05))]
    (found,) = verdicts(BASE, {"arm": arm}, matters=0.1)
    assert (found.verdict, found.seeds_needed) == ("unresolved", seeds_needed(0.1, found.sd)) and found.seeds_needed > 8
    (found,) = verdicts(BASE, {"arm": arm}, matters=0.4)  # 8 seeds would have shown it, and yet nothing is settled
    assert found.verdict == "unresolved" and seeds_needed(0.4, found.sd) <= 8
    assert found.seeds_needed == seeds_needed(0.2, found.sd) > 8


# A mean against a bar

ROW_4 = (0.25373, 0.2584, 0.25489, 0.2568, 0.25732, 0.26765, 0.25119)
PR_854 = (0.2592, 0.2557, 0.2584)
PR_830 = 0.261814 + 0.002295 * np.sqrt(5 / 6) * np.array([1, -1, 1, -1, 1, -1])  # its mean and sd, n = 6


@pytest.mark.parametrize(("values", "t", "reached"), [(ROW_4, 0.3, False), (PR_854, 1.2, False), (PR_830, 5.6, True)])
def test_a_mean_against_a_bar_as_published(values, t, reached):
    """nanochat's leaderboard: CORE of repeated runs against GPT-2's."""
    found = threshold(values, above=0.256525, level=0.01)
    assert (round(found.t, 1), found.reached, found.n) == (t, reached, len(values))
    assert (found.low > 0.256525) == reached
    below = threshold(-np.asarray(values), below=-0.256525, level=0.01)
    assert (below.t, below.p, below.high) == pytest.approx((found.t, found.p, -found.low))


@pytest.mark.slow
def test_the_bars_p_value_is_scipys():
    from scipy import stats

    found, oracle = threshold(ROW_4, above=0.256), stats.ttest_1samp(ROW_4, 0.256, alternative="greater")
    assert (found.p, found.t) == pytest.approx((oracle.pvalue, oracle.statistic))
    assert found.low == pytest.approx(oracle.confidence_interval(0.95).low)


# Bad input


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("no-arms", lambda: verdicts(BASE, {}, matters=0.1)),
        ("bad-matters", lambda: verdicts(BASE, {"a": FAR}, matters=0)),
        ("bad-matters", lambda: verdicts(BASE, {"a": FAR}, matters=float("nan"))),
        ("bad-looks", lambda: verdicts(BASE, {"a": FAR}, matters=0.1, looks=[3, 3])),
        ("bad-looks", lambda: verdicts(BASE, {"a": FAR}, matters=0.1, looks=[1, 3])),
        ("bad-level", lambda: verdicts(BASE, {"a": FAR}, matters=0.1, level=5)),
        ("bad-prior", lambda: verdicts(BASE, {"a": FAR}, matters=0.1, prior=(0.0, 9))),
        ("no-look", lambda: minimum_detectable(4)),
        ("bad-effect", lambda: seeds_needed(0, 1)),
        ("one-bar", lambda: threshold(BASE)),
        ("one-bar", lambda: threshold(BASE, above=1, below=2)),
        ("few-values", lambda: threshold([1.0], above=0.5)),
        ("few-values", lambda: threshold([1.0, float("nan")], above=0.5)),
        ("no-noise", lambda: threshold([1.0, 1.0], above=0.5)),
    ],
)
def test_bad_input_is_refused_by_name(code, call):
    with pytest.raises(UserError) as error:
        call()
    assert error.value.code == code


# The promises, in simulated studies


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["pooled", "own"])
@pytest.mark.parametrize("arms", [1, 4, 7])
def test_rates_in_simulated_studies(lab_rates, arms, variance):
    found = lab_rates.rates(10_000, arms, variance)
    assert at_most(found["wrong"], 0.05) and found["wrong"] <= 0.055
    assert at_most(1 - found["holds"], 0.05)
    assert at_most(found["equivalent"], 0.05)
    if variance == "pooled":
        assert found["power"] >= 0.95 and found["seeds"] <= 6


@pytest.mark.slow
def test_rates_where_settled_arms_stop_or_one_is_noisier(lab_rates):
    for made in ({"stop": True}, {"prior_df": 9}, {"noise": [1, 2, 1, 1, 1]}, {"tails": 5}):
        found = lab_rates.rates(4_000, 4, **made)
        assert at_most(found["wrong"], 0.05, 4_000) and at_most(found["equivalent"], 0.05, 4_000)
    assert lab_rates.power_at(4_000, 4, "pooled", 5) == pytest.approx(0.8, abs=0.03)


def test_ideas_without_effect_are_kept_as_often_as_records_fall(monkeypatch):
    """Of n numbers in random order the 2nd, 3rd, ... is the lowest so far with chance 1/2, 1/3, ...: 1/2 + ... + 1/n in
    all (Renyi 1962).
    """
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "dev"))
    greedy = importlib.import_module("null_ideas").greedy
    gain, kept = greedy(np.random.default_rng(1).standard_normal((20_000, 31)))
    assert kept.mean() == pytest.approx(sum(1 / i for i in range(2, 32)), abs=0.05)
    assert (gain[:, -1] >= 0).all() and gain.shape == (20_000, 31)
