"""Float8Linear against formulas of its own: the 8-bit grids are written out from their bit patterns, products are taken
in fp64.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanolab.cli import UserError
from nanolab.model import fp8
from nanolab.model.accounting import train_flops_per_token
from nanolab.model.config import GPTConfig
from nanolab.model.fp8 import Float8Linear, convert, eligible, quantise
from nanolab.model.gpt import GPT, Linear

needs_product = pytest.mark.skipif(bool(why := fp8.missing(torch.device("cpu"))), reason=f"{why}; torch 2.13 can")

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
# bits of exponent, of mantissa, largest number
FORMATS = {VALUES: (4, 3, 448.0), GRADIENTS: (5, 2, 57344.0)}


def grid(dtype: torch.dtype) -> np.ndarray:
    """Every number >= 0 of a format, ascending: (-1)^s 2^(e - bias) (1 + m / 2^M), and 2^(1 - bias) m / 2^M for e =
    0.
    """
    E, M, largest = FORMATS[dtype]
    bias = 2 ** (E - 1) - 1
    values = [2.0 ** (max(e, 1) - bias) * ((e > 0) + m / 2**M) for e in range(2**E) for m in range(2**M)]
    return np.array([v for v in values if v <= largest])


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (float) on the grid: the nearest number, of two equally near the one with the even mantissa; past the end, the
    end.
    """
    g, a = grid(dtype), x.abs().double().numpy()
    above = np.searchsorted(g, a).clip(1, len(g) - 1)
    below = above - 1
    to_below, to_above = a - g[below], g[above] - a
    index = np.where((to_below < to_above) | ((to_below == to_above) & (below % 2 == 0)), below, above)
    return torch.copysign(torch.from_numpy(g[index]), x.double())


def dequantised(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (float) as Float8Linear sees it, in fp64."""
    scale = torch.tensor(FORMATS[dtype][2] / max(x.abs().max().item(), 1e-12), dtype=torch.float32)
    return rounded(x.float() * scale, dtype) / scale.double()


def layer(n_in: int = 128, n_out: int = 256, bias: bool = False, seed: int = 0) -> Float8Linear:
    g, box = torch.Generator().manual_seed(seed), nn.Sequential(Linear(n_in, n_out, bias=bias))
    with torch.no_grad():
        for p in box.parameters():
            p.normal_(0, 0.1, generator=g)
    assert convert(box) == 1
    return box[0]


def run(linear: Float8Linear, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, dx, dw)."""
    x = x.clone().requires_grad_()
    y = linear(x)
    dx, dw = torch.autograd.grad(y, (x, linear.weight), dy)
    return y.detach(), dx, dw


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry of b."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


# the cast


@pytest.mark.parametrize("dtype", FORMATS)
def test_numbers_on_the_grid_survive(dtype):
    g = torch.from_numpy(grid(dtype)).float()
    x = torch.cat((g, -g))  # contains the largest, so that the scale is 1
    x8, back = quantise(x, dtype)
    assert back.item() == 1.0
    assert torch.equal(x8.float(), x)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", [1.0, 3e-7, 2e8])
def test_the_cast_is_the_nearest_number_of_the_scaled_grid(dtype, size):
    x = torch.randn(64, 80, generator=torch.Generator().manual_seed(1)) * size
    x8, back = quantise(x, dtype)
    assert back.dtype == torch.float32
    got, want = x8.double() * back.double(), dequantised(x, dtype)
    assert gap(got, want) < 1e-7
    # half a unit in the last place: 2^-(M+1) of the number itself, or of the smallest normal number
    E, M, largest = FORMATS[dtype]
    floor = 2.0 ** (2 - 2 ** (E - 1)) * x.abs().max() / largest
    assert ((got - x).abs() <= 1.001 * 2.0 ** -(M + 1) * torch.maximum(x.abs(), floor)).all()


def test_the_largest_entry_uses_the_whole_range():
    for dtype, (_, _, largest) in FORMATS.items():
        x8, _ = quantise(torch.tensor([[0.1, -7.3]]), dtype)
        assert x8.float().abs().max() == largest


def test_a_zero_tensor_stays_zero():
    for dtype in FORMATS:
        x8, back = quantise(torch.zeros(4, 4), dtype)
        assert not x8.float().any()
        assert math.isfinite(back.item())


# the products


@needs_product
@pytest.mark.parametrize("shape", [(48,), (3, 16), (7,), (1,)], ids=str)  # 7 and 1: no whole tile of tokens
def test_forward_and_gradients_are_products_of_the_quantised_tensors(shape):
    linear, g = layer(), torch.Generator().manual_seed(2)
    x, dy = torch.randn(*shape, 128, generator=g), torch.randn(*shape, 256, generator=g) * 1e-5
    y, dx, dw = run(linear, x, dy)
    x8, w8, dy8 = (
        dequantised(x, VALUES).view(-1, 128),
        dequantised(linear.weight.detach(), VALUES),
        dequantised(dy, GRADIENTS).view(-1, 256),
    )
    assert y.shape == (*shape, 256)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.float32,) * 3
    assert gap(y.view(-1, 256), x8 @ w8.mT) < 1e-6
    assert gap(dx.view(-1, 128), dy8 @ w8) < 1e-6
    assert gap(dw, dy8.mT @ x8) < 1e-6


@needs_product
def test_bf16_activations_give_bf16_outputs_and_fp32_weight_gradients():
    linear, g = layer(), torch.Generator().manual_seed(3)
    x, dy = torch.randn(32, 128, generator=g).bfloat16(), torch.randn(32, 256, generator=g).bfloat16()
    y, dx, dw = run(linear, x, dy)
    x8, w8, dy8 = dequantised(x, VALUES), dequantised(linear.weight.detach(), VALUES), dequantised(dy, GRADIENTS)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert gap(y, x8 @ w8.mT) < 2**-8
    assert gap(dx, dy8 @ w8) < 2**-8
    assert gap(dw, dy8.mT @ x8) < 1e-6  # not rounded to bf16 on the way


@needs_product
@pytest.mark.parametrize(("sx", "sw", "sdy"), [(1, 1, 1), (1e6, 1e-4, 1e-9), (1e-8, 1e3, 1e5)])
def test_the_error_stays_within_what_the_formats_allow(sx, sw, sdy):
    """|error of a sum of products| <= sum of |a| |b| (ea + eb + ea eb), with e half a unit in the last place."""
    linear, g = layer(), torch.Generator().manual_seed(4)
    with torch.no_grad():
        linear.weight.mul_(sw)
    x, dy = sx * torch.randn(64, 128, generator=g), sdy * torch.randn(64, 256, generator=g)
    w = linear.weight.detach().double()

    def at_least(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        E, _, largest = FORMATS[dtype]
        return torch.maximum(t.abs().double(), 2.0 ** (2 - 2 ** (E - 1)) * t.abs().max().double() / largest)

    e4, e5 = 1.01 * 2.0**-4, 1.01 * 2.0**-3
    ax, aw, ady = at_least(x, VALUES), at_least(w, VALUES), at_least(dy, GRADIENTS)
    y, dx, dw = run(linear, x, dy)
    for got, exact, bound in (
        (y, x.double() @ w.mT, (ax @ aw.mT) * (2 * e4 + e4 * e4)),
        (dx, dy.double() @ w, (ady @ aw) * (e5 + e4 + e5 * e4)),
        (dw, dy.double().mT @ x.double(), (ady.mT @ ax) * (e5 + e4 + e5 * e4)),
    ):
        error = got.double() - exact
        assert (error.abs() <= bound).all()
        assert 0.01 < error.norm() / exact.norm() < 0.10  # a few percent: it is quantised, and no worse than that


@needs_product
def test_zero_input_and_zero_gradient():
    linear = layer(bias=True)
    y, dx, dw = run(linear, torch.zeros(16, 128), torch.zeros(16, 256))
    assert torch.equal(y, linear.bias.detach().expand(16, 256))
    assert not dx.any() and not dw.any()


@needs_product
def test_a_number_that_is_not_finite_is_not_hidden():
    for bad in (math.nan, math.inf):
        x = torch.randn(16, 128)
        x[3, 5] = bad
        assert not layer()(x)[3].isfinite().any()


@needs_product
def test_bias_is_added_after_and_has_its_gradient():
    linear, x = layer(bias=True), torch.randn(4, 8, 128)
    y = linear(x)
    w8, x8 = dequantised(linear.weight.detach(), VALUES), dequantised(x, VALUES)
    assert gap(y.detach(), x8 @ w8.mT + linear.bias.detach().double()) < 1e-6
    dy = torch.randn(4, 8, 256)
    (db,) = torch.autograd.grad(y, linear.bias, dy)
    torch.testing.assert_close(db, dy.sum((0, 1)))


@needs_product
def test_operands_that_the_gpu_takes(monkeypatch):
    """First operand row-major, second column-major, inner dimension in tiles of 16, fast accumulation in forward
    only.
    """
    seen, product = [], torch._scaled_mm

    def spy(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        seen.append((a.stride(1), b.stride(0), a.size(1) % 16, b.size(1) % 16, a.dtype, b.dtype, use_fast_accum))
        return product(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, use_fast_accum=use_fast_accum)

    linear = layer()
    monkeypatch.setattr(torch, "_scaled_mm", spy)
    # both arrive column-major, and 40 is no multiple of 16
    run(linear, torch.randn(128, 40).mT, torch.randn(256, 40).mT)
    assert seen == [
        (1, 1, 0, 0, VALUES, VALUES, True),
        (1, 1, 0, 0, GRADIENTS, VALUES, False),
        (1, 1, 0, 0, GRADIENTS, VALUES, False),
    ]


@needs_product
def test_what_is_kept_for_the_backward_pass_is_8_bits_wide():
    linear, kept = layer(), []
    x = torch.randn(64, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    assert sorted(t.dtype.itemsize * t.numel() for t in kept) == [4, 4, 64 * 128, 128 * 256]


@pytest.mark.slow
@needs_product
def test_torch_compile_computes_the_same():
    linear, g = layer(bias=True), torch.Generator().manual_seed(5)
    x, dy = torch.randn(32, 128, generator=g), torch.randn(32, 256, generator=g)
    for got, want in zip(run(torch.compile(linear, backend="aot_eager", fullgraph=True), x, dy), run(linear, x, dy)):
        torch.testing.assert_close(got, want)


# conversion


@pytest.mark.parametrize(
    ("n_in", "n_out", "yes"),
    [
        (128, 128, True),
        (768, 3072, True),
        (112, 256, False),
        (256, 112, False),
        (136, 256, False),
        (256, 50257, False),
        (12, 6, False),
    ],
)
def test_only_large_matrices_of_whole_tiles_are_eligible(n_in, n_out, yes):
    assert eligible(nn.Linear(n_in, n_out, bias=False, device="meta")) is yes


@pytest.mark.parametrize(("depth", "layers"), [(12, 73), (24, 145)])
def test_the_default_dial_converts_what_the_reference_does(depth, layers):
    config = GPTConfig(n_layer=depth, n_head=depth // 2, n_embd=64 * depth)
    with torch.device("meta"):
        model = GPT(config, torch.bfloat16)
    assert convert(model) == layers == 6 * depth + 1
    assert convert(model) == 0
    assert isinstance(model.lm_head, Float8Linear)


def test_a_tied_head_keeps_its_products():
    """Its matrix is the embedding table, which is looked up in fp32; only matrices of layers are converted."""
    config = GPTConfig(
        n_layer=3, n_head=2, n_embd=128, tied_head=True, bias="qkv,out,mlp,norm,head", value_embeds=False
    )
    with torch.device("meta"):
        model = GPT(config)
    names = list(model.state_dict())
    assert convert(model) == 6 * 3
    assert list(model.state_dict()) == names


TINY = GPTConfig(sequence_len=32, vocab_size=128, n_layer=2, n_head=2, n_embd=128)


def tiny(seed: int = 0) -> GPT:
    model = GPT(TINY)
    model.init_weights(seed)
    return model


@needs_product
def test_conversion_leaves_parameters_names_and_checkpoints_alone():
    model = tiny()
    before = dict(model.named_parameters())
    saved = {name: t.clone() for name, t in model.state_dict().items()}
    model.eval()
    assert convert(model) == 13
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == list(saved)
    assert not any(m.training for m in model.modules())
    model.load_state_dict(tiny(1).state_dict(), strict=True)
    tiny(2).load_state_dict(model.state_dict(), strict=True)


def test_layers_in_any_container_are_found_and_other_classes_are_left_alone():
    class Special(Linear):
        pass

    model = nn.ModuleDict(
        {
            "list": nn.ModuleList([Linear(128, 128), Special(128, 128)]),
            "gate": Linear(12, 6),
            "one": nn.Sequential(Linear(128, 256)),
        }
    )
    assert convert(model.to("meta")) == 2
    assert [type(m) for m in (model["list"][0], model["list"][1], model["gate"], model["one"][0])] == [
        Float8Linear,
        Special,
        Linear,
        Float8Linear,
    ]


@needs_product
def test_in_evaluation_mode_it_is_the_unconverted_model_bit_for_bit():
    idx = torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(6))
    plain, model = trained(tiny()), trained(tiny())
    convert(model)
    want, targets = plain(idx), idx.roll(-1, 1)
    rough = model(idx)
    assert 1e-3 < gap(rough, want) < 0.2
    model.eval()
    assert torch.equal(model(idx), want)
    assert torch.equal(model(idx, targets), plain(idx, targets))
    with torch.no_grad():
        assert torch.equal(model(idx, targets), plain(idx, targets))
    model.train()
    assert torch.equal(model(idx), rough)


@needs_product
def test_the_loss_multiplies_in_8_bits_too():
    """The blocked cross entropy reads lm_head's weight itself; with a converted head it must not."""
    idx = torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(7))
    model = trained(tiny())
    convert(model)
    targets = idx.roll(-1, 1)
    want = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(idx, targets), want)
    with torch.no_grad():
        torch.testing.assert_close(model(idx, targets), want)


def trained(model: GPT, steps: int = 12) -> GPT:
    losses(model, steps)
    return model


def losses(model: GPT, steps: int) -> list[float]:
    """Of AdamW on one batch."""
    idx = torch.randint(128, (4, 33), generator=torch.Generator().manual_seed(8))
    optimizer, out = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


@needs_product
def test_a_model_learns_in_8_bits_as_it_does_in_32():
    model = tiny()
    convert(model)
    rough, plain = losses(model, 25), losses(tiny(), 25)
    assert rough[0] == pytest.approx(math.log(128), abs=0.05)
    assert plain[-1] < 0.5 * plain[0]
    assert rough[-1] == pytest.approx(plain[-1], rel=0.1)


def test_conversion_does_not_change_what_is_counted():
    """The reference counts FLOPs over the modules that it knows, and loses the converted ones."""
    config = GPTConfig(n_layer=24, n_head=12, n_embd=1536)
    with torch.device("meta"):
        model = GPT(config)
    before = sum(p.numel() for p in model.parameters()), train_flops_per_token(model.config)
    convert(model)
    assert (sum(p.numel() for p in model.parameters()), train_flops_per_token(model.config)) == before
    assert before[1] == pytest.approx(4.78e9, rel=0.01)


def test_a_device_without_8_bit_products_is_refused(monkeypatch):
    def no(*args, **kwargs):
        raise RuntimeError("torch._scaled_mm is only supported on compute capability >= 9.0\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", no)
    with pytest.raises(
        UserError, match=r"--fp8: this cpu device .*compute capability >= 9.0\); expected .* leave --fp8 out"
    ):
        convert(nn.Sequential(Linear(128, 128)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [64, 50])
def test_on_a_gpu(rows, compiled):
    """The same products there, in bf16; fast accumulation keeps about 14 bits of a sum."""
    if why := fp8.missing(torch.device("cuda")):
        pytest.skip(why)
    linear, g = layer(bias=True), torch.Generator().manual_seed(9)
    x, dy = torch.randn(rows, 128, generator=g).bfloat16(), torch.randn(rows, 256, generator=g).bfloat16()
    linear.to("cuda")
    y, dx, dw = (t.cpu() for t in run(torch.compile(linear) if compiled else linear, x.cuda(), dy.cuda()))
    x8, w8, dy8 = dequantised(x, VALUES), dequantised(linear.weight.detach().cpu(), VALUES), dequantised(dy, GRADIENTS)
    assert gap(y, x8 @ w8.mT + linear.bias.detach().cpu().double()) < 0.01
    assert gap(dx, dy8 @ w8) < 2**-8
    assert gap(dw, dy8.mT @ x8) < 1e-3
