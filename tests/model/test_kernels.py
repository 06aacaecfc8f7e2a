"""Every attention kernel, with every rule, against the formula worked out in float64, one query at a time."""

import functools
import math

import pytest
import torch

from nanolab.cli import UserError
from nanolab.model.kernels import banded as banded_module
from nanolab.model.kernels import spec as rules_module
from nanolab.model.kernels.choice import KERNELS, choose_kernel
from nanolab.model.kernels.reference import cached, definition, eager
from nanolab.model.kernels.sdpa import sdpa
from nanolab.model.kernels.spec import FLAGS, NEEDS, AttnSpec, CachedKeys, seen

# B, H, G, D, E
SHAPES = {
    "heads 2": (2, 2, 2, 8, 8),
    "shared 4 to 2": (2, 4, 2, 6, 6),
    "one shared": (1, 3, 1, 4, 4),
    "small values": (2, 4, 2, 8, 6),
}
LEARNED = "learned"  # stands for a log_sink with a gradient, one for each head
RULES = {
    "plain": {},
    "window": {"window": 2},
    "softmax1": {"log_sink": 0.0},
    "softmax_n small": {"log_sink": math.log(1e-3)},
    "softmax_n large, window": {"log_sink": math.log(8), "window": 3},
    "sink": {"log_sink": LEARNED},
    "sink, window": {"log_sink": LEARNED, "window": 2},
    "alibi": {"slopes": True},
    "softcap": {"softcap": 1.5},
    "documents": {"documents": True},
    "sink, documents": {"log_sink": LEARNED, "documents": True},
    "all": {"window": 4, "log_sink": LEARNED, "slopes": True, "softcap": 1.5, "documents": True},
}
TRAINS_HERE = ("eager", "sdpa", "banded")
ABLE_HERE = [
    (name, case)
    for case in RULES
    for name in TRAINS_HERE
    if name != "sdpa" or not {"slopes", "softcap"} & RULES[case].keys()
]


def oracle(q, k, v, rules):
    """(B, T, H, E) fp64: for each query a list of the keys that it sees, their weights and the weighted values."""
    (T, H), G = q.shape[1:3], k.size(2)
    head = [h // (H // G) for h in range(H)]  # the key/value head of each query head
    q, k, v = q.double(), k.double()[:, :, head], v.double()[:, :, head]
    sink = (
        rules.log_sink
        if isinstance(rules.log_sink, torch.Tensor)
        else torch.full((H,), -math.inf if rules.log_sink is None else rules.log_sink)
    )
    rows = []
    for b in range(len(q)):
        for t in range(T):
            begin = max(0, t - rules.window, 0 if rules.first_BT is None else rules.first_BT[b, t].item())
            s = rules.scale * torch.einsum("hd,shd->hs", q[b, t], k[b, begin : t + 1])
            if rules.softcap:
                s = rules.softcap * torch.tanh(s / rules.softcap)
            if rules.slopes is not None:
                s = s - rules.slopes[:, None].double() * torch.arange(t - begin, -1, -1)
            e = torch.exp(s)
            rows.append(
                torch.einsum(
                    "hs,she->he", e / (torch.exp(sink.double())[:, None] + e.sum(-1, keepdim=True)), v[b, begin : t + 1]
                )
            )
    return torch.stack(rows).view(len(q), T, H, -1)


def problem(shape, T, case, dtype=torch.float64, seed=0, device="cpu"):
    """(inputs that have gradients, rules): q, k, v and, if it is learned, log_sink."""
    B, H, G, D, E = shape
    g = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(B, T, n, d, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()
        for n, d in ((H, D), (G, D), (G, E))
    ]
    options = {"window": T, "scale": 1 / math.sqrt(D), **case}
    if case.get("log_sink") is LEARNED:
        options["log_sink"] = (
            torch.randn(H, generator=g, dtype=torch.float64)
            .to(device, torch.promote_types(dtype, torch.float32))
            .requires_grad_()
        )
        inputs.append(options["log_sink"])
    if case.get("slopes"):
        options["slopes"] = torch.tensor([2.0**-h for h in range(H)], device=device)
    if options.pop("documents", False):
        begins = torch.rand(B, T, generator=g) < 0.3
        options["first_BT"] = torch.where(begins, torch.arange(T), 0).cummax(1).values.to(device)
    return inputs, AttnSpec(**options)


@functools.cache
def expected(shape, T, case_name, window=None):
    """Inputs, output, upstream gradient and gradients: worked out once for all kernels."""
    case = RULES[case_name] | ({} if window is None else {"window": window})
    inputs, rules = problem(shape, T, case, seed=T)
    y = oracle(*inputs[:3], rules)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return inputs, rules, y.detach(), upstream, torch.autograd.grad(y, inputs, upstream)


def check(name, shape, T, case_name, window=None):
    """Output and all gradients agree with the oracle, in fp64 to rounding."""
    inputs, rules, want, upstream, grads = expected(shape, T, case_name, window)
    y = KERNELS[name].run(*inputs[:3], rules)
    assert y.shape == want.shape and y.dtype == torch.float64
    torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-10)
    for part, a, b in zip(("q", "k", "v", "log_sink"), torch.autograd.grad(y, inputs, upstream), grads):
        torch.testing.assert_close(
            a,
            b,
            atol=1e-12,
            rtol=1e-10,
            msg=lambda m: f"gradient of {part}, {case_name}, window {rules.window}, T {T}: {m}",
        )


def needs_of(shape, T, rules):
    return rules.needs(T) | ({"value size"} if shape[3] != shape[4] else set())


@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("name", TRAINS_HERE)
def test_every_rule_equals_the_formula_or_is_refused_with_its_flag(name, case):
    for shape in SHAPES.values():
        rules = expected(shape, 7, case)[1]
        needs = needs_of(shape, 7, rules)
        reason = KERNELS[name].missing(needs, "cpu", torch.float64, None)
        if reason:
            assert any(FLAGS[need] in reason for need in needs), reason
        else:
            check(name, shape, 7, case)


def test_all_but_sdpa_can_do_everything_here():
    """Lest the test above passes because kernels refuse."""
    for size in (1, 2):
        for needs in map(frozenset, [[a] if size == 1 else [a, b] for a in NEEDS for b in NEEDS]):
            for name in ("eager", "banded"):
                assert not KERNELS[name].missing(needs, "cpu", torch.float32, None)
            refused = needs & {"alibi", "softcap"} or needs >= {"sink", "dropout"}
            assert bool(KERNELS["sdpa"].missing(needs, "cpu", torch.float32, None)) == bool(refused), needs


@pytest.mark.parametrize("case", ["plain", "sink"])
@pytest.mark.parametrize("name", TRAINS_HERE)
def test_every_window_of_short_rows(name, case):
    for T in (1, 2, 5):
        for window in range(T + 2):
            check(name, SHAPES["heads 2"], T, case, window)


@pytest.mark.parametrize("case", ["plain", "sink", "all"])
def test_every_window_across_blocks(case, monkeypatch):
    """Blocks of 4 rows: every case of a band (first, middle, cut, short last block) is met."""
    monkeypatch.setattr(banded_module, "BLOCK", 4)
    for window in range(11):
        check("banded", (1, 2, 1, 4, 4), 10, case, window)


@pytest.mark.parametrize("T,window", [(127, 127), (128, 64), (129, 1), (129, 128), (270, 128), (270, 300)])
@pytest.mark.parametrize("case", ["plain", "all"])
def test_rows_longer_than_a_block(case, T, window):
    """Against eager, which the tests above hold to the formula."""
    inputs, rules = problem((1, 2, 1, 4, 4), T, RULES[case] | {"window": window})
    upstream = torch.randn(1, T, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = eager(*inputs[:3], rules)
    for name in TRAINS_HERE[1:]:
        if KERNELS[name].missing(rules.needs(T), "cpu", torch.float64, None):
            continue
        y = KERNELS[name].run(*inputs[:3], rules)
        torch.testing.assert_close(y, want)
        for a, b in zip(
            torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(want, inputs, upstream, retain_graph=True)
        ):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", RULES)
def test_flex_equals_the_formula_without_gradients(case):
    for shape in (SHAPES["shared 4 to 2"], SHAPES["small values"]):
        inputs, rules, want, *_ = expected(shape, 7, case)
        with torch.no_grad():
            y = KERNELS["flex"].run(*(x.detach() for x in inputs[:3]), rules)
        torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name,case", ABLE_HERE)
def test_fp32_is_within_its_rounding(name, case):
    inputs, rules = problem((2, 4, 2, 16, 16), 40, RULES[case], torch.float32)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wide_rules = AttnSpec(**vars(rules) | ({"log_sink": wide[3]} if len(wide) == 4 else {}))
    want, y = eager(*wide[:3], wide_rules), KERNELS[name].run(*inputs[:3], rules)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, atol=2e-5, rtol=0)
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(want.sum(), wide)):
        torch.testing.assert_close(a.double(), b, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("name,case", ABLE_HERE)
def test_bf16_is_within_its_rounding(name, case):
    """With u = 2^-8, bf16's unit roundoff: a kernel may round scores and ln n (an error of u |s| each, hence a factor
    exp(2 u max|s|) on a probability), probabilities and the output (u each, sums of them in fp32)."""
    T, u, shape = 150, 2.0**-8, (2, 2, 1, 16, 16)
    inputs, rules = problem(shape, T, RULES[case], torch.bfloat16)
    q, k, v = inputs[:3]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want = eager(*wide[:3], AttnSpec(**vars(rules) | ({"log_sink": wide[3]} if len(wide) == 4 else {})))
    y = KERNELS[name].run(q, k, v, rules)
    assert y.dtype == torch.bfloat16
    # 7: ln n; ALiBi's far larger ones have no weight
    score = torch.einsum("bthd,bsgd->btshg", q.double(), k.double()).abs().max().item() / 4 + 7
    bound = (math.exp(2 * u * score) - 1 + 4 * u) * v.abs().max().item()
    error = (y.double() - want).abs()
    assert error.max() < bound
    assert error.mean() < 2 * u, "most elements are of order 0.2 and carry a few roundings of their own size"
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16()
    for a, b in zip(torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(want, wide, upstream.double())):
        assert a.dtype in (torch.bfloat16, torch.float32)
        assert (a.double() - b).norm() < 8 * u * b.norm()


@pytest.mark.parametrize("name", TRAINS_HERE)
def test_finite_differences(name, monkeypatch):
    """On the sum of everything that the kernel can do, and blocks of 3 rows."""
    monkeypatch.setattr(banded_module, "BLOCK", 3)
    case = {"window": 3, "log_sink": LEARNED, "documents": True} | (
        {} if name == "sdpa" else {"slopes": True, "softcap": 1.5}
    )
    inputs, rules = problem((1, 2, 1, 2, 2), 5, case)
    assert torch.autograd.gradcheck(
        lambda q, k, v, sink: KERNELS[name].run(q, k, v, AttnSpec(**vars(rules) | {"log_sink": sink})), inputs
    )


@pytest.mark.parametrize("name", ["eager", "banded"])
def test_dropout_gradient_belongs_to_the_draw_of_the_forward_pass(name):
    """With the same seed at every call the output is a fixed function, whose finite differences know its mask."""
    inputs, rules = problem((1, 2, 1, 2, 2), 5, {"window": 3, "log_sink": LEARNED, "softcap": 1.5, "dropout": 0.4})

    def run(q, k, v, sink):
        torch.manual_seed(3)
        return KERNELS[name].run(q, k, v, AttnSpec(**vars(rules) | {"log_sink": sink}))

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("name", TRAINS_HERE)
def test_dropout_drops_its_share_of_weights_and_keeps_their_mean(name):
    """One query per row that sees 16 equal keys with unit values in 16 channels: y shows its weights, 0 or 1 / (16 *
    0.75).
    """
    q, v = torch.zeros(400, 16, 1, 16), torch.eye(16).expand(400, 16, 16)[:, :, None]
    torch.manual_seed(0)
    y = KERNELS[name].run(q, q, v, AttnSpec(16, 1.0, dropout=0.25))[:, -1, 0]
    kept = y > 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 12))
    assert abs(kept.float().mean().item() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 6400)
    assert len(kept.unique(dim=0)) > 300, "rows draw their own masks"


@pytest.mark.parametrize("name", TRAINS_HERE)
@pytest.mark.parametrize("n", [1e-3, 1.0, 8.0])
def test_very_negative_scores_leave_only_the_sink(name, n):
    """Scores near -1e4 have no weight beside n, and their gradients are 0, not NaN. Softmax of the same scores is
    unmoved.
    """
    q, k, v = (x.detach().float() for x in problem((1, 2, 2, 4, 4), 6, {})[0])
    q, k = q.abs() * 100 + 50, -k.abs() * 100 - 50
    inputs = [x.requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    assert scores.max() < -1e4
    y = KERNELS[name].run(*inputs, AttnSpec(6, 1.0, math.log(n)))
    assert (y == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), inputs))
    softmax = KERNELS[name].run(*inputs, AttnSpec(6, 1.0))
    torch.testing.assert_close(softmax, eager(*inputs, AttnSpec(6, 1.0)))
    assert softmax.abs().max() > 0.1


@pytest.mark.parametrize("name", TRAINS_HERE)
def test_scores_of_both_signs_in_the_ten_thousands_pick_the_largest_of_them_and_the_sink(name):
    q, k, v = (x.detach().float() for x in problem((1, 2, 2, 4, 4), 6, {})[0])
    inputs = [x.requires_grad_() for x in (q * 100, k * 100, v)]
    y = KERNELS[name].run(*inputs, AttnSpec(6, 1.0, 0.0))
    with torch.no_grad():
        scores = torch.einsum("bthd,bshd->bhts", *inputs[:2]).masked_fill(torch.ones(6, 6).triu(1) > 0, -math.inf)
        best = torch.cat((torch.zeros_like(scores[..., :1]), scores), -1).argmax(-1)  # 0: the sink
        values = torch.cat((torch.zeros(1, 1, 2, 4), v), 1).transpose(1, 2)
        want = values.gather(2, best[..., None].expand_as(scores[..., :4])).transpose(1, 2)
    assert (best == 0).any() and (best > 0).any()
    torch.testing.assert_close(y.detach(), want)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), inputs))


@pytest.mark.parametrize("name", ["eager", "banded"])
def test_a_row_that_sees_no_key_is_zero_where_there_is_a_sink(name):
    inputs, rules = problem((1, 2, 1, 4, 4), 5, {"log_sink": LEARNED})
    rules.first_BT = torch.tensor([[0, 0, 4, 9, 0]])  # queries 2 and 3 see nothing
    y = KERNELS[name].run(*inputs[:3], rules)
    assert (y[0, [2, 3]] == 0).all() and (y[0, [0, 1, 4]] != 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), inputs))


@pytest.mark.parametrize("name", TRAINS_HERE)
def test_n_to_zero_is_softmax_and_n_to_infinity_is_nothing(name):
    (q, k, v), rules = problem((1, 2, 1, 4, 4), 6, {})
    softmax = KERNELS[name].run(q, k, v, rules)
    for n, atol in ((1e-3, 1e-2), (1e-6, 1e-5), (1e-30, 1e-12)):
        torch.testing.assert_close(
            KERNELS[name].run(q, k, v, AttnSpec(6, rules.scale, math.log(n))), softmax, atol=atol, rtol=0
        )
    assert KERNELS[name].run(q, k, v, AttnSpec(6, rules.scale, math.log(1e30))).abs().max() < 1e-25


def test_the_log_sum_exp_of_torch_has_no_gradient():
    """Why sdpa has a backward of its own for sinks. Once this fails, it can be made of torch's operators."""
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.0, True)
    assert y.requires_grad and not lse.requires_grad


def test_cuda_primitives_take_the_arguments_that_sdpa_gives():
    """Tensors without data go through the same calls as CUDA's: names, order and shapes, with shared heads, windows and
    odd sizes.
    """
    for size in (64, 60):
        q, k, v = (
            torch.empty(2, 16, n, d, device="meta", dtype=torch.bfloat16, requires_grad=True)
            for n, d in ((4, 64), (2, 64), (2, size))
        )
        sink = torch.zeros(4, device="meta", requires_grad=True)
        for window in (3, 16):
            y = sdpa(q, k, v, AttnSpec(window, 0.1, sink))
            assert y.shape == (2, 16, 4, size) and y.dtype == torch.bfloat16
            for x, g in zip((q, k, v, sink), torch.autograd.grad(y, (q, k, v, sink), torch.empty_like(y))):
                assert g.shape == x.shape and g.dtype == x.dtype


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_flex_and_the_cuda_primitives_are_traced_without_a_break():
    """As they are inside a compiled model: flex without gradients on this device, the primitives on tensors without
    data.
    """
    inputs, rules, want, *_ = expected(SHAPES["shared 4 to 2"], 7, "all")
    flex = torch.compile(KERNELS["flex"].run, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(flex(*(x.detach() for x in inputs[:3]), rules), want, atol=1e-12, rtol=1e-10)
    qkv = [torch.empty(2, 16, n, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2)]
    flash = torch.compile(sdpa, backend="aot_eager", fullgraph=True, dynamic=False)
    for x, g in zip(qkv, torch.autograd.grad(flash(*qkv, AttnSpec(3, 0.1, 0.0)).sum(), qkv)):
        assert g.shape == x.shape
    torch._dynamo.reset()


def over_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_pos: torch.Tensor, rules: AttnSpec) -> torch.Tensor:
    """Slot j of every row holds position j."""
    slots = torch.arange(k.size(1))[None]
    return cached(q, k, v, rules, CachedKeys(q_pos, slots, seen(rules, q_pos, slots)))


CACHED = [case for case in RULES if RULES[case].get("dropout") is None]


@pytest.mark.parametrize("case", CACHED)
@pytest.mark.parametrize("shape", ["shared 4 to 2", "small values"])
def test_new_queries_over_a_cache_of_uneven_rows(case, shape):
    """Row 0 holds 2 tokens, row 1 holds 6; three more arrive, or one. Slots past a row's end are garbage and must not
    be seen.
    """
    pos, total = (2, 6), 9
    inputs, rules = problem(SHAPES[shape], total, RULES[case], torch.float32)
    q, k, v = (x.detach() for x in inputs[:3])
    want = oracle(q, k, v, rules)
    for T in (3, 1):
        keys, values = k.clone(), v.clone()
        for b, p in enumerate(pos):
            keys[b, p + T :], values[b, p + T :] = 1e3, 1e3
        q_pos = torch.tensor([[p + t for t in range(T)] for p in pos])
        new = torch.stack([q[b, p : p + T] for b, p in enumerate(pos)])
        first = None if rules.first_BT is None else rules.first_BT.gather(1, q_pos)
        y = over_cache(new, keys, values, q_pos, AttnSpec(**vars(rules) | {"first_BT": first}))
        for b, p in enumerate(pos):
            torch.testing.assert_close(y[b].double(), want[b, p : p + T], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CACHED)
def test_chunks_over_a_cache_equal_the_square(case):
    """Prefill in chunks of 1, 4 and 2, the cache longer than what is in it."""
    inputs, rules = problem((2, 4, 2, 6, 6), 7, RULES[case])
    q, k, v = (x.detach() for x in inputs[:3])
    want = eager(q, k, v, rules)
    garbage = torch.full_like(k, 1e3)
    for begin, end in ((0, 1), (1, 5), (5, 7)):
        keys, values = (torch.cat((x[:, :end], garbage), 1) for x in (k, v))
        first = None if rules.first_BT is None else rules.first_BT[:, begin:end]
        q_pos = torch.arange(begin, end).expand(2, -1)
        y = over_cache(q[:, begin:end], keys, values, q_pos, AttnSpec(**vars(rules) | {"first_BT": first}))
        torch.testing.assert_close(y, want[:, begin:end])


def test_definition_keeps_the_dtype_and_the_softmax_in_fp32():
    q, k, v = (x.detach().bfloat16() for x in problem((1, 2, 1, 8, 8), 300, {})[0])
    pos = torch.arange(300)
    y = definition(q * 0, k, torch.ones_like(v), AttnSpec(300, 1.0, 0.0), pos[None], pos)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y[0, -1].double(), torch.full((2, 8), 300 / 301, dtype=torch.float64), atol=2.0**-8, rtol=0
    )


def test_needs_are_what_the_rules_ask():
    inputs, rules = problem((1, 2, 1, 4, 4), 5, RULES["all"])
    assert rules.needs(6) == NEEDS - {"dropout", "value size"}
    assert rules.needs(5) == NEEDS - {"dropout", "value size", "window"}, "a window of 4 is all that a row of 5 has"
    assert AttnSpec(0, 1.0, dropout=0.1).needs(2) == {"window", "dropout"}
    assert AttnSpec(0, 1.0, log_sink=0.0).needs(1) == {"sink"}, "ln 1 = 0 is a sink"


HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "device,dtype,needs,best",
    [
        ("cpu", FULL, set(), "banded"),
        ("cpu", HALF, NEEDS, "banded"),
        ("mps", FULL, set(), "sdpa"),
        ("mps", FULL, {"window", "documents"}, "sdpa"),
        ("mps", FULL, {"sink"}, "banded"),
        ("cuda", HALF, set(), "sdpa"),
        ("cuda", HALF, {"window", "sink", "value size"}, "sdpa"),
        ("cuda", FULL, set(), "sdpa"),
        ("cuda", FULL, {"window"}, "flex"),
        ("cuda", HALF, {"alibi"}, "flex"),
        ("cuda", HALF, {"documents"}, "flex"),
        ("cuda", HALF, {"dropout"}, "sdpa"),
        ("cuda", HALF, {"dropout", "sink"}, "banded"),
        ("cuda", HALF, NEEDS, "banded"),
    ],
)
def test_the_fastest_able_kernel_is_chosen(device, dtype, needs, best):
    """fa3 is not among them: there is no Hopper GPU here."""
    assert choose_kernel(frozenset(needs), device, dtype) == best
    assert choose_kernel(frozenset(needs), device, dtype, asked=best) == best


@pytest.mark.parametrize(
    "asked,device,dtype,needs,words",
    [
        ("sdpa", "cpu", FULL, {"alibi", "window"}, "no alibi (--positions alibi) on cpu"),
        ("sdpa", "cpu", FULL, {"softcap"}, "no softcap (--score-softcap)"),
        ("sdpa", "cpu", FULL, {"dropout", "sink"}, "no dropout (--attn-dropout) beside sink (--softmax)"),
        ("sdpa", "mps", FULL, {"sink"}, "no sink (--softmax) on mps"),
        ("sdpa", "cuda", HALF, {"documents"}, "no documents (--document-mask) on cuda in bfloat16"),
        ("sdpa", "cuda", FULL, {"window"}, "no window (--window-pattern) on cuda in float32"),
        ("sdpa", "cuda", HALF, {"window", "dropout"}, "no dropout (--attn-dropout) beside window (--window-pattern)"),
        ("flex", "cpu", FULL, set(), "it trains on CUDA only, and --device-type is cpu"),
        ("flex", "cuda", HALF, {"dropout"}, "no dropout (--attn-dropout)"),
        ("fa3", "cuda", HALF, {"value size"}, "no value size (--attention mla)"),
        ("fa3", "cuda", HALF, {"window", "sink"}, "no sink (--softmax) beside a window (--window-pattern)"),
        ("fa3", "cuda", FULL, set(), "it computes in bfloat16 only, and NANOLAB_DTYPE is float32"),
        ("fa3", "cpu", HALF, set(), "it needs a Hopper GPU"),
    ],
)
def test_a_kernel_that_cannot_is_refused_with_both_flags_and_one_that_can(asked, device, dtype, needs, words):
    with pytest.raises(UserError) as refusal:
        choose_kernel(frozenset(needs), device, dtype, asked)
    text, best = str(refusal.value), choose_kernel(frozenset(needs), device, dtype)
    assert text.startswith(f"--attn-kernel {asked} cannot run this model: ") and words in text, text
    assert text.endswith(f"try --attn-kernel {best}") and f"expected one of {best}" in text


def test_unknown_kernel_names_the_known_ones():
    with pytest.raises(UserError, match="'flash9' is unknown; expected one of eager, sdpa, banded, flex, fa3"):
        choose_kernel(frozenset(), "cpu", FULL, "flash9")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("name", KERNELS)
def test_on_a_gpu(name, case, dtype):
    """Every kernel that offers a case, forward and backward, against eager in fp32 on the same numbers; T is no
    multiple of a block.

    fp16 is what GPUs before Ampere train in, by banded and sdpa; flex compiles for long and is not for them.
    """
    if name == "flex" and dtype == torch.float16:
        pytest.skip("flex is for bf16 and fp32")
    if reason := KERNELS[name].missing(
        problem((1, 2, 1, 8, 8), 300, RULES[case])[1].needs(300), "cuda", dtype, rules_module.capability_of("cuda")
    ):
        pytest.skip(reason)
    for shape in ((2, 4, 2, 64, 64), (2, 2, 2, 64, 32), (1, 4, 1, 128, 128)):
        for T in (1, 300):
            inputs, rules = problem(shape, T, RULES[case], dtype, device="cuda")
            if KERNELS[name].missing(needs_of(shape, T, rules), "cuda", dtype, rules_module.capability_of("cuda")):
                continue
            wide = [x.detach().float().requires_grad_() for x in inputs]
            want = eager(*wide[:3], AttnSpec(**vars(rules) | ({"log_sink": wide[3]} if len(wide) == 4 else {})))
            y = KERNELS[name].run(*inputs[:3], rules)
            # fp32 products may use TF32; fp16 is finer than bf16
            tolerance = 8 * 2.0**-8 if dtype == torch.bfloat16 else 2e-2
            assert y.dtype == dtype and y.shape == want.shape
            assert (y.float() - want).norm() < tolerance * want.norm()
            upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
            for part, a, b in zip(
                ("q", "k", "v", "log_sink"),
                torch.autograd.grad(y, inputs, upstream),
                torch.autograd.grad(want, wide, upstream.float()),
            ):
                error = (a.float() - b).norm()
                assert error < tolerance * b.norm() + 1e-4, f"gradient of {part}, {shape}, T {T}: {error} of {b.norm()}"
