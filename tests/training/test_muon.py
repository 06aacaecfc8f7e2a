"""Muon's arithmetic: the coefficient table, the orthogonalisation and one whole update, each against another
derivation.
"""

import numpy as np
import pytest
import torch

from nanolab.training.muon import POLAR_EXPRESS, muon_update_, orthogonalise, polar_express


def minimax_quintic(low: float, high: float) -> np.ndarray:
    """(a, b, c) of the odd quintic closest to 1 on [low, high], by Remez exchange.

    The best one touches 1 - e and 1 + e in turn at four points: low, its two inner extrema, high.
    """
    inner = [low + (high - low) / 4, high - (high - low) / 4]
    for _ in range(100):
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        squares = np.sort(np.roots([5 * c, 3 * b, a]).real)  # of the derivative, in x^2
        if np.allclose(np.sqrt(squares), inner, rtol=1e-14, atol=0):
            break
        inner = list(np.sqrt(squares))
    return np.array([a, b, c])


def test_the_table_is_the_polar_express_of_the_paper():
    low, high, powers = 1e-3, 1.0, np.array([1, 3, 5])
    for step, row in enumerate(POLAR_EXPRESS):
        cushion = 0.02 * high
        poly = minimax_quintic(max(low, cushion), high)
        if low < cushion:  # centre on 1 what [low, high] is really mapped to
            poly *= 2 / (poly @ low**powers + poly @ high**powers)
        if step < len(POLAR_EXPRESS) - 1:
            poly /= 1.02**powers
        np.testing.assert_allclose(row, poly, rtol=1e-9)
        low = poly @ low**powers
        high = 2 - low
    np.testing.assert_allclose(POLAR_EXPRESS[0], (8.16, -22.48, 15.88), atol=5e-3)  # as published for these settings


def quintics(sigma: np.ndarray) -> np.ndarray:
    for a, b, c in POLAR_EXPRESS:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


@pytest.mark.parametrize("m,n", [(24, 24), (16, 64)])
def test_polar_express_changes_singular_values_only(m, n):
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.standard_normal((m, n)), full_matrices=False)
    sigma = np.geomspace(1e-3, 1, m)
    out = polar_express(torch.tensor((u * sigma) @ vt, dtype=torch.float32)[None])[0].double().numpy()
    # fp32 rounding of the smallest, grown 860-fold
    np.testing.assert_allclose(out, (u * quintics(sigma)) @ vt, atol=1e-4)
    found = np.linalg.svd(out, compute_uv=False)
    assert 0.858 < found.min() and found.max() < 1.142


@pytest.mark.parametrize("dtype,slack", [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (2, 16, 64), (1, 1, 7)])
def test_orthogonalised_gradients_have_singular_values_near_one(shape, dtype, slack):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    x = orthogonalise(g, 5, dtype)
    assert x.dtype == dtype
    sigma = torch.linalg.svdvals(x.double())
    assert sigma.min() > 0.8589 - slack and sigma.max() < 1.1411 + slack


def reference_update(p, g, momentum, second, lr, mu, beta2, weight_decay):
    """One matrix, float64, the recipe step by step as the papers give it. Returns (p, momentum, second)."""
    m, n = p.shape
    momentum = mu * momentum + (1 - mu) * g
    x = (1 - mu) * g + mu * momentum
    norms = np.linalg.norm(x, axis=1)
    for i in range(m):
        x[i] *= np.linalg.norm(norms) / np.sqrt(m) / max(norms[i], 1e-6)
    x = x / (1.01 * np.linalg.norm(x) + 1e-6)
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    x = (u * quintics(sigma)) @ vt
    x *= np.sqrt(min(m, n)) / np.linalg.norm(x)
    axis = 1 if m >= n else 0
    second = beta2 * second + (1 - beta2) * (x**2).mean(axis=axis, keepdims=True)
    y = x / np.sqrt(np.maximum(second, 1e-10))
    y *= np.linalg.norm(x) / np.linalg.norm(y)
    decay = np.where(y * p >= 0, weight_decay * p, 0.0)
    return p - lr * (y + decay), momentum, second


@pytest.mark.parametrize("m,n", [(12, 12), (24, 8), (8, 24), (2, 12)])
def test_three_updates_equal_the_recipe_in_float64(m, n):
    rng = np.random.default_rng(2)
    k, lr, beta2 = 3, 0.02, 0.9
    p = rng.standard_normal((k, m, n))
    momentum, second = np.zeros((k, m, n)), np.zeros((k, m, 1) if m >= n else (k, 1, n))
    tp, tm, ts = (torch.tensor(x, dtype=torch.float32) for x in (p, momentum, second))
    for mu, weight_decay in ((0.85, 0.5), (0.9, 0.1), (0.95, 0.0)):
        g = rng.standard_normal((k, m, n)) * 1e-3
        tg = torch.tensor(g, dtype=torch.float32)
        before = tg.clone()
        muon_update_(tp, tg, tm, ts, lr=lr, mu=mu, beta2=beta2, weight_decay=weight_decay, steps=5, dtype=torch.float32)
        assert torch.equal(tg, before)
        for i in range(k):
            p[i], momentum[i], second[i] = reference_update(
                p[i], g[i], momentum[i], second[i], lr, mu, beta2, weight_decay
            )
        # fp32 through an iteration that grows small directions up to 990-fold: 1e-7 becomes 1e-4 of an update of size
        # lr
        np.testing.assert_allclose(tp.numpy(), p, atol=2e-4 * lr + 1e-6)
        np.testing.assert_allclose(tm.numpy(), momentum, atol=1e-9)
        np.testing.assert_allclose(ts.numpy(), second, rtol=2e-3)


def test_an_update_has_the_length_that_the_learning_rate_says():
    for m, n in ((32, 8), (8, 32), (16, 16)):
        p = torch.zeros(1, m, n)
        g = torch.randn(1, m, n, generator=torch.Generator().manual_seed(3)) * 1e-2
        second = torch.rand(1, m, 1) if m >= n else torch.rand(1, 1, n)
        muon_update_(
            p, g, torch.zeros_like(p), second, lr=0.5, mu=0.9, beta2=0.9, weight_decay=0.0, steps=5, dtype=torch.float32
        )
        assert p.norm().item() == pytest.approx(0.5 * min(m, n) ** 0.5, rel=1e-5)


def test_a_zero_gradient_moves_nothing_and_stays_finite():
    """At the first step the projections behind zero-initialised ones get exactly zero gradients."""
    p = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(4))
    before, second = p.clone(), torch.zeros(2, 8, 1)
    muon_update_(
        p,
        torch.zeros_like(p),
        torch.zeros_like(p),
        second,
        lr=0.1,
        mu=0.9,
        beta2=0.9,
        weight_decay=0.0,
        steps=5,
        dtype=torch.bfloat16,
    )
    assert torch.equal(p, before) and torch.equal(second, torch.zeros(2, 8, 1))


def test_decay_acts_only_where_it_pulls_with_the_update():
    g = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(5))
    p = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(6))
    results = []
    for weight_decay in (0.0, 0.3):
        q, zeros = p.clone(), torch.zeros_like(p)
        muon_update_(
            q,
            g,
            zeros,
            torch.zeros(1, 6, 1),
            lr=0.1,
            mu=0.0,
            beta2=0.9,
            weight_decay=weight_decay,
            steps=5,
            dtype=torch.float32,
        )
        results.append(q)
    plain, decayed = results
    with_it = (p - plain) * p >= 0
    torch.testing.assert_close(decayed[with_it], (plain - 0.1 * 0.3 * p)[with_it])
    assert torch.equal(decayed[~with_it], plain[~with_it]) and 5 < with_it.sum() < 31
