"""Which kernel each generation of GPUs gets, and what a plan says of it."""

import itertools

import pytest
import torch

from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.model.kernels import choice, fa3
from nanolab.model.kernels.choice import KERNELS, choose_kernel
from nanolab.model.kernels.spec import NEEDS

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
V100, T4, A100, RTX3090, L40S, H100, B200 = (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0)
GPUS = (V100, T4, A100, RTX3090, L40S, H100, B200)


@pytest.fixture(autouse=True)
def fa3_loads(monkeypatch):
    monkeypatch.setattr(fa3, "probed", lambda device_type: (None, ""))


TABLE = [  # needs, dtype -> the kernel of each of GPUS
    ("", FP16, "sdpa sdpa sdpa sdpa sdpa sdpa sdpa"),
    ("", BF16, "banded banded sdpa sdpa sdpa fa3 sdpa"),
    ("", FP32, "sdpa sdpa sdpa sdpa sdpa sdpa sdpa"),
    ("window", FP16, "banded banded sdpa sdpa sdpa sdpa sdpa"),
    ("window", BF16, "banded banded sdpa sdpa sdpa fa3 sdpa"),
    ("window", FP32, "banded banded flex flex flex flex flex"),
    ("sink", FP16, "banded banded sdpa sdpa sdpa sdpa sdpa"),
    ("sink", BF16, "banded banded sdpa sdpa sdpa fa3 sdpa"),
    ("sink,window", BF16, "banded banded sdpa sdpa sdpa sdpa sdpa"),
    ("alibi", FP16, "banded banded flex flex flex flex flex"),
    ("softcap,window", BF16, "banded banded flex flex flex flex flex"),
    ("documents", BF16, "banded banded flex flex flex flex flex"),
    ("dropout", FP16, "sdpa sdpa sdpa sdpa sdpa sdpa sdpa"),
    ("dropout,window", FP16, "banded banded banded banded banded banded banded"),
    ("value size", FP16, "sdpa sdpa sdpa sdpa sdpa sdpa sdpa"),
    ("value size,window", BF16, "banded banded sdpa sdpa sdpa sdpa sdpa"),
]


@pytest.mark.fault("core D3")
@pytest.mark.parametrize("needs,dtype,names", TABLE)
def test_every_generation_gets_a_kernel_that_it_can_run(needs, dtype, names):
    needs = frozenset(filter(None, needs.split(",")))
    assert " ".join(choose_kernel(needs, "cuda", dtype, capability=gpu) for gpu in GPUS) == names


@pytest.mark.fault("core D3")
def test_before_ampere_nothing_takes_flash_or_flex():
    """All needs together and in every combination: sdpa is left for what its memory-efficient kernel does, causal rows
    without a window.
    """
    for gpu, dtype in itertools.product((V100, T4), (FP16, BF16, FP32)):
        for n in range(len(NEEDS) + 1):
            for needs in map(frozenset, itertools.combinations(sorted(NEEDS), n)):
                name = choose_kernel(needs, "cuda", dtype, capability=gpu)
                assert name == "banded" or name == "sdpa" and needs <= {"dropout", "value size"} and dtype != BF16


@pytest.mark.fault("core D3")
@pytest.mark.parametrize(
    "gpu,dtype,names", [(T4, FP16, ["banded"] * 3 + ["sdpa"]), (A100, BF16, ["sdpa"] * 4), (H100, BF16, ["fa3"] * 4)]
)
def test_the_default_model_by_what_torch_says_of_the_gpu(monkeypatch, gpu, dtype, names):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu)
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=4, n_head=2, n_embd=128, sequence_len=1024), dtype)
    assert model.kernel_names("cuda") == names


def test_capabilities_of_amd_gpus_are_not_taken_for_nvidias(monkeypatch):
    """gfx90a says (9, 0) like an H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose_kernel(frozenset(), "cuda", BF16) == "sdpa"


@pytest.mark.fault("P1", "core D1")
def test_the_line_of_a_plan_says_why_a_faster_kernel_is_missing(monkeypatch):
    """Each reason is the kernel's own, beside the layers that it is about; none where the fastest runs."""
    layers = [("sdpa", frozenset({"window"})), ("sdpa", frozenset({"window"})), ("flex", frozenset({"alibi"}))]
    line = choice.kernel_line(layers, "cuda", BF16, capability=A100)
    no_fa3, no_sdpa = (
        KERNELS[name].missing(frozenset(need), "cuda", BF16, A100) for name, need in (("fa3", ()), ("sdpa", {"alibi"}))
    )
    assert (
        line == f"sdpa x 2 (not fa3: {no_fa3}), flex x 1 (not fa3: {no_fa3}; not sdpa: {no_sdpa})" and "8.0" in no_fa3
    )
    assert choice.kernel_line([("fa3", frozenset())] * 3, "cuda", BF16, capability=H100) == "fa3 x 3"
    assert choice.kernel_line([("banded", frozenset())] * 3, "cpu", FP32) == "banded x 3"
    assert choice.kernel_line([("eager", frozenset())], "cpu", FP32, asked="eager") == "eager x 1 (--attn-kernel)"
    monkeypatch.setattr(fa3, "probed", lambda device_type: (None, "no network"))
    assert (
        choice.kernel_line([("sdpa", frozenset())] * 2, "cuda", BF16, capability=H100)
        == "sdpa x 2 (not fa3: no network)"
    )


@pytest.mark.fault("P1", "core D1")
def test_every_plan_has_the_line(monkeypatch):
    """base_train's in full; chat_sft and chat_rl call the same function."""
    from nanolab.stages.config import BaseTrainConfig
    from nanolab.stages.pretrain_plan import describe, planned_memory
    from nanolab.training.schedule import make_plan

    monkeypatch.setattr(choice, "capability_of", lambda device_type: A100)
    cfg = BaseTrainConfig(depth=4, dry_run=True, num_iterations=10)
    plan = make_plan(cfg, 512, 1, 0)
    memory = planned_memory(cfg, plan, "cuda", "bfloat16")
    lines = describe(cfg, plan, memory, "cuda", "A100", "bfloat16")
    [line] = [line for line in lines if line.startswith("attention ")]
    assert line.split()[1:6] == ["sdpa", "x", "4", "(not", "fa3:"]
