"""The gpt2 presets are GPT-2: with the same weights the logits are those of transformers' GPT2LMHeadModel."""

import pytest
import torch
import transformers

from nanolab.cli import from_preset
from nanolab.inference.cache import KVCache
from nanolab.model.config import InspectConfig
from nanolab.model.gpt import GPT
from nanolab.training.schedule import gpt_config

TOY = dict(depth=3, aspect_ratio=16, head_dim=12, max_seq_len=40, vocab_size=131)  # width 48, 4 heads


def theirs(c):
    """Their model of the same size, in eval mode, every weight moved off its initial value, biases and gains too."""
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.sequence_len,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model, g = transformers.GPT2LMHeadModel(config).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.15 if p.numel() < 10**6 else 0.02)
    return model


def ours_named(state, n_layer):
    """Their tensors under our names. Conv1D keeps a matrix as (inputs, outputs), and query, key and value in one."""
    named = {"wte.weight": state["transformer.wte.weight"], "positions.wpe.weight": state["transformer.wpe.weight"]}
    for kind in ("weight", "bias"):
        named[f"norm_f.{kind}"] = state[f"transformer.ln_f.{kind}"]
        for i in range(n_layer):
            a, b = f"h.{i}.", f"transformer.h.{i}."
            named |= {f"{a}norm_1.{kind}": state[f"{b}ln_1.{kind}"], f"{a}norm_2.{kind}": state[f"{b}ln_2.{kind}"]}
            for name, part in zip(("c_q", "c_k", "c_v"), state[f"{b}attn.c_attn.{kind}"].chunk(3, dim=-1)):
                named[f"{a}attn.{name}.{kind}"] = part.mT if kind == "weight" else part
            for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
                tensor = state[f"{b}{name}.{kind}"]
                named[f"{a}{name}.{kind}"] = tensor.mT if kind == "weight" else tensor
    return named


def pair(name, kernel="", **flags):
    """(our config, our model, their model with the same weights)."""
    preset = from_preset(InspectConfig, name, **flags)
    c = gpt_config(preset, preset.vocab_size)
    ours, other = GPT(c, kernel=kernel).eval(), theirs(c)
    ours.load_state_dict(ours_named(other.state_dict(), c.n_layer), strict=True)
    return c, ours, other


def ids(c, B=2):
    return torch.randint(c.vocab_size, (B, c.sequence_len), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["eager", "sdpa", "banded"])
def test_logits_are_theirs(kernel):
    c, ours, other = pair("gpt2", kernel, **TOY)
    want = other(ids(c)).logits
    assert want.std() > 0.5, "the comparison needs logits that differ"
    torch.testing.assert_close(ours(ids(c)), want, atol=1e-4, rtol=0)


@torch.no_grad()
def test_logits_from_the_cache_are_theirs():
    c, ours, other = pair("gpt2", **TOY)
    cache, want = KVCache(c, 2), other(ids(c)).logits
    got = torch.cat([ours(chunk, cache=cache) for chunk in ids(c).split([30, *[1] * 10], dim=1)], dim=1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_loss_and_gradients_are_theirs():
    c, ours, other = pair("gpt2", **TOY)
    idx = ids(c)
    loss, want = ours(idx[:, :-1], idx[:, 1:]), other(idx, labels=idx).loss
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=0)
    loss.backward()
    want.backward()
    grads = ours_named({name: p.grad for name, p in other.named_parameters()}, c.n_layer)
    for name, p in ours.named_parameters():
        if not name.endswith("c_k.bias"):  # which softmax does not see: rounding is all there is
            assert (p.grad - grads[name]).norm() < 1e-4 * grads[name].norm(), name


@torch.no_grad()
@pytest.mark.parametrize(
    "flag,value",
    [
        ("mlp", "gelu"),
        ("mlp", "relu"),
        ("qk_gain", 1.2),
        ("softcap", 15.0),
        ("softmax", "softmax1"),
        ("window_size", 30),
    ],
)
def test_one_flag_more_is_another_model(flag, value):
    """1e-4 tells GPT-2 from its neighbours, even from the other gelu."""
    changes = {flag: value} | ({"window_pattern": "S"} if flag == "window_size" else {})
    c, ours, other = pair("gpt2", **TOY, **changes)
    assert (ours(ids(c)) - other(ids(c)).logits).abs().max() > 3e-4


# layers, width, heads
PUBLISHED = {
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_size_has_their_tensors(name):
    """Of the published sizes, on the meta device: the same names and shapes, hence the same number of parameters."""
    layers, width, heads = PUBLISHED[name]
    preset = from_preset(InspectConfig, name)
    with torch.device("meta"):
        ours = GPT(gpt_config(preset, preset.vocab_size))
        other = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers, n_embd=width, n_head=heads))
    assert {n: p.shape for n, p in ours_named(other.state_dict(), layers).items()} == {
        n: p.shape for n, p in ours.state_dict().items()
    }
    assert sum(p.numel() for p in ours.parameters()) == other.num_parameters() and ours.config.n_head == heads


@torch.no_grad()
@pytest.mark.slow
def test_logits_of_the_full_size_are_theirs():
    c, ours, other = pair("gpt2", max_seq_len=96)
    assert c.vocab_size == 50257 and c.n_embd == 768
    want = other(ids(c)).logits
    assert want.std() > 0.5
    torch.testing.assert_close(ours(ids(c)), want, atol=1e-4, rtol=0)
