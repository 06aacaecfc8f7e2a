"""Verdicts on arms of a study against its baseline, seed by seed, that keep their error rate over arms and looks.
Imports no torch.

The differences arm - baseline at equal seeds are t-tested after a few numbers of seeds, the looks. Errors are counted
over the family of all arms at all looks of one study, and each of these has at most the probability `level`:

- that any arm without an effect is called better or worse at any look,
- that any arm that differs by `matters` or more is called equivalent at any look.

dev/results/lab/rates.md has both, simulated, also for noise that is not what the t-test assumes.

A p-value is adjusted exactly for the looks (repeated.py), then over arms by Holm, Scandinavian J. Statistics 6 (1979),
65; together this is a closed test (Maurer & Bretz, Statistics in Biopharmaceutical Research 5 (2013), 311). An interval
is a repeated confidence interval (Jennison & Turnbull, JRSS B 51 (1989), 305): for each arm by itself, the intervals of
all looks hold the true difference with probability 1 - `level`. It is not widened for the number of arms, so that it
may leave out 0 while the verdict is unresolved."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import chdtri, fdtri, nctdtrinc, ndtr, stdtr, stdtrit

from nanolab.cli import UserError
from nanolab.lab.repeated import nominal, overall

LOOKS = (3, 5, 8)  # seeds after which a verdict is read
MOST_SEEDS = 10**9
OUTLYING = 0.01  # level of the F-test that finds a row noisier than the others
Variance = Literal["pooled", "own"]
# what is known of an arm before its first look
UNSEEN = {name: np.nan for name in ("mean", "half", "sd", "df")} | {"times": 1, "moderated": False}
UNSEEN |= {"p": 1.0, "p_equivalent": 1.0, "diverged": False, "identical": False}


@dataclass(frozen=True)
class Effect:
    """Of one arm against the baseline, in the metric's units; JSON-ready by dataclasses.asdict. What could not be
    computed is None: all numbers of a diverged arm, the interval where no noise was seen or no look was reached."""

    arm: str
    seeds: int  # that both have run
    n: int  # that are judged: those of the last look reached. The others wait for the next look, or came after the last
    mean: float | None  # of the paired differences arm - baseline
    low: float | None  # repeated confidence interval
    high: float | None
    sd: float | None  # of a paired difference, as the interval takes it
    df: float | None  # its degrees of freedom
    variance: str  # pooled | own | pooled, moderated | own, moderated: where sd comes from
    p: float  # two-sided, adjusted for looks and arms: better or worse where it is at most `level`
    p_equivalent: float  # the same of the two one-sided tests against `matters`
    verdict: str  # better | worse | equivalent | identical | unresolved | diverged
    seeds_needed: int | None  # of unresolved arms: seeds in all


@dataclass(frozen=True)
class Threshold:
    """A mean against a bar, one-sided."""

    n: int
    mean: float
    sd: float
    t: float  # in the direction asked for
    df: int
    p: float
    low: float  # two-sided interval of level 1 - 2 `level`: it leaves out the bar exactly where p < `level`
    high: float
    reached: bool


def holm(p: np.ndarray) -> np.ndarray:
    """p-values (..., k) adjusted for the k of them."""
    k, order = p.shape[-1], np.argsort(p, -1)
    rising = np.maximum.accumulate(np.take_along_axis(p, order, -1) * np.arange(k, 0, -1), -1)
    return np.minimum(1, np.take_along_axis(rising, np.argsort(order, -1), -1))


def pooled_variance(values: np.ndarray, use: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(variance of a paired difference (S,), its degrees of freedom per n - 1 (S,), rows that it is of (S, A)).

    values: (S, A, n), studies x rows (baseline and arms) x seeds; use: (S, A), the rows to pool. In the model value =
    row + seed + noise the residual mean square estimates the noise's variance with (A - 1)(n - 1) degrees of freedom,
    and a paired difference has twice that; the differences themselves share the baseline, so the mean of their
    variances has fewer. The model takes all rows to be equally noisy: while the noisiest row's contrast with the others
    fails an F-test (level OUTLYING over the rows), it is left out."""
    n, use = values.shape[-1], use.copy()
    z = values - values.mean(-1, keepdims=True)
    while True:
        rows = use.sum(1)
        residuals = np.where(use[..., None], z - (z * use[..., None]).sum(1, keepdims=True) / rows[:, None, None], 0)
        square = (residuals**2).sum(-1)
        total, own = square.sum(1), square.max(1) * rows / np.maximum(1, rows - 1)
        testable = np.flatnonzero((rows > 2) & (total > 0))
        A, df = rows[testable], n - 1
        excess = own[testable] * (A - 2) > (total - own)[testable] * fdtri(df, (A - 2) * df, 1 - OUTLYING / A)
        if not excess.any():
            return 2 * total / np.maximum(1, rows - 1) / df, rows - 1, use
        noisy = testable[excess]
        use[noisy, square[noisy].argmax(1)] = False


def difference_variance(values: np.ndarray, use: np.ndarray, variance: Variance, prior) -> tuple[np.ndarray, ...]:
    """(variance of each arm's paired differences, arms that it is pooled over, whether prior moderates it), all (S, k);
    use: (S, k + 1), the rows with noise of their own.

    An arm of the pool has the pool's variance or its own, whichever is larger: on three seeds the F-test sees only rows
    that are many times noisier. dev/results/lab/rates.md has what this leaves of their errors."""
    n, differences = values.shape[-1], values[:, 1:] - values[:, :1]
    square, times = differences.var(-1, ddof=1), np.ones(differences.shape[:2], int)
    if variance == "pooled":
        pooled, arms, used = pooled_variance(values, use)
        used = used[:, 1:] & used[:, :1] & (arms > 1)[:, None]
        square = np.where(used, np.maximum(square, pooled[:, None]), square)
        times = np.where(used, arms[:, None], times)
    if not prior:
        return square, times, np.zeros(times.shape, bool)
    sd, more = prior
    moderated, df = square <= sd**2 * fdtri(n - 1, more, 1 - OUTLYING), times * (n - 1)
    return np.where(moderated, (df * square + more * sd**2) / (df + more), square), times, moderated


def degrees(looks: Sequence[int], pool: int, prior: tuple[float, float] | None) -> tuple[float, ...]:
    """Degrees of freedom at each look, of a variance pooled over this many arms."""
    return tuple(float(pool * (n - 1) + (prior[1] if prior else 0)) for n in looks)


def judge(values: np.ndarray, n: int, matters: float, looks, level: float, variance: Variance, prior) -> dict:
    """What the look after n seeds says of each arm, before Holm: arrays (S, k) by name.

    values: (S, k + 1, n or more), studies x (baseline, then arms) x seeds."""
    values = values[..., :n]
    finite = np.isfinite(values).all(-1)
    diverged, values = ~(finite[:, 1:] & finite[:, :1]), np.where(finite[..., None], values, 0)
    same = np.ones((*finite.shape, finite.shape[1]), bool)  # a row that repeats an earlier one has no noise of its own
    for seed in np.moveaxis(values, -1, 0):
        same &= seed[:, :, None] == seed[:, None]
    own = finite & ~np.tril(same, -1).any(-1)
    square, times, moderated = difference_variance(values, own, variance, prior)
    identical = same[:, 1:, 0] & ~diverged
    seen = (square > (1e-12 * np.abs(values).max((1, 2))[:, None]) ** 2) & ~diverged & ~identical  # beyond rounding
    mean, error = (values[:, 1:] - values[:, :1]).mean(-1), np.sqrt(np.where(seen, square, 1) / n)
    half, df = np.where(identical, 0, np.full(mean.shape, np.nan)), np.zeros(mean.shape)
    p, p_equivalent = np.ones(mean.shape), np.where(identical, 0, np.ones(mean.shape))
    for rule in np.unique(2 * times + moderated):
        dfs = degrees(looks, rule // 2, prior if rule % 2 else None)
        d, at = dfs[looks.index(n)], 2 * times + moderated == rule
        df[at], at = d, at & seen
        t, outside = np.abs(mean[at]) / error[at], (np.abs(mean[at]) - matters) / error[at]
        p[at], p_equivalent[at] = overall(2 * stdtr(d, -t), looks, dfs), overall(stdtr(d, outside), looks, dfs, 1)
        half[at] = -stdtrit(d, nominal(level, looks, dfs) / 2) * error[at]
    mean, sd = (np.where(diverged, np.nan, x) for x in (mean, np.sqrt(square)))
    found = {"mean": mean, "half": half, "sd": sd, "df": df, "times": times, "moderated": moderated}
    return found | {"p": p, "p_equivalent": p_equivalent, "diverged": diverged, "identical": identical}


def decide(found: dict, level: float, lower_is_better: bool) -> np.ndarray:
    """The verdict on each arm, (S, k), from `judge`'s arrays of all arms of a study; adjusts their p-values by Holm."""
    for name in ("p", "p_equivalent"):
        found[name] = holm(found[name])
    better = (found["mean"] < 0) == lower_is_better
    cases = {
        "diverged": found["diverged"],
        "identical": found["identical"],
        "better": better & (found["p"] <= level),
        "worse": ~better & (found["p"] <= level),
        "equivalent": found["p_equivalent"] <= level,
    }
    return np.select(list(cases.values()), list(cases), "unresolved")


def check_plan(looks: Sequence[int], level: float, prior: tuple[float, float] | None) -> tuple[int, ...]:
    """The looks. Raises UserError where they, the level or the noise study's sd and df cannot be used."""
    looks = tuple(looks)
    if not looks or looks[0] < 2 or any(b <= a for a, b in zip(looks, looks[1:])):
        raise UserError(
            f"looks = {list(looks)}; expected rising numbers of seeds from 2 on; try {list(LOOKS)}",
            "bad-looks",
            looks=looks,
        )
    if not 0 < level < 0.5:
        raise UserError(f"level = {level}; expected a number between 0 and 0.5; try 0.05", "bad-level", level=level)
    if prior and not all(0 < x < math.inf for x in prior):
        raise UserError(
            f"prior = {prior}; expected the sd of a paired difference and its degrees of freedom, both positive",
            "bad-prior",
            prior=prior,
        )
    return looks


def verdicts(
    baseline: Sequence[float],
    arms: Mapping[str, Sequence[float]],
    *,
    matters: float,
    lower_is_better: bool = True,
    looks: Sequence[int] = LOOKS,
    level: float = 0.05,
    variance: Variance = "pooled",
    prior: tuple[float, float] | None = None,
) -> list[Effect]:
    """One Effect per arm. Values are paired by position; an arm may have fewer than the baseline.

    A number of seeds that is no look is judged at the last look before it, by the first `n` seeds; below the first look
    nothing is. In this order an arm is

    - diverged     a value of its judged seeds, or of the baseline's, is no finite number. The mean of the others would
                   flatter it. It still counts in Holm's family
    - identical    every difference is exactly 0
    - better, worse
    - equivalent   the difference is less than `matters`, by two one-sided tests
    - unresolved   seeds_needed says how many seeds in all would show `matters` with power .8 at Holm's first step, at
                   the sd found; where that many have run, how many would show half of it, and so on

    Differences that are all the same and not 0 show no noise to judge by: unresolved, without an interval.

    matters: the smallest difference that matters, positive, in the metric's units. variance: "pooled" over all rows
    that are equally noisy, or each arm's "own". prior: (sd of a paired difference, degrees of freedom) of a noise
    study; moderates the variance (Smyth, Statistical Applications in Genetics 3 (2004), 3) unless an F-test finds the
    study noisier. Raises UserError: no-arms, bad-matters, bad-looks, bad-level, bad-prior."""
    looks = check_plan(looks, level, prior)
    if not arms:
        raise UserError("no arm to compare with the baseline; expected at least one", "no-arms")
    if not 0 < matters < math.inf:
        raise UserError(
            f"matters = {matters}; expected the smallest difference that matters, a positive number",
            "bad-matters",
            matters=matters,
        )
    seeds = [min(len(baseline), len(values)) for values in arms.values()]
    judged = np.array([max((look for look in looks if look <= n), default=0) for n in seeds])
    rows = np.full((1, len(arms) + 1, max(looks)), np.nan)
    for row, values in zip(rows[0], (baseline, *arms.values())):
        row[: len(values)] = values[: max(looks)]
    found = {name: np.full((1, len(arms)), start) for name, start in UNSEEN.items()}
    for n in {*judged} - {0}:
        ran = judged >= n
        look = judge(rows[:, [True, *ran]], n, matters, looks, level, variance, prior)
        for name, column in look.items():
            found[name][:, judged == n] = column[:, judged[ran] == n]
    called = decide(found, level, lower_is_better)[0]
    effects = []
    for i, arm in enumerate(arms):
        at = {name: None if np.isnan(column[0, i]) else column[0, i].item() for name, column in found.items()}
        mean, half, n = at["mean"], at["half"], int(judged[i])
        low, high = (None, None) if half is None else (mean - half, mean + half)
        source = ("pooled" if at["times"] > 1 else "own") + (", moderated" if at["moderated"] else "")
        numbers = mean, low, high, at["sd"], at["df"], source, at["p"], at["p_equivalent"], str(called[i])
        unresolved = called[i] == "unresolved" and half is not None
        needed = _needed(matters, n, len(arms), at, looks, level, prior) if unresolved else None
        effects += [Effect(arm, seeds[i], n, *numbers, needed)]
    return effects


def _needed(matters: float, n: int, arms: int, at: dict, looks, level: float, prior) -> int:
    """The seeds_needed of an unresolved arm, after n; at: what `judge` found."""
    variance: Variance = "pooled" if at["times"] > 1 else "own"
    plan = {"arms": arms, "looks": looks, "level": level, "variance": variance}
    prior, needed = prior if at["moderated"] else None, 0
    while needed <= n:
        needed, matters = seeds_needed(matters, at["sd"], prior=prior, **plan), matters / 2
    return needed


def minimum_detectable(
    n: int,
    sd: float = 1.0,
    *,
    arms: int = 1,
    looks: Sequence[int] = LOOKS,
    level: float = 0.05,
    power: float = 0.8,
    variance: Variance = "pooled",
    prior: tuple[float, float] | None = None,
) -> float:
    """The effect, in the unit of sd (of a paired difference), that the look after n seeds sees with this power at the
    first step of Holm over `arms`, where all rows are equally noisy. Exact: from the noncentral t for an arm's own
    variance, by integration over the variances for a pooled one. An n after the last look is one more look, planned.

    Raises UserError: no-look, and those of `verdicts`."""
    looks = check_plan(looks, level, prior)
    if n > looks[-1]:
        looks += (n,)
    if n not in looks:
        raise UserError(f"{n} seeds are no look of {list(looks)}; expected one of them, or more", "no-look", n=n)
    pool, more = arms if variance == "pooled" else 1, prior[1] if prior else 0.0
    return _detectable(n, pool, more, nominal(level / arms, looks, degrees(looks, pool, prior)), power) * sd


def _detectable(n: int, pool: int, more: float, p: float, power: float) -> float:
    """In standard deviations, by two-sided tests of nominal level p; an error of sign does not count as seen. pool: the
    arms in the variance; more: degrees of freedom of a noise study, 0 for none."""
    own, rest = n - 1, (pool - 1) * (n - 1)
    cut = -stdtrit(own + rest + more, p / 2)
    if pool == 1:
        return float(nctdtrinc(own + more, 1 - power, cut)) / math.sqrt(n)
    x, weights = (np.polynomial.legendre.leggauss(24)[0] + 1) / 2, np.polynomial.legendre.leggauss(24)[1] / 2
    first, others, study = chdtri(own, x), chdtri(rest, x), chdtri(more, x) if more else np.zeros(1)
    sums = (own + rest) * np.maximum(first[:, None] / own, (first[:, None] + others) / (own + rest))
    scale = cut * np.sqrt((sums[..., None] + study) / (own + rest + more))
    chances = weights[:, None, None] * weights[:, None] * (weights if more else np.ones(1))
    low, high = 0.0, float(scale.max()) + 10
    for _ in range(50):  # P(normal > scale - high) falls to `power`
        middle = (low + high) / 2
        enough = (chances * ndtr(middle - scale)).sum() >= power
        low, high = (low, middle) if enough else (middle, high)
    return high / math.sqrt(n)


def seeds_needed(
    effect: float,
    sd: float = 1.0,
    *,
    arms: int = 1,
    looks: Sequence[int] = LOOKS,
    level: float = 0.05,
    power: float = 0.8,
    variance: Variance = "pooled",
    prior: tuple[float, float] | None = None,
) -> int:
    """The fewest seeds at which `minimum_detectable` is at most `effect`. More than the last look's are those of a
    study that plans them as a further look: what has been read at fewer looks has spent its error.

    effect: positive. Raises UserError: bad-effect, and those of `verdicts`."""
    looks = check_plan(looks, level, prior)
    if not 0 < effect < math.inf:
        raise UserError(f"an effect of {effect}; expected a positive number", "bad-effect", effect=effect)
    pool, more = arms if variance == "pooled" else 1, prior[1] if prior else 0.0
    p = nominal(level / arms, looks, degrees(looks, pool, prior))
    for n in looks:
        if _detectable(n, pool, more, p, power) * sd <= effect:
            return n
    needed, last = looks[-1], 0
    while needed != last:  # a further look lowers the level, a little more the further away it is
        last = needed
        needed = last + bisect_left(
            range(last, MOST_SEEDS), True, key=lambda m: _detectable(m, pool, more, p, power) * sd <= effect
        )
        plan = (*looks, needed)
        p = nominal(level / arms, plan, degrees(plan, pool, prior))
    return needed


def threshold(
    values: Sequence[float], *, above: float | None = None, below: float | None = None, level: float = 0.05
) -> Threshold:
    """One-sided t-test that the mean of two or more values is above, or below, a bar.

    Raises UserError: one-bar, few-values, no-noise, bad-level."""
    check_plan(LOOKS, level, None)
    if (above is None) == (below is None):
        raise UserError(f"above = {above}, below = {below}; expected one of the two", "one-bar")
    x = np.asarray(values, float)
    if len(x) < 2 or not np.isfinite(x).all():
        raise UserError(
            f"{len(x)} values, {np.isfinite(x).sum()} of them finite; expected two or more finite numbers",
            "few-values",
            n=len(x),
        )
    mean, sd, df = float(x.mean()), float(x.std(ddof=1)), len(x) - 1
    if sd <= 1e-12 * np.abs(x).max():
        raise UserError(
            f"all {len(x)} values are {x[0]}: no noise to judge by; expected values that differ", "no-noise"
        )
    error = sd / math.sqrt(len(x))
    t = (mean - above if below is None else below - mean) / error
    p, half = float(stdtr(df, -t)), float(-stdtrit(df, level)) * error
    return Threshold(len(x), mean, sd, t, df, p, mean - half, mean + half, p <= level)
