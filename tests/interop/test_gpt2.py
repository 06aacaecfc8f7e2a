"""GPT-2 both ways: the logits of transformers' own model, bit-equal round trips, and what is refused."""

import dataclasses

import pytest
import torch
import transformers

from nanolab.cli import UserError, from_preset
from nanolab.interop import gpt2
from nanolab.model.config import GPTConfig, InspectConfig
from nanolab.model.gpt import GPT
from nanolab.training.schedule import gpt_config

# width = rows = vocabulary: every matrix but those of the MLP is square, and so are the tables
SQUARE = dict(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=32)
SHAPES = [SQUARE, dict(n_layer=3, n_head=4, n_embd=48, n_positions=40, vocab_size=131)]


def theirs(dtype=torch.float32, **settings):
    """Their model, in eval mode, every weight moved off its initial value."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, attn_implementation="eager")).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.15)
    return model.to(dtype)


def ours(other) -> GPT:
    c = gpt2.config_from_hf(other.config.to_dict())
    model = GPT(c, other.dtype).to(other.dtype).eval()
    model.load_state_dict(gpt2.from_hf(other.state_dict(), c), strict=True)
    return model


def ids(c):
    return torch.randint(c.vocab_size, (2, c.n_positions), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", SHAPES)
@pytest.mark.parametrize("dtype,atol", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_the_logits_are_theirs(dtype, atol, settings, tied):
    other = theirs(dtype, **settings, tie_word_embeddings=tied)
    want = other(ids(other.config)).logits
    assert want.std() > 0.5
    torch.testing.assert_close(ours(other)(ids(other.config)), want, atol=atol, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", SHAPES)
def test_out_and_in_again_is_bit_equal(settings, tied, tmp_path):
    """What transformers saves, through our model, is what transformers saves."""
    other = theirs(**settings, tie_word_embeddings=tied)
    other.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    got = gpt2.to_hf(ours(other).state_dict(), gpt2.config_from_hf(other.config.to_dict()))
    assert got.keys() == saved.keys() and all(torch.equal(got[name], saved[name]) for name in saved)
    assert all(tensor.is_contiguous() for tensor in got.values())


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"tied_head": False, "pad_vocab_to": 64}])
def test_a_model_of_ours_is_one_of_theirs(changes):
    preset = from_preset(InspectConfig, "gpt2", depth=2, aspect_ratio=16, head_dim=16, max_seq_len=32, vocab_size=70)
    c = dataclasses.replace(gpt_config(preset, 70, bos=61), **changes)
    model = GPT(c).eval()
    model.init_weights(0)
    model.wte.weight.mul_(20)
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2.config_to_hf(c))).eval()
    out = gpt2.to_hf({f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}, c)
    loaded = other.load_state_dict(out, strict=False)
    assert (
        not loaded.unexpected_keys
        and set(loaded.missing_keys) <= {"lm_head.weight"}
        and (other.config.bos_token_id, other.config.eos_token_id) == (61, 61)
    )
    other.tie_weights()
    idx = torch.randint(70, (2, 32), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(idx), other(idx).logits, atol=1e-4, rtol=0)
    assert c == dataclasses.replace(gpt2.config_from_hf(other.config.to_dict()), bos=61, **changes)
    back = gpt2.from_hf(out, c)
    assert all(
        torch.equal(
            back[name][:70] if "wte" in name or "head" in name else back[name],
            tensor[:70] if "wte" in name or "head" in name else tensor,
        )
        for name, tensor in model.state_dict().items()
    )
    GPT(c).load_state_dict(back, strict=True)


def test_names_of_other_wrappers_and_of_old_versions():
    other = theirs(**SQUARE)
    c, state = gpt2.config_from_hf(other.config.to_dict()), other.state_dict()
    want = gpt2.from_hf(state, c)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32).tril(),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
    }
    for spelled in (bare, compiled, state | masks, bare | {"h.0.attn.bias": masks["transformer.h.0.attn.bias"]}):
        got = gpt2.from_hf(spelled, c)
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.fault("L8")
@torch.no_grad()
def test_a_tied_table_may_be_under_either_name(tmp_path):
    """transformers reads such a file, and so do we."""
    from safetensors.torch import load_file, save_file

    other = theirs(**SQUARE)
    other.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    c, state = gpt2.read_folder(tmp_path)
    model = GPT(c).eval()
    model.load_state_dict(state, strict=True)
    torch.testing.assert_close(model(ids(other.config)), again(ids(other.config)).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change,says",
    [
        (lambda s: s.pop("transformer.h.1.mlp.c_fc.bias"), r"lack transformer\.h\.1\.mlp\.c_fc\.bias;"),
        (
            lambda s: s.update({"multiple_choice_head.summary.weight": torch.ones(1)}),
            "hold multiple_choice_head.summary.weight",
        ),
        (
            lambda s: s.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(128, 32)}),
            r"h\.0\.mlp\.c_fc\.weight has the shape \(128, 32\); expected \(32, 128\)",
        ),
        (lambda s: s.update({"lm_head.weight": torch.ones(32, 32)}), "lm_head.weight differs from wte.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, says):
    other = theirs(**SQUARE)
    state = dict(other.state_dict())
    change(state)
    with pytest.raises(UserError, match=says):
        gpt2.from_hf(state, gpt2.config_from_hf(other.config.to_dict()))


@pytest.mark.parametrize(
    "setting,value",
    [
        ("activation_function", "gelu"),
        ("n_inner", 100),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
    ],
)
def test_settings_that_gpt2_does_not_have_are_named(setting, value):
    config = transformers.GPT2Config(**SQUARE).to_dict()
    assert gpt2.config_from_hf(config | {"n_inner": 128, "activation_function": "gelu_pytorch_tanh"}).n_embd == 32
    with pytest.raises(UserError, match=f"{setting} {value!r}"):
        gpt2.config_from_hf(config | {setting: value})


def test_other_families_and_silent_configs_are_named():
    with pytest.raises(UserError, match="is of a 'llama' model"):
        gpt2.config_from_hf({"model_type": "llama"})
    with pytest.raises(UserError, match="does not say n_positions, n_head;"):
        gpt2.config_from_hf({"model_type": "gpt2", "vocab_size": 10, "n_layer": 2, "n_embd": 32})


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_the_presets_are_gpt2(name):
    preset = from_preset(InspectConfig, name)
    c = gpt_config(preset, preset.vocab_size)
    assert gpt2.is_gpt2(c) == "" and gpt2.config_from_hf(gpt2.config_to_hf(c)) == c


ALIKE = dict(
    rope_base=10.0,
    mla_kv_rank=7,
    softmax_n=3.0,
    embed_dropout=0.1,
    init="normal02",
    pad_vocab_to=64,
    bos=3,
    tied_head=False,
    window_pattern="SL",
    window_size=1024,
)
OTHER = dict(
    positions="rope",
    attention="gqa:2",
    softmax="softmax1",
    gate="head",
    qk_norm="rms",
    qk_gain=1.2,
    score_softcap=30.0,
    document_mask=True,
    value_embeds=True,
    residual_scalars=True,
    smear=True,
    backout=True,
    embed_norm=True,
    mlp="gelu",
    norm="rms",
    norm_gain=False,
    bias="qkv,out,mlp",
    softcap=15.0,
    window_pattern="SL",
)


def test_what_is_not_gpt2_is_named():
    preset = from_preset(InspectConfig, "gpt2")
    c = dataclasses.replace(gpt_config(preset, preset.vocab_size), bos=0)
    assert gpt2.is_gpt2(dataclasses.replace(c, **ALIKE)) == ""
    for flag, value in OTHER.items():
        assert f"{flag} {value}" in gpt2.is_gpt2(dataclasses.replace(c, **{flag: value})), flag
    assert "positions rope" in gpt2.is_gpt2(GPTConfig()) and "softcap 15.0" in gpt2.is_gpt2(GPTConfig())
