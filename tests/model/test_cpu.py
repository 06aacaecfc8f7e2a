"""The blocked head and loss against torch's own cross entropy in float64."""

import pytest
import torch
import torch.nn.functional as F

from nanolab.model import cpu
from nanolab.model.cpu import blocked_cross_entropy, blocked_nats
from nanolab.model.gpt import cross_entropy

CAP = 15.0
CASES = {  # rows, width, vocabulary, table rows, share of targets ignored
    "one row": (1, 8, 64, 64, 0.0),
    "a full block": (64, 8, 64, 64, 0.3),
    "vocabulary below the table": (65, 8, 37, 64, 0.3),
    "several blocks and a rest": (150, 16, 100, 128, 0.3),
    "all ignored": (70, 8, 50, 64, 1.0),
}


def make(case, dtype=torch.float32, scale=3.0):
    N, C, vocab, table, ignored = CASES[case]
    g = torch.Generator().manual_seed(N)
    x = (scale * torch.randn(N, C, generator=g)).to(dtype).requires_grad_()  # large enough that the cap bends
    w = torch.randn(table, C, generator=g).requires_grad_()
    y = torch.randint(vocab, (N,), generator=g)
    y[torch.rand(N, generator=g) < ignored] = -1
    return x, w, y, vocab


def head(w, b=None):
    return lambda x: F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))


def definition(x, w, y, vocab):
    """Nats per row, fp64."""
    logits = CAP * torch.tanh((x.double() @ w.to(x.dtype).double().T)[:, :vocab] / CAP)
    return F.cross_entropy(logits, y, ignore_index=-1, reduction="none")


@pytest.fixture(params=[(1024, 64), (32, 8), (48, 64)], ids=["default blocks", "small blocks", "uneven blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(cpu, "GEMM_ROWS", request.param[0])
    monkeypatch.setattr(cpu, "CACHE_ROWS", request.param[1])


@pytest.mark.parametrize("case", CASES)
def test_sum_and_gradients(case, blocks):
    x, w, y, vocab = make(case)
    want = definition(x, w, y, vocab).sum()
    loss = blocked_cross_entropy(x, w, None, y, CAP, vocab)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-5)
    dx, dw = torch.autograd.grad(loss, (x, w))
    want_dx, want_dw = torch.autograd.grad(want, (x, w))
    torch.testing.assert_close(dx, want_dx, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dw, want_dw, rtol=1e-4, atol=1e-4)
    assert (dx[y < 0] == 0).all(), "an ignored row has a gradient"
    assert (dw[vocab:] == 0).all(), "a row of the table past the vocabulary has a gradient"


def test_upstream_gradient_scales_both():
    x, w, y, vocab = make("several blocks and a rest")
    plain = torch.autograd.grad(blocked_cross_entropy(x, w, None, y, CAP, vocab), (x, w))
    scaled = torch.autograd.grad(-0.37 * blocked_cross_entropy(x, w, None, y, CAP, vocab), (x, w))
    for a, b in zip(plain, scaled):
        assert a.abs().max() > 0
        torch.testing.assert_close(-0.37 * a, b)


@pytest.mark.parametrize("case", CASES)
def test_nats_per_row(case, blocks):
    x, w, y, vocab = make(case)
    want = definition(x, w, y, vocab).detach()
    for nats in (blocked_nats(x, head(w), y, CAP, vocab), cross_entropy(x, head(w), y, CAP, vocab, "none")):
        assert nats.dtype == torch.float32 and nats.shape == y.shape
        torch.testing.assert_close(nats.double(), want, rtol=1e-6, atol=1e-5)
        assert (nats[y < 0] == 0).all()


def test_a_certain_prediction_costs_little_and_a_wrong_one_the_cap():
    """Logits at the cap's two ends: the loss must come out of the tails exactly. With V = 2 logits +-15: log(1 +
    e^-30), 30 + that.
    """
    x, w, y = torch.tensor([[1e4], [1e4]]), torch.tensor([[1.0], [-1.0]]).repeat(1, 1), torch.tensor([0, 1])
    nats = blocked_nats(x, head(w), y, CAP, 2)
    torch.testing.assert_close(nats, torch.tensor([0.0, 30.0]), atol=1e-5, rtol=0)
    loss = blocked_cross_entropy(x.requires_grad_(), w.requires_grad_(), None, y, CAP, 2)
    torch.testing.assert_close(loss, torch.tensor(30.0), atol=1e-5, rtol=0)
    assert torch.isfinite(torch.cat([g.flatten() for g in torch.autograd.grad(loss, (x, w))])).all()


def test_a_nan_reaches_the_loss():
    """A broken model must be seen by the loop's non-finite stop, also where the target is elsewhere."""
    x, w, y, vocab = make("several blocks and a rest")
    with torch.no_grad():
        x[100, 3] = float("nan")
    y[100] = 1
    assert blocked_cross_entropy(x, w, None, y, CAP, vocab).isnan()


def test_bf16_gradients_are_within_rounding():
    """Logits, their gradient and the products are rounded to bf16 (u = 2^-8 each): a few u on the norm of a gradient.

    The upstream gradient is 1 / (number of targets): rounding that to bf16 too would shift every gradient by the same
    factor, which for 106 targets is 0.28 %.
    """
    x, w, y, vocab = make("several blocks and a rest", torch.bfloat16, scale=0.5)
    want = definition(x, w, y, vocab).sum() / 106
    loss = blocked_cross_entropy(x, w, None, y, CAP, vocab) / 106
    torch.testing.assert_close(loss.double(), want, rtol=2.0**-8, atol=0)
    (dx, dw), (want_dx, want_dw) = (torch.autograd.grad(a, (x, w)) for a in (loss, want))
    assert dx.dtype == torch.bfloat16 and dw.dtype == torch.float32
    assert (dx.double() - want_dx).norm() < 4 * 2.0**-8 * want_dx.double().norm()
    assert (dw - want_dw).norm() < 4 * 2.0**-8 * want_dw.norm()
    unscaled = torch.autograd.grad(blocked_cross_entropy(x, w, None, y, CAP, vocab), x)[0].float() / 106
    assert abs((dx.float() * unscaled).sum() / unscaled.square().sum() - 1) < 1e-3, (
        "the upstream gradient was rounded by itself"
    )


@pytest.mark.parametrize("cap", [0.0, CAP])
def test_bias_and_no_cap(cap, blocks):
    """Against torch in fp64, also with logits so far apart that the target's probability underflows."""
    x, w, y, vocab = make("several blocks and a rest", scale=30.0)
    b = torch.linspace(-2, 2, len(w)).requires_grad_()
    logits = (x.double() @ w.double().T + b.double())[:, :vocab]
    want = F.cross_entropy(cap * torch.tanh(logits / cap) if cap else logits, y, ignore_index=-1, reduction="sum")
    assert cap or want > 100 * len(y), "some probabilities must underflow"
    loss = blocked_cross_entropy(x, w, b, y, cap, vocab)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-4)
    for got, wanted in zip(torch.autograd.grad(loss, (x, w, b)), torch.autograd.grad(want, (x, w, b))):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(blocked_nats(x, head(w, b), y, cap, vocab).sum().double(), want, rtol=1e-6, atol=1e-4)
