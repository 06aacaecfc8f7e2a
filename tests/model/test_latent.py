"""Latent attention against its formulas in float64, its two ways of decoding, and what its cache holds."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from nanolab.cli import UserError
from nanolab.inference.cache import KVCache
from nanolab.model import accounting
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.model.variants.latent import rotary_width

CONFIG = GPTConfig(
    sequence_len=32,
    vocab_size=50,
    n_layer=3,
    n_head=2,
    n_embd=64,
    attention="mla",
    value_embeds=False,
    mla_kv_rank=40,
    mla_q_rank=48,
    mla_rope_dim=10,
)
VARIANTS = {
    "rope": {},
    "no positions": dict(positions="nope"),
    "softmax1, windows, biases": dict(softmax="softmax1", window_size=5, bias="qkv,out"),
    "sinks, mixed layers, gates": dict(softmax="sink", positions="rnope", gate="head", qk_norm="layernorm"),
    "no room to absorb": dict(mla_kv_rank=8, qk_norm="none"),
}


def layer_by_formula(layer, x: np.ndarray, config: GPTConfig) -> np.ndarray:
    """DeepSeek-V2, arXiv 2405.04434, equations 9 to 19: a token and a head at a time."""
    w = {n: p.detach().double().numpy() for n, p in layer.named_parameters()}
    H, D, R, T = 2, 32, 10, len(x)

    def rms(z):
        return z / np.sqrt((z * z).mean(-1, keepdims=True) + np.finfo(np.float32).eps)

    def turn(z, t):
        z = (z[: R // 2] + 1j * z[R // 2 :]) * np.exp(-1j * t * 100_000.0 ** (-np.arange(R // 2) * 2 / R))
        return np.concatenate((z.real, z.imag))

    c_q, c_kv = rms(x @ w["c_dq.weight"].T), rms(x @ w["c_dkv.weight"].T)
    out = np.zeros((T, H * D))
    for h in range(H):
        mine, rotary = slice(h * D, h * D + D), slice(h * R, h * R + R)
        k_content, v = c_kv @ w["c_uk.weight"][mine].T, c_kv @ w["c_uv.weight"][mine].T
        for t in range(T):
            q = np.concatenate((c_q[t] @ w["c_uq.weight"][mine].T, turn(c_q[t] @ w["rotary.c_q.weight"][rotary].T, t)))
            scores = [
                1.44 * q @ np.concatenate((k_content[s], turn(w["rotary.c_k.weight"] @ x[s], s))) / math.sqrt(D + R)
                for s in range(t + 1)
            ]
            p = np.exp(scores)
            out[t, mine] = (p / p.sum()) @ v[: t + 1]
    return out @ w["c_proj.weight"].T


def test_layer_is_the_formula(make_gpt):
    model = make_gpt(CONFIG)
    seen = {}
    layer = model.h[1].attn
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    model(torch.arange(11)[None] * 4)
    np.testing.assert_allclose(
        seen["y"][0].detach(), layer_by_formula(layer, seen["x"][0].detach().double().numpy(), CONFIG), atol=2e-6
    )


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_naive_and_absorbed_decode_agree_with_the_full_forward(make_gpt, changes):
    config = dataclasses.replace(CONFIG, **changes)
    model, idx = make_gpt(config, scale=0.2), torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))
    full = model(idx)
    for absorb_up_to in (0, math.inf):
        for block in model.h:
            block.attn.absorb_up_to = absorb_up_to
        cache = KVCache(config, 2)
        got = torch.cat([model(chunk, cache=cache) for chunk in idx.split([9, 4, 1, 1, 5], dim=1)], 1)
        torch.testing.assert_close(got, full, atol=3e-5, rtol=0)


def test_cache_holds_latent_and_rotary_key_only():
    cache = KVCache(CONFIG, rows=3, capacity=7)
    assert {tuple(t.shape) for t in cache.k} == {(3, 7, 1, 10)} and {tuple(t.shape) for t in cache.v} == {(3, 7, 1, 40)}


@pytest.mark.parametrize("shape", [(12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600)])
def test_cache_is_under_a_fifth_of_mha_at_gpt2_sizes(shape):
    n_layer, n_head, n_embd = shape
    mha = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, value_embeds=False)
    mla = dataclasses.replace(mha, attention="mla")
    assert accounting.kv_bytes_per_token(mla, 2) < accounting.kv_bytes_per_token(mha, 2) / 5


def test_default_widths():
    """d_c = 4 d_h and d_R = d_h / 2, as in DeepSeek-V2; queries get three times the rank, up to the model's width."""
    c = GPTConfig(n_layer=1, n_head=12, n_embd=768, attention="mla", value_embeds=False)
    model = GPT(c)
    shapes = {name: tuple(p.shape) for name, p in model.h[0].attn.named_parameters()}
    assert (shapes["c_dkv.weight"], shapes["rotary.c_k.weight"], shapes["c_dq.weight"]) == (
        (256, 768),
        (32, 768),
        (768, 768),
    )
    assert rotary_width(dataclasses.replace(c, positions="nope"), 0) == 0


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        (dict(value_embeds=True), ("--attention mla", "--no-value-embeds")),
        (dict(qk_norm="l2"), ("--attention mla", "--qk-norm l2")),
        (dict(mla_rope_dim=7), ("--mla-rope-dim",)),
    ],
)
def test_what_cannot_work_names_both_flags(changes, flags):
    with pytest.raises(UserError) as error:
        GPT(dataclasses.replace(CONFIG, **changes))
    assert all(flag in str(error.value) for flag in flags)
