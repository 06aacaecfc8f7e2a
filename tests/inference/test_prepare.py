"""A served model against the model it was made of."""

import copy
import logging
import subprocess
import sys

import pytest
import torch

from nanolab.cli import UserError
from nanolab.inference.cache import KVCache
from nanolab.inference.prepare import prepare_for_inference
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT

SMALL = dict(sequence_len=64, vocab_size=61, n_layer=3, n_head=4, n_embd=64, bos=60, window_size=7)
VARIANTS = {
    "default": GPTConfig(**SMALL),
    "gqa-swiglu-gate": GPTConfig(
        **SMALL,
        attention="gqa:2",
        mlp="swiglu",
        gate="head",
        rope_fraction=0.5,
        norm_gain=True,
        bias="qkv,out,mlp,norm,head",
    ),
    "rnope-documents": GPTConfig(**SMALL, positions="rnope", document_mask=True, tied_head=True, softmax="sink"),
    "mla": GPTConfig(**SMALL, attention="mla", value_embeds=False),
    "interleaved-l2": GPTConfig(**SMALL, rope_layout="interleaved", qk_norm="l2", norm="layernorm", norm_gain=True),
    "gpt2": GPTConfig(
        **SMALL,
        positions="learned",
        qk_norm="none",
        value_embeds=False,
        smear=False,
        residual_scalars=False,
        tied_head=True,
        softcap=0.0,
        mlp="gelu",
    ),
}


def build(config: GPTConfig, dtype: torch.dtype, scale: float = 0.2) -> GPT:
    torch.manual_seed(3)
    model = GPT(config, compute_dtype=dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, scale)
    return model


@torch.no_grad()
def logits(model: GPT) -> torch.Tensor:
    """Of 20 tokens in three chunks and four steps."""
    ids = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))
    ids[:, 9] = 60
    cache = KVCache(model.config, 2, dtype=model.compute_dtype)
    return torch.cat([model(chunk, cache=cache) for chunk in ids.split([9, 3, 4, 1, 1, 1, 1], dim=1)], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_logits_are_as_near_to_exact_ones_as_those_of_casting_at_each_use(name, dtype):
    model, exact = build(VARIANTS[name], dtype), logits(build(VARIANTS[name], torch.float64).double())
    before, fast = logits(model), prepare_for_inference(copy.deepcopy(model))
    error, served_error = ((found.double() - exact).square().mean().sqrt() for found in (before, logits(fast)))
    assert served_error < 1.5 * error
    assert not any(p.requires_grad for p in fast.parameters())


def test_matrices_are_cast_and_what_is_computed_in_fp32_is_not():
    fast = prepare_for_inference(build(VARIANTS["default"], torch.bfloat16))
    assert (
        {p.dtype for p in fast.h.parameters()} == {fast.wte.weight.dtype, fast.lm_head.weight.dtype} == {torch.bfloat16}
    )
    assert fast.smear.scale.dtype == fast.backout.scale.dtype == torch.float32
    held = lambda m: sum(p.nbytes for p in m.parameters())  # noqa: E731
    assert held(fast) < 0.51 * held(build(VARIANTS["default"], torch.bfloat16))


@pytest.mark.parametrize("name", ["default", "mla"])
def test_int8_halves_the_matrices_and_stays_close(name):
    """Against bf16; of the logits of 40 tokens, the best stays the best almost everywhere."""
    pytest.importorskip("torchao")
    exact, small = (
        prepare_for_inference(build(VARIANTS[name], torch.bfloat16, 0.05)),
        prepare_for_inference(build(VARIANTS[name], torch.bfloat16, 0.05), int8=True),
    )
    a, b = logits(exact), logits(small)
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, atol=0.05 * a.abs().max().item(), rtol=0)
    assert (a.argmax(-1) == b.argmax(-1)).float().mean() > 0.8
    whole, quantized = exact.h[0].mlp.c_proj.weight, small.h[0].mlp.c_proj.weight
    parts, _ = quantized.__tensor_flatten__()
    assert sum(getattr(quantized, part).nbytes for part in parts) < 0.6 * whole.nbytes  # and a scale per output


def test_without_torchao_int8_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="bash runs/setup.sh int8"):
        prepare_for_inference(build(VARIANTS["default"], torch.float32), int8=True)


@pytest.mark.slow  # importing torchao takes seconds
@pytest.mark.fault("P5")
def test_int8_is_quiet():
    pytest.importorskip("torchao")
    code = (
        "from nanolab.model.config import GPTConfig; from nanolab.inference.prepare import prepare_for_inference; from"
        f" nanolab.model.gpt import GPT; prepare_for_inference(GPT(GPTConfig(**{SMALL})).eval(), int8=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_other_warnings_of_torchao_are_heard(monkeypatch, tmp_path, caplog):
    """A torchao that logs, when it is imported, the known lines and others."""
    known = [
        "Failed to load /x/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: Could not load this library:"
        " /x/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so"
    ]
    others = [
        known[0].replace("_C_mxfp8", "_C"),
        known[0].replace("Could not load this library", "undefined symbol"),
        "int8 is broken here",
    ]
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text(
        f"import logging\nfor line in {known + others}:\n    logging.getLogger('torchao').warning(line)\n"
    )
    (tmp_path / "torchao" / "quantization.py").write_text(
        "Int8WeightOnlyConfig = dict\ndef quantize_(*_, **__): pass\n"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    prepare_for_inference(build(VARIANTS["default"], torch.float32), int8=True)
    assert caplog.messages == others
    logging.getLogger("torchao").warning(known[0])  # once imported, nothing is held back
    assert caplog.messages == [*others, known[0]]
    del sys.modules["torchao"], sys.modules["torchao.quantization"]  # monkeypatch puts the real ones back
