"""Counts against models that are built and measured. (Parameters and training FLOPs: also tests/contracts.)"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanolab.inference.cache import KVCache
from nanolab.model import accounting
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT

CONFIG = GPTConfig(sequence_len=48, vocab_size=100, n_layer=3, n_head=4, attention="gqa:2", n_embd=64)


def flops_of(model, idx):
    with FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    return counter.get_total_flops()


def test_parameters_by_group(make_gpt):
    model = make_gpt(CONFIG)
    measured = {}
    for name, p in model.named_parameters():
        head = name.split(".")[0]
        group = {"wte": "wte", "value_embeds": "tables", "lm_head": "lm_head", "h": "matrices"}.get(head, "scalars")
        measured[group] = measured.get(group, 0) + p.numel()
    measured["total"] = sum(measured.values())
    measured["scaling"] = measured["matrices"] + measured["lm_head"]
    assert accounting.n_params(CONFIG) == measured | {"wpe": 0, "vectors": 0}
    assert accounting.padded_vocab(CONFIG) == 128 == model.wte.weight.size(0)


@pytest.mark.parametrize("T", [1, 127, 128, 129, 512, 513, 2048, 2049])
def test_windows(T):
    """S is the smallest multiple of 128 that is at least a quarter of the row; the last layer is L."""
    c = GPTConfig(sequence_len=T, n_layer=6, window_pattern="SSL")
    S = next(128 * n for n in range(1, 100) if 128 * n >= T / 4)
    assert accounting.windows(c) == [S, S, T, S, S, T]
    assert accounting.windows(GPTConfig(sequence_len=T, n_layer=1, window_pattern="S")) == [T]


def test_nominal_flops_bracket_what_kernels_do():
    """The eager kernel multiplies the whole T x T square, also where the window forbids most of it; the banded one only
    blocks that reach into the band. The nominal count (min(window, T) keys for every query) lies between."""
    config = GPTConfig(sequence_len=1024, vocab_size=64, n_layer=2, n_head=1, n_embd=32)
    idx, measured = torch.zeros(1, 1024, dtype=torch.int64), {}
    for name in ("eager", "banded"):
        model = GPT(config, kernel=name)
        model.init_weights(0)
        measured[name] = flops_of(model, idx) / 1024
    assert measured["banded"] < accounting.train_flops_per_token(config) < measured["eager"]
    square = GPTConfig(**{**vars(config), "window_pattern": "L"})
    assert measured["eager"] == accounting.train_flops_per_token(square)


@torch.no_grad()
def test_decode_flops(make_gpt):
    """One token over a cache: `context` counts the keys attended, the new token's own among them."""
    model, idx = make_gpt(CONFIG), torch.zeros(1, 30, dtype=torch.int64)
    cache = KVCache(CONFIG)
    model(idx, cache=cache)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(idx[:, :1], cache=cache)
    assert counter.get_total_flops() == accounting.decode_flops_per_token(CONFIG, 31)
    c = GPTConfig(sequence_len=2048, n_layer=4, window_pattern="SSSL")
    far, near = (accounting.decode_flops_per_token(c, n) for n in (2000, 512))
    assert far - near == 4 * c.n_embd * (2000 - 512), "beyond the short window only the long layer grows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes(dtype):
    cache = KVCache(CONFIG, rows=2, capacity=10, dtype=dtype)
    stored = sum(t.numel() * t.element_size() for t in cache.k + cache.v)
    assert accounting.kv_bytes_per_token(CONFIG, dtype.itemsize) == stored / 20
