"""Forward and backward of every branch that only GPUs take, on tensors without numbers: the calls are ones that a GPU
accepts.
"""

import itertools
import math

import pytest
import torch
from axes import BASE, axes, label
from demands import Demands, aten

from nanolab.cli import UserError
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.model.kernels import banded, flex, reference, spec
from nanolab.model.kernels.choice import KERNELS, choose_kernel
from nanolab.model.kernels.spec import AttnSpec

T = 160  # two blocks of banded's, and no other dimension here
SHAPES = {
    "heads 2": (2, 2, 2, 64, 64),
    "shared": (1, 4, 2, 64, 64),
    "odd": (1, 2, 1, 12, 12),
    "values": (1, 2, 2, 24, 16),
    "wide": (1, 2, 2, 128, 128),
}
CASES = {
    "plain": {},
    "window": {"window": 100},
    "sink": {"log_sink": "learned"},
    "fixed sink, window": {"log_sink": 0.0, "window": 100},
    "alibi": {"slopes": True},
    "softcap": {"softcap": 5.0},
    "documents": {"first_BT": True},
    "dropout": {"dropout": 0.1},
}
GPUS = [
    ((7, 5), torch.float16),
    ((7, 0), torch.float32),
    ((8, 0), torch.bfloat16),
    ((8, 0), torch.float32),
    ((9, 0), torch.bfloat16),
    ((10, 0), torch.bfloat16),
]


def problem(shape, case, dtype):
    B, H, G, D, E = shape
    q, k, v = (
        torch.empty(B, T, n, d, device="meta", dtype=dtype, requires_grad=True) for n, d in ((H, D), (G, D), (G, E))
    )
    options = {"window": T, "scale": 0.3} | case
    if case.get("log_sink") == "learned":
        options["log_sink"] = torch.empty(H, device="meta", requires_grad=True)
    if "slopes" in case:
        options["slopes"] = torch.empty(H, device="meta")
    if "first_BT" in case:
        options["first_BT"] = torch.empty(B, T, dtype=torch.long, device="meta")
    return [q, k, v], AttnSpec(**options)


@pytest.mark.slow
@pytest.mark.fault("core D3")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("capability,dtype", GPUS, ids=lambda x: str(x).removeprefix("torch."))
def test_every_kernel_that_a_gpu_may_be_given(gpu, capability, dtype, case):
    gpu(capability)
    for shape, name in itertools.product(SHAPES.values(), ("fa3", "sdpa", "flex", "banded")):
        inputs, rules = problem(shape, CASES[case], dtype)
        needs = rules.needs(T) | ({"value size"} if shape[3] != shape[4] else set())
        if KERNELS[name].missing(needs, "cuda", dtype, capability):
            continue
        with Demands(T, ampere=capability >= (8, 0)) as demands:
            y = KERNELS[name].run(*inputs, rules)
            assert y.shape == (*inputs[0].shape[:3], shape[4]) and y.dtype == dtype
            grads = torch.autograd.grad(y.float().sum(), inputs)
        assert [g.shape for g in grads] == [x.shape for x in inputs]
        assert not demands.squares, f"{name} makes T x T by {demands.squares}"


ELSEWHERE = {  # axes that attention does not read
    "embedding",
    "mlp",
    "norm",
    "init",
    "bias",
    "pad_vocab_to",
    "softcap",
    "embed_dropout",
    "resid_dropout",
    "mlp_dropout",
    "embed_norm",
    "smear",
    "residual_scalars",
    "backout",
    "tied_head",
    "qk_gain",
}


def models():
    yield "default", {}
    yield from (
        (label(value), value)
        for axis, values in axes().items()
        if axis not in ELSEWHERE
        for value in list(values.values())[1:]
    )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [pytest.param(value, id=name) for name, value in models()])
def test_a_training_step_of_every_variant(gpu, changes):
    """On a T4 and an A100, the default on an H100 too: no call that they refuse, and none that is T x T."""
    config = GPTConfig(**vars(BASE) | {"sequence_len": T, "n_embd": 64, "window_size": 100} | changes)
    for capability, dtype in [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)][
        : 2 if changes else 3
    ]:
        gpu(capability)
        with torch.device("meta"):
            model = GPT(config, dtype)
            idx = torch.empty(2, T, dtype=torch.long)
        model.place("cuda")
        with Demands(T, ampere=capability >= (8, 0)) as demands:
            model(idx, idx, reduction="sum").backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
        assert not demands.squares


@pytest.mark.parametrize(
    "q,k,v,error,words",
    [
        ((1, 4, 2, 264), (1, 4, 2, 264), (1, 4, 2, 264), UserError, "at most 256 channels, these have 264"),
        ((1, 4, 2, 20), (1, 4, 2, 20), (1, 4, 2, 20), ValueError, "a multiple of 8"),
        ((1, 4, 3, 64), (1, 4, 2, 64), (1, 4, 2, 64), ValueError, "shared heads"),
        ((1, 4, 2, 64), (1, 4, 2, 64), (1, 4, 2, 32), ValueError, "one head size"),
    ],
)
def test_what_flash_kernels_would_refuse_is_refused_by_name(q, k, v, error, words):
    tensors = [torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in (q, k, v)]
    with pytest.raises(error, match=words):
        spec.check_flash(*tensors, "sdpa")


def test_strides_and_dtypes_that_flash_kernels_would_refuse_are_refused_by_name():
    good = torch.empty(1, 4, 2, 64, device="meta", dtype=torch.bfloat16)
    spec.check_flash(good, good, good, "fa3")
    with pytest.raises(ValueError, match="expected neighbouring channels side by side"):
        spec.check_flash(good, good.mT.contiguous().mT, good, "fa3")
    with pytest.raises(ValueError, match="expected bfloat16 or float16"):
        spec.check_flash(good.float(), good, good, "fa3")


@pytest.mark.fault("core likely: flex for reading prompts")
def test_prompts_and_held_out_rows_compile_nothing(gpu, monkeypatch):
    """Ten lengths without gradient: flex is not called. With gradient it is compiled, and inside another compilation it
    is part of that.
    """
    gpu((8, 0))
    compiled = []
    monkeypatch.setattr(flex, "_compiled", lambda function: compiled.append(function) or function)
    run = KERNELS[choose_kernel(frozenset({"alibi"}), "cuda", torch.bfloat16)].run
    asked = AttnSpec(1 << 40, 0.3, slopes=torch.empty(2, device="meta"))
    for mode in (torch.no_grad, torch.inference_mode):
        for length in range(100, 110):
            q = torch.empty(1, length, 2, 64, device="meta", dtype=torch.bfloat16)
            with mode():
                assert run(q, q, q, asked).shape == q.shape
    assert not compiled
    run(q, q, q, asked)
    assert compiled == [flex.flex_attention], "of the one length that trains"


@pytest.mark.parametrize("case", ["alibi", "softcap", "documents", "fixed sink, window"])
def test_flex_without_gradient_equals_the_definition(monkeypatch, case):
    """The branch for passes without gradient, on a CPU that is taken for a GPU, in bf16: closer to the formula than a
    bf16 rounding of its own.
    """
    monkeypatch.setattr(flex, "on_cuda", lambda x: True)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 200, n, 32, generator=g).bfloat16() for n in (4, 2, 2))
    first = (torch.rand(2, 200, generator=g) < 0.02) * torch.arange(200)
    options = (
        {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.01])}
        if case == "alibi"
        else {"first_BT": first.cummax(1).values}
        if case == "documents"
        else CASES[case]
    )
    asked = AttnSpec(**{"window": 1 << 40, "scale": 1 / math.sqrt(32)} | options)
    with torch.no_grad():
        y, want = flex.run(q, k, v, asked), reference.eager(q.double(), k.double(), v.double(), asked)
    assert y.dtype == torch.bfloat16
    assert (y.double() - want).norm() < 2.0**-8 * want.norm()


@pytest.mark.parametrize("case", ["window", "fixed sink, window", "alibi"])
def test_a_t4s_kernel_in_fp16_equals_the_definition(case):
    """Forward and backward on a CPU, which has the same operators. Far keys of ALiBi and masked ones stay within fp16's
    range.
    """
    g = torch.Generator().manual_seed(0)
    inputs = [(4 * torch.randn(2, 700, n, 32, generator=g)).half().requires_grad_() for n in (4, 2, 2)]
    asked = AttnSpec(
        **{"window": 1 << 40, "scale": 1 / math.sqrt(32)}
        | ({"slopes": torch.tensor([0.5, 0.25, 0.1, 0.01])} if case == "alibi" else CASES[case])
    )
    upstream, results = torch.randn(2, 700, 4, 32, generator=g), []
    for run, dtype in ((KERNELS["banded"].run, torch.float16), (reference.eager, torch.float64)):
        y = run(*(x.to(dtype) for x in inputs), asked)
        results.append([y.double(), *torch.autograd.grad(y, inputs, upstream.to(dtype))])
    for got, want in zip(*results):
        assert (got.double() - want.double()).norm() < 2.0**-7 * want.double().norm()


@pytest.mark.fault("core likely: block masks of inference mode")
def test_a_mask_first_made_for_a_prompt_serves_a_step_with_gradient():
    """RL: prompts of T tokens are read in inference mode, then rows of T are trained on. autograd saves the mask's
    tensors.
    """
    flex._blocks.cache_clear()
    with torch.inference_mode():
        flex._blocks(130, 64, torch.device("cpu"))
    blocks = flex._blocks(130, 64, torch.device("cpu"))
    for tensor in filter(torch.is_tensor, vars(blocks).values()):
        x = torch.ones(tensor.shape, requires_grad=True)
        (x * tensor).sum().backward()  # a product saves the other factor
    banded._band_mask.cache_clear()
    with torch.inference_mode():
        banded._band_mask(4, 0, 3, torch.float32, torch.device("cpu"))
    assert not banded._band_mask(4, 0, 3, torch.float32, torch.device("cpu")).is_inference()


def test_no_branch_is_left_out(gpu):
    """The flash primitives were called in both directions, or the tests above show nothing."""
    gpu((8, 0))
    inputs, rules = problem((1, 2, 2, 64, 64), {"window": 100}, torch.bfloat16)
    with Demands() as demands:
        KERNELS["sdpa"].run(*inputs, rules).sum().backward()
    assert (
        demands.counts[aten._flash_attention_forward.default]
        == demands.counts[aten._flash_attention_backward.default]
        == 1
    )
