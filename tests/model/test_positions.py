"""Positions against numpy in float64: complex numbers for rotations, the papers' formulas and figures for the rest."""

import math

import numpy as np
import pytest
import torch

from nanolab.cli import UserError
from nanolab.inference.cache import KVCache
from nanolab.model.config import GPTConfig, windows
from nanolab.model.variants.positions import POSITIONS, ROTATIONS, rope_angles, rope_dim, rope_rates

D, T = 16, 40  # head size, row
# the two channels of each pair
LAYOUTS = {
    "half": lambda d: (slice(0, d // 2), slice(d // 2, d)),
    "interleaved": lambda d: (slice(0, d, 2), slice(1, d, 2)),
}


def config(**changes):
    return GPTConfig(**dict(sequence_len=64, vocab_size=50, n_layer=4, n_head=2, n_embd=2 * D) | changes)


def random_heads(seed=0, dtype=torch.float64):
    return torch.randn(2, T, 3, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def turned(c, x, positions=None):
    """The model's way."""
    positions = torch.arange(x.size(1))[None] if positions is None else positions
    return ROTATIONS[c.rope_layout](x, rope_angles(c, positions, x.dtype))


def definition(c, x, rates, length=1.0):
    """x (B, T, H, D) with the channels of each pair as one complex number times length e^(-i t rate); the others as
    they are.
    """
    x = x.numpy().astype(np.float64)
    d, y = 2 * len(rates), x.copy()
    a, b = LAYOUTS[c.rope_layout](d)
    z = (x[..., a] + 1j * x[..., b]) * length * np.exp(-1j * np.arange(x.shape[1])[:, None, None] * rates)
    y[..., a], y[..., b] = z.real, z.imag
    return y


@pytest.mark.parametrize("layout", ROTATIONS)
@pytest.mark.parametrize("fraction", [1.0, 0.75, 0.5, 0.3, 0.01])
@pytest.mark.parametrize("base", [10_000.0, 100_000.0])
def test_rope_is_multiplication_by_a_complex_number(layout, fraction, base):
    """theta_i = base^(-2i/d) of the d channels that turn: an even number, at least one pair. Angles are computed in
    fp32.
    """
    c = config(rope_layout=layout, rope_fraction=fraction, rope_base=base)
    d = {1.0: 16, 0.75: 12, 0.5: 8, 0.3: 4, 0.01: 2}[fraction]
    x = random_heads()
    y = turned(c, x)
    assert rope_dim(c) == d and y.dtype == x.dtype
    np.testing.assert_allclose(y, definition(c, x, base ** (-2 * np.arange(d // 2) / d)), atol=2e-5)
    assert torch.equal(y[..., d:], x[..., d:]), "channels past the fraction turned"
    assert torch.equal(y[:, 0], x[:, 0]), "position 0 turned"


@pytest.mark.parametrize("layout", ROTATIONS)
@pytest.mark.parametrize("scaling", ["none", "linear:2", "yarn:4"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_scores_depend_on_the_distance_alone(layout, scaling, fraction):
    """q_(i+s) . k_(j+s) = q_i . k_j for the same q and k everywhere, and it is another number at another distance."""
    c = config(rope_layout=layout, rope_scaling=scaling, rope_fraction=fraction)
    q, k = (random_heads(seed)[:1, :1].expand(1, T, 3, D) for seed in (1, 2))
    scores = torch.einsum("bihd,bjhd->hij", turned(c, q), turned(c, k))
    for distance in range(T):
        along = scores.diagonal(-distance, 1, 2)
        torch.testing.assert_close(along, along[:, :1].expand_as(along), atol=1e-4, rtol=0)
    assert scores[:, :, 0].std(1).min() > 0.01, "all distances look alike"


def test_interleaved_is_half_with_channels_in_another_order():
    """Channel 2i of one is channel i of the other, 2i + 1 is i + d/2: the same model with the rows of c_q and c_k
    permuted.
    """
    x = random_heads(dtype=torch.float32)
    for fraction, d in ((1.0, 16), (0.5, 8)):
        order = torch.cat((torch.arange(0, d, 2), torch.arange(1, d, 2), torch.arange(d, D)))
        a = turned(config(rope_layout="interleaved", rope_fraction=fraction), x)
        b = turned(config(rope_layout="half", rope_fraction=fraction), x[..., order])
        assert torch.equal(a[..., order], b)


def test_positions_need_not_begin_at_zero():
    """Rows of a cache are each at their own position."""
    c, x = config(), random_heads(dtype=torch.float32)
    positions = torch.stack((torch.arange(T) + 7, torch.arange(T) + 19))
    far = turned(c, torch.cat((x, x), 1)[:, :1].expand(2, 64, 3, D))
    near = turned(c, x[:, :1].expand(2, T, 3, D), positions)
    assert torch.equal(near[0], far[0, 7 : 7 + T]) and torch.equal(near[1], far[1, 19 : 19 + T])


@pytest.mark.parametrize("s", [2.0, 3.5])
def test_linear_scaling_is_rope_at_positions_divided(s):
    c, x = config(rope_scaling=f"linear:{s:g}"), random_heads()
    np.testing.assert_allclose(turned(c, x), definition(c, x, 100_000.0 ** (-2 * np.arange(D // 2) / D) / s), atol=2e-5)


@pytest.mark.parametrize("row,s,base", [(4096, 4.0, 10_000.0), (2048, 8.0, 500.0), (64, 1.5, 10_000.0)])
def test_yarn_is_its_formula(row, s, base):
    """theta' = theta ((1 - g)/s + g), g = clip((r - 1)/(32 - 1), 0, 1), r = L theta / 2 pi turns in the trained length
    L = row / s; cos and sin times m = 0.1 ln s + 1. arXiv 2309.00071, sections 3.2 to 3.4."""
    c, x = config(sequence_len=row, rope_scaling=f"yarn:{s:g}", rope_base=base), random_heads()
    theta = base ** (-2 * np.arange(D // 2) / D)
    r = row / s * theta / (2 * np.pi)
    g = np.clip((r - 1) / 31, 0, 1)
    want = theta * ((1 - g) / s + g)
    rates, m = rope_rates(c, torch.device("cpu"))
    np.testing.assert_allclose(rates, want, rtol=1e-5)
    assert m == pytest.approx(1 + math.log(s) / 10)
    np.testing.assert_allclose(turned(c, x), definition(c, x, want, m), atol=5e-5)
    if row == 4096:
        assert want[0] == theta[0] and want[-1] == theta[-1] / s and (g[1:-1] * (1 - g[1:-1])).max() > 0, (
            "kept, divided, and something between"
        )


@pytest.mark.parametrize("scaling", ["linear", "linear:1", "linear:x", "yarn:0.5", "yarn:inf", "yarn:nan", "ntk:2", ""])
def test_other_scalings_are_refused(scaling):
    with pytest.raises(UserError, match="--rope-scaling is .*try --rope-scaling yarn:4"):
        turned(config(rope_scaling=scaling), random_heads())


PAPERS_8 = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]  # arXiv 2108.12409, section 3
SLOPES = {
    8: PAPERS_8,
    16: [2 ** (-h / 2) for h in range(1, 17)],
    12: (
        PAPERS_8 + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    ),  # those of 8, then every second one of 16, as in the authors' code
    3: [1 / 16, 1 / 256, 1 / 4],
    1: [1 / 256],
}


@pytest.mark.parametrize("H", SLOPES)
def test_alibi_slopes_are_the_papers(H):
    slopes = POSITIONS["alibi"].slopes(config(n_head=H, n_embd=32 * H))
    np.testing.assert_allclose(slopes, SLOPES[H], rtol=1e-6)


def test_sinusoidal_is_numpys():
    c, e = config(), torch.randn(2, T, 2 * D, generator=torch.Generator().manual_seed(0))
    positions, table = np.stack((np.arange(T), np.arange(T) + 11)), np.zeros((2, T, 2 * D))
    for i in range(D):
        table[..., 2 * i] = np.sin(positions / 10_000 ** (2 * i / (2 * D)))
        table[..., 2 * i + 1] = np.cos(positions / 10_000 ** (2 * i / (2 * D)))
    got = POSITIONS["sinusoidal"](c).add(e, torch.from_numpy(positions))
    assert got.dtype == e.dtype
    np.testing.assert_allclose(got - e, table, atol=1e-5)


def test_learned_adds_the_row_of_the_position():
    c, positions = config(), torch.tensor([[0, 1, 2], [5, 6, 63]])
    module, e = POSITIONS["learned"](c), torch.randn(2, 3, 2 * D, dtype=torch.bfloat16)
    table = torch.randn(64, 2 * D)
    module.load_state_dict({"wpe.weight": table})
    assert torch.equal(module.add(e, positions), e + table[positions].bfloat16())


@torch.no_grad()
def test_learned_ends_where_its_table_does(make_model):
    model, idx = make_model(config(positions="learned")), torch.zeros(1, 65, dtype=torch.int64)
    assert model(idx[:, :64]).isfinite().all()
    cache = KVCache(model.config)
    model(idx[:, :64], cache=cache)
    for past_the_end in (lambda: model(idx), lambda: model(idx[:, :1], cache=cache)):
        with pytest.raises((UserError, IndexError)):
            past_the_end()


@pytest.fixture
def make_model():
    from nanolab.model.gpt import GPT

    def make(c):
        model, g = GPT(c), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
        return model.eval()

    return make


PLAIN = dict(value_embeds=False, smear=False, residual_scalars=False, backout=False, window_pattern="L")


@torch.no_grad()
@pytest.mark.parametrize(
    "positions,sees_order",
    [("nope", False), ("rope", True), ("learned", True), ("sinusoidal", True), ("alibi", True), ("rnope", True)],
)
def test_only_nope_is_blind_to_order(make_model, positions, sees_order):
    """One layer in which the last token looks at all others: without positions it sees a set."""
    model = make_model(config(positions=positions, n_layer=1, **PLAIN))
    idx = torch.randint(50, (1, 20), generator=torch.Generator().manual_seed(1))
    other = torch.cat((idx[:, :-1].flip(1), idx[:, -1:]), dim=1)
    gap = (model(idx, last_only=True) - model(other, last_only=True)).abs().max()
    assert gap > 1e-3 if sees_order else gap < 1e-5


@pytest.mark.parametrize(
    "pattern,layers", [("R,N", "RNRNRN"), ("R,R,R,N", "RRRNRR"), ("N,R", "NRNRNR"), ("R", "RRRRRR")]
)
def test_rnope_turns_the_layers_of_its_pattern(make_model, pattern, layers):
    """Seen from outside: a layer that turns gives other keys to the same token at another place."""
    c = config(positions="rnope", position_pattern=pattern, n_layer=6, **PLAIN)
    assert "".join("RN"[not POSITIONS["rnope"].uses_rope(c, i)] for i in range(6)) == layers
    model, cache = make_model(c), KVCache(c)
    for block in model.h:  # nothing is added to the stream: all tokens stay equal, so keys differ by position alone
        block.attn.c_proj.weight.data.zero_()
        block.mlp.c_proj.weight.data.zero_()
    with torch.no_grad():
        model(torch.full((1, 9), 3), cache=cache)
    assert "".join("NR"[not torch.equal(k[0, 0], k[0, 8])] for k in cache.k) == layers


def test_windows_where_positions_turn():
    """RNoPE-SWA, arXiv 2501.18795: layers that turn see a window, those that do not see everything, also the last
    layer.
    """
    swa = dict(window_pattern="rope", window_size=9)
    for pattern, want in (("R,N", [9, 64, 9, 64]), ("R,R,R,N", [9, 9, 9, 64]), ("N,R", [64, 9, 64, 9])):
        assert windows(config(positions="rnope", position_pattern=pattern, **swa)) == want
    assert windows(config(positions="rope", **swa)) == [9, 9, 9, 9]
