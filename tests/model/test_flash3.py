"""FlashAttention-3's wrapper on CPU tensors. Stand-ins for the package that brings the kernel have the signatures of
the installed one.
"""

import json
import math
import re
import sys
import types
from unittest.mock import create_autospec

import pytest
import torch

from nanolab.cli import UserError
from nanolab.model.kernels import fa3
from nanolab.model.kernels.choice import choose_kernel
from nanolab.model.kernels.reference import eager
from nanolab.model.kernels.spec import AttnSpec

HOPPER = (9, 0)
# some of version 1's
VARIANTS = (
    "torch212-cxx11-cu130-x86_64-linux",
    "torch-stable-abi29-cu128-x86_64-linux",
    "torch-stable-abi29-cu130-x86_64-linux",
)


def working(q, k, v, causal=False, window_size=(-1, -1), deterministic=False):
    """The kernel's contract in plain operators: (B, T, heads, D), scores scaled by 1/sqrt(D), left < 0 for the whole
    row.
    """
    assert causal and window_size[1] == 0
    left = q.size(1) if window_size[0] < 0 else window_size[0]
    return eager(q, k, v, AttnSpec(left, 1 / math.sqrt(q.size(-1))))


def with_log_sum_exp(q, k, v, **options):
    return working(q, k, v, **options), torch.zeros(())


def failing_launch(q, k, v, **options):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def failing_backward(q, k, v, **options):
    y = working(q, k, v, **options)
    y.register_hook(lambda grad: (_ for _ in ()).throw(RuntimeError("backward is not built")))
    return y


def without_windows(q, k, v, **options):
    return working(q, k, v, causal=True, window_size=(-1, 0))


def without_gradient_of_v(q, k, v, **options):
    return working(q, k, v.detach() + 0 * v, **options)


@pytest.fixture
def install(monkeypatch):
    """A function kernel -> None that makes the package's get_kernel bring it; None: the package is not installed."""
    package = pytest.importorskip("kernels")

    def put(kernel):
        brings = create_autospec(package.get_kernel, return_value=types.SimpleNamespace(flash_attn_func=kernel))
        monkeypatch.setattr(package, "get_kernel", brings)
        if kernel is None:
            monkeypatch.setitem(sys.modules, "kernels", None)
        monkeypatch.setattr(fa3, "probed", lambda device_type: fa3.probe("cpu", HOPPER, fa3.load))

    return put


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A folder with a build as version 1 has it, whose function is a stand-in, and torch as its wheel for CUDA 13.0
    says it is.
    """
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: HOPPER)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    for variant in VARIANTS:
        folder = tmp_path / "repository" / "build" / variant
        folder.mkdir(parents=True)
        about = {
            "id": f"flash_attn3_{tmp_path.name}",
            "name": "flash-attn3",
            "version": 1,
            "license": "BSD-3-Clause",
            "python-depends": [],
        }
        (folder / "metadata.json").write_text(
            json.dumps(about | {"backend": {"type": "cuda", "archs": ["8.0", "9.0a"]}})
        )
        (folder / "__init__.py").write_text("from .flash_attn_interface import flash_attn_func\n")
        (folder / "flash_attn_interface.py").write_text(
            f"def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):\n    return {variant!r}\n"
        )
    return tmp_path / "repository"


@pytest.mark.fault("P1", "core D1")
def test_the_installed_package_trusts_finds_and_loads_it(build, monkeypatch):
    """The package's own code from trust to import; only the hub's answers are stand-ins. It prefers the newest build
    for any torch.
    """
    kernels = pytest.importorskip("kernels")
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFolder

    asked = []

    def answer(name, make):
        def method(self, *args, **named):
            asked.append(name)
            return make(*args, **named)

        monkeypatch.setattr(HfApi, name, method)

    def publisher(name):
        if name != "kernels-community":
            raise LookupError(f"{name} is a person")
        return types.SimpleNamespace(trustedKernelPublisher=True)

    def in_build(repo_id, filename, **named):
        assert (repo_id, named["revision"]) == ("kernels-community/flash-attn3", "c0ffee")
        return str(build / filename)

    branches = [types.SimpleNamespace(name=name, target_commit="c0ffee") for name in ("main", "v1")]
    answer("get_organization_overview", publisher)
    answer("list_repo_refs", lambda **named: types.SimpleNamespace(branches=branches))
    answer("list_repo_tree", lambda *args, **named: [RepoFolder(path=f"build/{v}", oid="0") for v in VARIANTS])
    answer("hf_hub_download", in_build)
    answer("snapshot_download", lambda *args, **named: str(build))
    attend = fa3.load()
    assert attend(None, None, None, causal=True, window_size=(8, 0)) == VARIANTS[-1]
    assert "get_organization_overview" in asked and kernels.get_loaded_kernels()


@pytest.mark.fault("P1", "core D1")
def test_LOCAL_KERNELS_names_a_folder_to_load_from(build, monkeypatch):
    """Nothing is asked of the network: the folder is found before the hub."""
    pytest.importorskip("kernels")
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "get_organization_overview", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/flash-attn3={build}")
    assert fa3.load()(None, None, None) == VARIANTS[-1]


@pytest.mark.parametrize("kernel", [working, with_log_sum_exp])
def test_a_working_kernel_is_loaded_and_trusted(install, kernel):
    install(kernel)
    assert fa3.probed("cuda") == (kernel, "")
    for needs in ((), ("window",), ("sink",)):
        assert choose_kernel(frozenset(needs), "cuda", torch.bfloat16, capability=HOPPER) == "fa3"


@pytest.mark.parametrize(
    "kernel,words",
    [
        (failing_launch, "failed with RuntimeError: no kernel image is available$"),
        (failing_backward, "failed with RuntimeError: backward is not built$"),
        (without_windows, "window 8 are wrong"),
        (without_gradient_of_v, "window -1 are wrong"),
        (None, "it needs the kernels package; type bash runs/setup.sh gpu"),
    ],
)
def test_a_kernel_that_fails_is_not_used_and_asked_for_says_why(install, kernel, words):
    install(kernel)
    attend, reason = fa3.probed("cuda")
    assert attend is None and re.search(words, reason), reason
    assert choose_kernel(frozenset(), "cuda", torch.bfloat16, capability=HOPPER) == "sdpa"
    with pytest.raises(UserError, match="--attn-kernel fa3 cannot run this model: .*try --attn-kernel sdpa") as refusal:
        choose_kernel(frozenset(), "cuda", torch.bfloat16, asked="fa3", capability=HOPPER)
    assert reason in str(refusal.value)


@pytest.mark.parametrize("capability", [None, (8, 0), (10, 0)])
def test_nothing_is_fetched_for_other_devices(capability):
    attend, reason = fa3.probe("cuda", capability, load=lambda: pytest.fail("loaded"))
    assert (
        attend is None and "it needs a Hopper GPU" in reason and (capability is None or f"{capability[0]}.0" in reason)
    )


def test_the_device_is_asked_once(monkeypatch):
    answers = iter([(working, "")])
    monkeypatch.setattr(fa3, "_FOUND", {})
    monkeypatch.setattr(fa3, "probe", lambda *_: next(answers))
    assert [fa3.missing(frozenset(needs), "cuda", torch.bfloat16, HOPPER) for needs in ((), ("window",))] == ["", ""]


@pytest.mark.parametrize(
    "needs,dtype", [({"documents"}, torch.bfloat16), ({"window", "sink"}, torch.bfloat16), (set(), torch.float32)]
)
def test_nothing_is_fetched_for_a_layer_that_it_cannot_do(monkeypatch, needs, dtype):
    monkeypatch.setattr(fa3, "probed", lambda device_type: pytest.fail("probed"))
    assert fa3.missing(frozenset(needs), "cuda", dtype, HOPPER)


@pytest.mark.parametrize("kernel", [working, with_log_sum_exp])
@pytest.mark.parametrize("sink", [None, 0.0, math.log(1e-3), "learned"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_equals_eager_forward_and_backward(install, kernel, sink, heads):
    """Also with a scale other than 1/sqrt(D), shared heads with sinks of their own, and head sizes that need padding or
    not.
    """
    install(kernel)
    g = torch.Generator().manual_seed(0)
    for size in (6, 8):
        inputs = [
            torch.randn(2, 7, n, size, generator=g, dtype=torch.float64).requires_grad_()
            for n in (heads[0], heads[1], heads[1])
        ]
        log_sink = sink
        if sink == "learned":
            log_sink = torch.randn(heads[0], generator=g, dtype=torch.float64).requires_grad_()
            inputs.append(log_sink)
        for window in (7,) if sink is not None else (7, 3, 0):
            for scale in (1 / math.sqrt(size), 0.9):
                rules = AttnSpec(window, scale, log_sink)
                y, want = fa3.run(*inputs[:3], rules), eager(*inputs[:3], rules)
                torch.testing.assert_close(y, want)
                upstream = torch.randn(want.shape, generator=g, dtype=torch.float64)
                for a, b in zip(torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(want, inputs, upstream)):
                    torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("n", [1e-3, 3.0, 500.0])
def test_bf16_does_not_round_the_sink(install, n):
    """Equal keys with values 1 give y = T / (n + T), hence n. In one bf16 channel ln n would be off by up to 2^-9 of
    itself, n by 1 %.
    """
    install(lambda q, k, v, **options: working(q.double(), k.double(), v.double(), **options))
    q = torch.zeros(1, 4, 1, 8, dtype=torch.bfloat16)
    y = fa3.run(q, q, torch.ones_like(q), AttnSpec(4, 1.0, math.log(n)))[0, -1, 0, 0].item()
    assert abs(4 / y - 4 - n) < 2e-4 * n


def test_a_sink_on_a_row_longer_than_the_full_window_is_refused_not_ignored(install):
    install(working)
    q = torch.zeros(1, 8, 1, 8)
    with pytest.raises(
        UserError, match="no sink on rows of 8 tokens, longer than the model's 4; try --attn-kernel sdpa"
    ):
        fa3.run(q, q, q, AttnSpec(4, 1.0, 0.0))


@pytest.mark.fault("core D5")
def test_deterministic_algorithms_are_asked_of_it(install):
    """It is no operator of torch, whose switch it does not see."""
    asked = []
    install(lambda q, k, v, **options: asked.append(options["deterministic"]) or working(q, k, v, **options))
    q = torch.zeros(1, 4, 1, 8)
    for on in (False, True):
        asked.clear()
        torch.use_deterministic_algorithms(on)
        try:
            fa3.run(q, q, q, AttnSpec(4, 1.0))
        finally:
            torch.use_deterministic_algorithms(False)
        assert set(asked) == {on}


@pytest.mark.gpu
def test_a_hopper_gpu_loads_it():
    """With a network or a filled cache: fetched, launched forward and backward, and right."""
    if torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("needs a Hopper GPU")
    assert fa3.probed("cuda")[1] == ""
