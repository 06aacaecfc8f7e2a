"""t-tests repeated as seeds come in: the level that each look may use, so that all looks together keep the level asked.
Imports no torch.

Looks after n_1 < ... < n_J paired seeds test one mean, with df_1 < ... < df_J degrees of freedom. While the mean is 0,
the direction of normal data is independent of its length, so that U_j = T_j / sqrt(df_j + T_j^2) is a Markov chain:
with m = n_{j+1} - n_j new seeds, that bring M = df_{j+1} - df_j new dimensions to N = df_j + 1,

    U_{j+1} = sqrt(n_j / n_{j+1}) U_j x + sqrt(m / n_{j+1}) s

    density of (x, s) on the half disc x >= 0: x^(N - 1) (1 - x^2 - s^2)^((M - 3) / 2)

Linear in (x, s), so that one integral across its direction gives the kernel. One more per look, from the last look back
to the first, gives the probability that no look crosses its boundary: for t-tests what Armitage, McPherson & Rowe, JRSS
A 132 (1969), 235, did for known variance. All looks share one nominal level (Pocock, Biometrika 64 (1977), 191)."""

from functools import lru_cache

import numpy as np
from numpy.polynomial import chebyshev, legendre
from scipy.special import beta, stdtrit

LEAST, MOST = 1e-4, 0.5  # of the nominal levels in the table; below, levels of all looks together are in proportion
INNER = legendre.leggauss(24)  # nodes on [-1, 1] and weights


def _between(low, high, x: np.ndarray) -> np.ndarray:
    """x, in [-1, 1], moved to [low, high]; shape (*low.shape, *x.shape)."""
    return np.asarray((low + high) / 2)[..., None] + np.multiply.outer((high - low) / 2, x)


def _kernel(along: np.ndarray, across: np.ndarray, N: float, M: float) -> np.ndarray:
    """The integral over chi of cos(chi)^(M - 2) x^(N - 1), x = along + across sin(chi) > 0; if M = 1, at both ends."""
    if M == 1:
        return np.maximum(0, along + across) ** (N - 1) + np.maximum(0, along - across) ** (N - 1)
    a, b, c = across * (M + N - 3), (M - 2) * along, (N - 1) * across  # the peak: a sin^2 + b sin = c
    peak = np.arcsin(((np.sqrt(b * b + 4 * a * c) - b) / (2 * a)).clip(-1, 1))
    bend = (M - 2) / np.maximum(1e-12, np.cos(peak) ** 2)
    bend += (N - 1) * across * (along * np.sin(peak) + across) / np.maximum(1e-12, (along + across * np.sin(peak)) ** 2)
    reach = 8 / np.sqrt(np.maximum(1, bend))
    low = np.maximum(np.arcsin((-along / across).clip(-1, 1)), peak - reach)
    high = np.minimum(np.pi / 2, peak + reach)
    chi = _between(low, high, INNER[0])
    x = np.maximum(0, along[..., None] + across[..., None] * np.sin(chi))
    return (np.cos(chi) ** (M - 2) * x ** (N - 1)) @ INNER[1] * (high - low) / 2


def _stay(at, n: int, m: int, N: float, M: float, low, high, later, nodes) -> np.ndarray:
    """P(no later look crosses | U_j = sin(at)), shape (P, I) as at. low, high: the next look's boundaries as angles,
    (P,); later: Chebyshev coefficients of the same function of the next look's angle, (degree + 1, P); nodes: nodes and
    weights of the integral over it."""
    along, across = np.sqrt(n / (n + m)) * np.sin(at), np.sqrt(m / (n + m))
    size, turn = np.hypot(along, across), np.arctan2(along, across)
    centre = np.arcsin(np.sin(turn) * np.sqrt(N / (N + M)))
    reach = 9 / np.sqrt(N + M) / np.cos(centre)  # beyond it the density is nothing
    start, stop = (np.arcsin((np.sin(edge)[:, None] / size).clip(-1, 1)) for edge in (low, high))
    start = np.maximum(start, centre - reach)
    stop = np.maximum(start, np.minimum(stop, centre + reach))
    w = _between(start, stop, nodes[0])
    density = np.cos(w) ** (M - 1) * _kernel(
        np.sin(w) * np.sin(turn)[..., None], np.cos(w) * np.cos(turn)[..., None], N, M
    )
    low, high, value = low[:, None, None], high[:, None, None], np.arcsin(size[..., None] * np.sin(w))
    kept = chebyshev.chebval((2 * value - low - high) / (high - low), later[:, :, None, None], tensor=False)
    total = beta(0.5, N / 2) if M == 1 else beta(N / 2, M / 2) * beta(0.5, (M - 1) / 2) / 2
    return (density * kept) @ nodes[1] * (stop - start) / 2 / total


def crossing(p, looks: tuple[int, ...], dfs: tuple[float, ...], sides: int = 2) -> np.ndarray:
    """P(the t-test of one look or more has a p-value of at most p) while the mean is 0, for each p; shape (P,).

    looks: seeds at each look; dfs: degrees of freedom, rising by 1 or more. Relative errors for p
    above .001: 1 % where they rise by 1, .5 % by 2, .001 % by 4 or more."""
    p = np.asarray(p, float)
    if len(looks) == 1:
        return p
    highs = [np.arctan(-stdtrit(df, p / sides) / np.sqrt(df)) for df in dfs]
    lows = [-high if sides == 2 else np.full_like(high, -np.pi / 2) for high in highs]
    size = 32 if min(np.diff(dfs)) >= 2 else 128  # one new dimension leaves sharp edges in the kernel
    points, nodes, later = chebyshev.chebpts1(size), legendre.leggauss(size), np.ones((1, len(p)))
    for j in range(len(looks) - 2, -1, -1):
        at = _between(lows[j], highs[j], points if j else nodes[0])
        m, M = looks[j + 1] - looks[j], dfs[j + 1] - dfs[j]
        stay = _stay(at, looks[j], m, dfs[j] + 1, M, lows[j + 1], highs[j + 1], later, nodes)
        later = chebyshev.chebfit(points, stay.T, size - 1) if j else stay
    weights = nodes[1] * np.cos(at) ** (dfs[0] - 1)
    return 1 - (weights * later).sum(1) / weights.sum(1) * (1 - p)


@lru_cache(maxsize=256)
def _table(looks: tuple[int, ...], dfs: tuple[float, ...], sides: int) -> tuple[np.ndarray, np.ndarray]:
    """(logs of nominal levels, logs of the levels of all looks together), both rising."""
    points, fine = chebyshev.chebpts1(12), np.linspace(-1, 1, 2001)
    at, log = (_between(np.log(LEAST), np.log(MOST), x) for x in (points, fine))
    fit = chebyshev.chebfit(points, np.log(crossing(np.exp(at), looks, dfs, sides)) - at, 11)
    return np.append(log, 0.0), np.append(log + chebyshev.chebval(fine, fit), 0.0)


def overall(p, looks: tuple[int, ...], dfs: tuple[float, ...], sides: int = 2) -> np.ndarray:
    """The level of all looks together at which each nominal p-value p is just significant, of p's shape."""
    nominal, together = _table(looks, dfs, sides)
    log = np.log(np.maximum(p, 1e-300))
    return np.exp(np.interp(log, nominal, together) + np.minimum(0, log - nominal[0]))


def nominal(level: float, looks: tuple[int, ...], dfs: tuple[float, ...], sides: int = 2) -> float:
    """The p-value that each look may use, so that all looks together have this level. The inverse of `overall`."""
    at_look, together = _table(looks, dfs, sides)
    log = np.log(level)
    return float(np.exp(np.interp(log, together, at_look) + np.minimum(0, log - together[0])))
