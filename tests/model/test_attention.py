"""Every kernel against attention written out in float64, one query at a time."""

import functools
import math

import pytest
import torch

from nanolab.config import GPTConfig, UserError
from nanolab.model import attention
from nanolab.model.attention import KERNELS, cached
from nanolab.model.gpt import GPT

SHAPES = {"heads 2": (2, 2, 2, 8), "shared 4 to 2": (1, 4, 2, 6), "one shared": (2, 3, 1, 4)}  # B, H, G, D


def definition(q, k, v, window):
    """(B, T, H, D) fp64, from (B, T, H, D) and (B, T, G, D) of any dtype: each query weighs itself and `window` keys before it."""
    T, H, D = q.shape[1:]
    shared = [h * k.size(2) // H for h in range(H)]  # the key/value head of each query head
    q, k, v = q.double(), k.double()[:, :, shared], v.double()[:, :, shared]
    rows = []
    for t in range(T):
        seen = slice(max(0, t - window), t + 1)
        scores = torch.exp(torch.einsum("bhd,bshd->bhs", q[:, t], k[:, seen]) / math.sqrt(D))
        rows.append(torch.einsum("bhs,bshd->bhd", scores / scores.sum(-1, keepdim=True), v[:, seen]))
    return torch.stack(rows, 1)


def random_qkv(shape, T, dtype=torch.float32, seed=0):
    B, H, G, D = shape
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, n, D, generator=g).to(dtype).requires_grad_() for n in (H, G, G)]


@functools.lru_cache(maxsize=None)
def expected(shape, T, window):
    """(q, k, v), output, upstream gradient, gradients of q, k, v: worked out once for all kernels."""
    inputs = random_qkv(shape, T, seed=T * 1000 + window)
    y = definition(*inputs, window)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return inputs, y.detach(), upstream, torch.autograd.grad(y, inputs, upstream)


def check(kernel, shape, T, window):
    """Output and the three gradients agree with the definition. fp32 sums of at most a few hundred terms of order 1."""
    inputs, want, upstream, grads = expected(shape, T, window)
    y = kernel(*inputs, window)
    assert y.shape == want.shape and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, atol=2e-5, rtol=0)
    for name, a, b in zip("qkv", torch.autograd.grad(y, inputs, upstream.float()), grads):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5, msg=lambda m: f"gradient of {name}, window {window}, T {T}: {m}")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("name", KERNELS)
def test_every_window_of_a_short_row(name, T, shape):
    for window in range(T + 6):
        check(KERNELS[name], shape, T, window)


@pytest.mark.parametrize("name", KERNELS)
def test_every_window_across_blocks(name, monkeypatch):
    """The same with blocks of 4 rows, so that every case of a band (first, middle, cut, short last block) is met."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    for window in range(11):
        check(KERNELS[name], (1, 2, 1, 4), 10, window)


@pytest.mark.parametrize("T,window", [(127, 127), (128, 64), (129, 1), (129, 128), (270, 100), (270, 128), (270, 300)])
@pytest.mark.parametrize("name", KERNELS)
def test_rows_longer_than_a_block(name, T, window):
    check(KERNELS[name], (1, 2, 1, 4), T, window)


@pytest.mark.parametrize("name", KERNELS)
def test_bf16_is_within_its_rounding(name):
    """With u = 2^-8, bf16's unit roundoff: a kernel may round scores (an error of u |s| each, hence a factor
    exp(2 u max|s|) on a probability), probabilities and the output (u each, sums of them in fp32)."""
    T, window, u = 150, 40, 2.0**-8
    q, k, v = random_qkv((2, 2, 1, 16), T, torch.bfloat16)
    want = definition(q, k, v, window)
    y = KERNELS[name](q, k, v, window)
    assert y.dtype == torch.bfloat16
    score = torch.einsum("bthd,bsgd->btshg", q.double(), k.double()).abs().max().item() / math.sqrt(16)
    bound = (math.exp(2 * u * score) - 1 + 4 * u) * v.abs().max().item()
    error = (y.double() - want).abs()
    assert error.max() < bound
    assert error.mean() < 2 * u, "most elements are of order 0.2 and carry a few roundings of their own size"
    upstream = torch.ones_like(y)
    for a, b in zip(torch.autograd.grad(y, (q, k, v), upstream), torch.autograd.grad(want, (q, k, v), upstream.double())):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 8 * u * b.double().norm()


@pytest.mark.parametrize("window", [1, 3, 100])
def test_new_queries_over_a_cache_of_uneven_rows(window):
    """Row 0 holds 2 tokens, row 1 holds 6; three more arrive. Slots past a row's end are garbage and must not be seen."""
    T, pos = 3, (2, 6)
    q, k, v = (x.detach() for x in random_qkv((2, 4, 2, 8), 9))
    q_pos = torch.tensor([[p + t for t in range(T)] for p in pos])
    new = torch.stack([q[b, p : p + T] for b, p in enumerate(pos)])
    k[0, 5:], v[0, 5:] = 1e3, 1e3
    y = cached(new, k, v, q_pos, window)
    for b, p in enumerate(pos):
        want = definition(q[b : b + 1, : p + T], k[b : b + 1, : p + T], v[b : b + 1, : p + T], window)
        torch.testing.assert_close(y[b].double(), want[0, p:], atol=1e-5, rtol=0)


def test_unknown_kernel_names_the_known_ones():
    with pytest.raises(UserError, match="'flash9' is unknown; expected one of eager, sdpa, banded"):
        GPT(GPTConfig(n_layer=1, vocab_size=64), kernel="flash9")
