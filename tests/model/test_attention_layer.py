"""The parts of an attention layer against their formulas in float64: QK norms, softmax variants, gates."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from nanolab.model.config import GPTConfig

CONFIG = GPTConfig(
    sequence_len=24,
    vocab_size=50,
    n_layer=1,
    n_head=4,
    attention="gqa:2",
    n_embd=32,
    positions="nope",
    value_embeds=False,
    qk_gain=1.3,
)


def layer_by_formula(layer, x: np.ndarray, config: GPTConfig) -> np.ndarray:
    w = {n: p.detach().double().numpy() for n, p in layer.named_parameters()}
    H, G, D, T = 4, 2, 8, len(x)
    q, k, v = ((x @ w[f"c_{n}.weight"].T).reshape(T, -1, D) for n in "qkv")

    def layer_norm(z, gain):
        return gain * (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)

    def score(h, t, s):
        a, b = q[t, h], k[s, h // (H // G)]
        if config.qk_norm == "l2":
            return config.qk_gain**2 * w["qk_norm.g"][h] * a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        if config.qk_norm == "rms":
            a, b = a / np.sqrt((a * a).mean()), b / np.sqrt((b * b).mean())
        if config.qk_norm == "layernorm":
            a, b = layer_norm(a, w["qk_norm.q.weight"]), layer_norm(b, w["qk_norm.k.weight"])
        return config.qk_gain**2 * a @ b / math.sqrt(D)

    n = {"softmax": np.zeros(H), "softmax1": np.ones(H), "softmax_n": np.full(H, config.softmax_n)}
    extra = np.exp(w["core.normaliser.logit"]) if config.softmax == "sink" else n[config.softmax]
    y = np.zeros((T, H, D))
    for h in range(H):
        for t in range(T):
            p = np.exp([score(h, t, s) for s in range(t + 1)])
            y[t, h] = p / (extra[h] + p.sum()) @ v[: t + 1, h // (H // G)]
    if config.gate == "head":
        y = y / (1 + np.exp(-x @ w["gate.gate.weight"].T))[..., None]
    if config.gate == "elementwise":
        y = y / (1 + np.exp(-x @ w["gate.gate.weight"].T)).reshape(y.shape)
    return y.reshape(T, -1) @ w["c_proj.weight"].T


@pytest.mark.parametrize(
    "changes",
    [dict(qk_norm=name) for name in ("none", "rms", "layernorm", "l2")]
    + [
        dict(softmax="softmax1"),
        dict(softmax="softmax_n", softmax_n=0.3),
        dict(softmax="softmax_n", softmax_n=0.0),
        dict(softmax="sink"),
    ]
    + [dict(gate="head"), dict(gate="elementwise")],
    ids=str,
)
def test_layer_is_the_formula(make_gpt, changes):
    config, seen = dataclasses.replace(CONFIG, **changes), {}
    model = make_gpt(config, scale=0.3)
    layer = model.h[0].attn
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    model(torch.arange(17)[None] * 2)
    np.testing.assert_allclose(
        seen["y"][0].detach(), layer_by_formula(layer, seen["x"][0].detach().double().numpy(), config), atol=1e-5
    )


def test_l2_starts_at_the_log_of_the_pairs():
    """log2(L^2 - L), arXiv 2010.04245 section 3."""
    from nanolab.model.gpt import GPT

    model = GPT(dataclasses.replace(CONFIG, qk_norm="l2"))
    model.init_weights(0)
    assert model.h[0].attn.qk_norm.g.tolist() == pytest.approx([math.log2(24 * 24 - 24)] * 4)
