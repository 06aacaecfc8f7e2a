"""The model against its definition in float64, its initialisation, its cache path."""

import math
import random

import numpy as np
import pytest
import torch

from nanolab.inference.cache import KVCache
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT

PLAIN = GPTConfig(sequence_len=32, vocab_size=61, n_layer=3, n_head=2, n_embd=48)
SHARED = GPTConfig(sequence_len=32, vocab_size=64, n_layer=4, n_head=4, attention="gqa:2", n_embd=64)


def set_windows(model: GPT, sizes: list[int]) -> None:
    for block, size in zip(model.h, sizes):
        block.attn.core.window = size


def ids(config, B=2, T=19, seed=0):
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def definition(model: GPT, idx: list[int]) -> np.ndarray:
    """Logits (T, V) of one row, from the formulas and the weights, in float64, a token and a head at a time."""
    c, w = model.config, {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    T, D, n = len(idx), c.n_embd // c.n_head, c.n_layer
    eps = np.finfo(np.float32).eps

    def rms(x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def turn(x, t):  # complex numbers (x[i] + j x[i + D/2]) times e^(-j t theta_i)
        z = (x[: D // 2] + 1j * x[D // 2 :]) * np.exp(-1j * t * 100_000.0 ** (-np.arange(D // 2) * 2 / D))
        return np.concatenate((z.real, z.imag))

    e = rms(w["wte.weight"][idx])
    x = e.copy()
    for t in range(1, T):
        x[t] = e[t] + w["smear.scale"] * sigmoid(w["smear.gate.weight"] @ e[t, :24]) * e[t - 1]
    x0 = x
    for i in range(n):
        h = f"h.{i}."
        x = w["lambdas.resid"][i] * x + w["lambdas.x0"][i] * x0
        z = rms(x)
        q, k, v = (z @ w[f"{h}attn.c_{name}.weight"].T for name in "qkv")
        if i % 2 == (n - 1) % 2:
            gate = 3 * sigmoid(z[:, :12] @ w[f"{h}attn.value_mix.gate.weight"].T)
            v = v + np.repeat(gate, D, axis=1) * w[f"value_embeds.{i}.weight"][idx]
        y = np.zeros_like(q)
        for head in range(c.n_head):
            mine, shared = slice(head * D, head * D + D), head * c.n_kv_head // c.n_head
            theirs = slice(shared * D, shared * D + D)
            for t in range(T):
                seen = range(max(0, t - model.h[i].attn.core.window), t + 1)
                query = 1.2 * rms(turn(q[t, mine], t))
                p = np.exp([query @ (1.2 * rms(turn(k[s, theirs], s))) / math.sqrt(D) for s in seen])
                y[t, mine] = (p / p.sum()) @ v[seen, theirs]
        x = x + y @ w[f"{h}attn.c_proj.weight"].T
        x = x + np.maximum(rms(x) @ w[f"{h}mlp.c_fc.weight"].T, 0) ** 2 @ w[f"{h}mlp.c_proj.weight"].T
        if i == n // 2:
            middle = x
    x = rms(x - w["backout.scale"] * middle)
    return 15 * np.tanh(x @ w["lm_head.weight"][: c.vocab_size].T / 15)


@pytest.mark.parametrize(
    "config",
    [PLAIN, SHARED, GPTConfig(sequence_len=16, vocab_size=50, n_layer=1, n_head=3, attention="mqa", n_embd=36)],
)
def test_forward_is_the_definition(make_gpt, config):
    model = make_gpt(config)
    set_windows(model, [5, 1, 3, 16][: config.n_layer])
    idx = ids(config, B=2, T=13)
    logits = model(idx)
    assert logits.shape == (2, 13, config.vocab_size) and logits.dtype == torch.float32
    for row in range(2):
        want = definition(model, idx[row].tolist())
        assert want.std() > 0.1, "the comparison needs logits that differ"
        np.testing.assert_allclose(logits[row].detach(), want, atol=1e-5)


def test_loss_and_reductions(make_gpt):
    model, idx = make_gpt(PLAIN), ids(PLAIN)
    y = ids(PLAIN, seed=1)
    y[0, 3:7] = -1
    log_p = torch.from_numpy(np.stack([definition(model, row.tolist()) for row in idx])).log_softmax(-1)
    want = -log_p.gather(-1, y.clamp(min=0)[..., None])[..., 0].masked_fill(y < 0, 0)
    for grad in (True, False):  # each has a path of its own
        with torch.set_grad_enabled(grad):
            none, total, mean = (model(idx, y, reduction=r) for r in ("none", "sum", "mean"))
        torch.testing.assert_close(none.double(), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(total.double(), want.sum(), atol=1e-4, rtol=0)
        torch.testing.assert_close(mean.double(), want.sum() / (y >= 0).sum(), atol=1e-5, rtol=0)
        assert {none.dtype, total.dtype, mean.dtype} == {torch.float32}


def test_single_token_and_last_only(make_gpt):
    model, idx = make_gpt(PLAIN), ids(PLAIN)
    np.testing.assert_allclose(model(idx[:1, :1])[0].detach(), definition(model, [idx[0, 0].item()]), atol=1e-5)
    torch.testing.assert_close(model(idx, last_only=True), model(idx)[:, -1:])


def test_backward_equals_finite_differences(make_gpt):
    """The gradient along a random direction of all weights, against the slope of the float64 definition's loss."""
    model, row, step = make_gpt(PLAIN), ids(PLAIN, B=1, T=9), 1e-4
    y = ids(PLAIN, B=1, T=9, seed=1)

    def loss(m):
        log_p = torch.from_numpy(definition(m, row[0].tolist())).log_softmax(-1)
        return -log_p.gather(-1, y[0, :, None]).sum().item()

    model(row, y, reduction="sum").backward()
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        direction = {n: torch.randn(p.shape, generator=g, dtype=torch.float64) for n, p in model.named_parameters()}
        slope = sum((p.grad.double() * direction[n]).sum() for n, p in model.named_parameters()).item()
        ends = []
        for sign in (1, -1):
            moved = GPT(PLAIN).double()
            moved.load_state_dict({n: p.double() + sign * step * direction[n] for n, p in model.state_dict().items()})
            ends.append(loss(moved))
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3)


def test_init_moments():
    """Mean, deviation, kurtosis (the shape) and bounds of every parameter; a sample's lie within five standard
    errors.
    """
    config = GPTConfig(sequence_len=32, vocab_size=512, n_layer=4, n_head=2, n_embd=128)
    model = GPT(config)
    model.init_weights(seed=3)
    w = dict(model.named_parameters())
    s = math.sqrt(3 / 128)

    def uniform(lo, hi):
        return (lo + hi) / 2, (hi - lo) / math.sqrt(12), 1.8, lo, hi

    def normal(std):
        return 0.0, std, 3.0, -6 * std, 6 * std

    wanted = {"wte.weight": normal(0.8), "lm_head.weight": normal(0.001), "smear.gate.weight": uniform(0, 0.02)}
    wanted |= {f"value_embeds.{i}.weight": uniform(-s, s) for i in (1, 3)}
    wanted |= {f"h.{i}.attn.{name}.weight": uniform(-s, s) for i in range(4) for name in ("c_q", "c_k", "c_v")}
    wanted |= {f"h.{i}.mlp.c_fc.weight": uniform(-0.4 * s, 0.4 * s) for i in range(4)}
    wanted |= {f"h.{i}.attn.value_mix.gate.weight": uniform(0, 0.02) for i in (1, 3)}
    for name, (mean, std, kurtosis, lo, hi) in wanted.items():
        p = w.pop(name).data
        n = math.sqrt(p.numel())
        assert abs(p.mean() - mean) < 5 * std / n, name
        assert abs(p.std() / std - 1) < 5 / n, name
        assert abs((((p - mean) / std) ** 4).mean() - kurtosis) < 5 * math.sqrt(24) / n, name
        assert lo <= p.min() and p.max() <= hi, name
    fixed = {"smear.scale": [0.0], "backout.scale": [0.2]}
    fixed |= {"lambdas.resid": [1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05], "lambdas.x0": [0.20, 0.15, 0.10, 0.05]}
    for name, values in fixed.items():
        torch.testing.assert_close(w.pop(name).data, torch.tensor(values))
    assert set(w) == {f"h.{i}.{name}.weight" for i in range(4) for name in ("attn.c_proj", "mlp.c_proj")}
    assert all((p == 0).all() for p in w.values())


def test_seed_decides_the_weights():
    def weights(seed):
        model = GPT(PLAIN)
        model.init_weights(seed)
        return torch.cat([p.flatten() for p in model.parameters()])

    torch.manual_seed(0)
    first = weights(1)
    torch.manual_seed(99)
    assert torch.equal(first, weights(1)), "the global generator had a say"
    assert not torch.equal(first, weights(2))


def cached_logits(model, idx, sizes):
    """Logits of `idx` fed in chunks of these sizes."""
    cache, out, start = KVCache(model.config, idx.size(0), capacity=4, limit=64), [], 0
    for size in sizes:
        out.append(model(idx[:, start : start + size], cache=cache))
        start += size
    assert cache.pos.tolist() == [start] * idx.size(0)
    return torch.cat(out, 1)


@torch.no_grad()
@pytest.mark.parametrize("config", [PLAIN, SHARED])
def test_chunked_prefill_and_decode_equal_the_full_forward(make_gpt, config):
    """The smear reaches across a chunk's border, windows count from absolute positions."""
    model, idx, rng = make_gpt(config), ids(config, T=23), random.Random(0)
    set_windows(model, [4, 1, 7, 30][: config.n_layer])
    full = model(idx)
    chunkings = [[23], [1] * 23, [22, 1], [1, 22], [12, 1, 1, 9]]
    for _ in range(6):
        sizes = []
        while sum(sizes) < 23:
            sizes.append(min(rng.randint(1, 9), 23 - sum(sizes)))
        chunkings.append(sizes)
    for sizes in chunkings:
        torch.testing.assert_close(
            cached_logits(model, idx, sizes), full, atol=2e-5, rtol=0, msg=lambda m: f"chunks {sizes}: {m}"
        )


@torch.no_grad()
def test_rows_of_unequal_length_decode_as_if_alone(make_gpt):
    """Row 0 has read 3 tokens and row 1 has read 11 when they are put into one cache and go on together."""
    model, idx = make_gpt(SHARED), ids(SHARED, T=20)
    set_windows(model, [4, 1, 7, 30])
    joint = KVCache(SHARED, 2)
    for row, length in enumerate((3, 11)):
        alone = KVCache(SHARED, 1)
        model(idx[row : row + 1, :length], cache=alone)
        joint.put([row], alone, [0])
    for step in range(6):
        new = torch.stack([idx[0, 3 + step], idx[1, 11 + step]])[:, None]
        got = model(new, cache=joint)
        for row, length in enumerate((3, 11)):
            want = model(idx[row : row + 1, : length + step + 1], last_only=True)
            torch.testing.assert_close(got[row : row + 1], want, atol=2e-5, rtol=0)


def test_training_after_an_evaluation_in_inference_mode(make_gpt):
    """Nothing that a forward pass keeps (masks, angles) may be an inference tensor."""
    model, idx = make_gpt(PLAIN, kernel="banded"), ids(PLAIN)
    with torch.inference_mode():
        model(idx, idx)
    model(idx, idx).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bf16_follows_fp32(make_gpt):
    """Master weights stay fp32; logits move by a few roundings of 2^-8, gradients by a few percent."""
    exact, rough, idx = make_gpt(SHARED), make_gpt(SHARED, compute_dtype=torch.bfloat16), ids(SHARED)
    a, b = exact(idx), rough(idx)
    assert b.dtype == torch.float32 and all(p.dtype == torch.float32 for p in rough.parameters())
    assert 0 < (a - b).std() < 5 * 2.0**-8 * a.std()
    exact(idx, idx).backward()
    rough(idx, idx).backward()
    for (name, p), q in zip(exact.named_parameters(), rough.parameters()):
        assert q.grad.dtype == torch.float32
        if p.numel() > 1000:
            assert (p.grad - q.grad).norm() < 0.05 * p.grad.norm(), name


@torch.no_grad()
def test_a_full_layer_sees_rows_longer_than_those_trained_on(make_gpt):
    model, idx = (
        make_gpt(GPTConfig(sequence_len=8, vocab_size=61, n_layer=1, n_head=2, n_embd=32)),
        ids(PLAIN, B=1, T=20),
    )
    before, idx[0, 0] = model(idx), (idx[0, 0] + 1) % 61
    assert (before[0, -1] != model(idx)[0, -1]).any()
