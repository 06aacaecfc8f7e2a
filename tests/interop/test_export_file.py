"""The exported modelling file: one file that is nanolab's model for every variant, under the interface of
transformers.
"""

import ast
import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from nanolab.cli import to_json
from nanolab.interop import one_file
from nanolab.interop.export import castable
from nanolab.model.gpt import GPT

sys.path.insert(0, str(Path(__file__).parents[1] / "contracts"))
import axes  # noqa: E402
import contracts  # noqa: E402


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The modelling file, imported as a module of its own."""
    path = tmp_path_factory.mktemp("exported") / "modeling_nanolab.py"
    path.write_text(one_file.stitch("nanolab.interop.hf_wrapper", "test"))
    spec = importlib.util.spec_from_file_location("exported_nanolab", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def exported(file, native, dtype=torch.float32):
    model = file.NanolabForCausalLM(file.NanolabConfig(gpt=to_json(native.config)))
    model.gpt.load_state_dict(native.state_dict(), strict=True)
    return model.to(dtype).eval()


def greedy_by_hand(native, idx, n):
    for _ in range(n):
        idx = torch.cat([idx, native(idx)[:, -1:].argmax(-1)], dim=1)
    return idx


# Whole models: the default one with its windows and value embeddings, and what singles do not put together.
WHOLE = {
    "default": dict(value_embeds=True),
    "mla": dict(
        attention="mla",
        positions="rnope",
        softmax="sink",
        document_mask=True,
        bias="qkv,out,mlp,norm,head",
        tied_head=True,
    ),
    "alibi": dict(
        attention="gqa:2", positions="alibi", softmax="softmax1", score_softcap=2.0, qk_norm="l2", norm_gain=True
    ),
    "learned": dict(
        positions="learned",
        qk_norm="layernorm",
        softmax="softmax_n",
        gate="head",
        mlp="swiglu",
        norm="layernorm",
        attention="mqa",
    ),
}
CONFIGS = axes.singles() | {name: axes.config(changes) for name, changes in WHOLE.items()}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def left_padded(rows):
    """(ids, mask) of texts of unequal length, 1 where there is none; the model must not see it."""
    T = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.ones(T - len(row), dtype=torch.int64), row]) for row in rows])
    return ids, torch.stack([(torch.arange(T) >= T - len(row)).long() for row in rows])


PLAIN = dict(do_sample=False, eos_token_id=None, pad_token_id=1)


@torch.no_grad()
def is_the_native_model(file, config):
    """Logits to the bit; greedy text of a batch of unequal prompts as of each alone, without a cache, from the native
    model.
    """
    native = contracts.build(config)
    model, idx = exported(file, native), contracts.tokens(config)
    assert type(model.gpt).__module__ == "exported_nanolab"
    assert torch.equal(model(idx).logits, native(idx))
    ids, mask = left_padded([idx[0, :9], idx[1, :14]])
    got = model.generate(ids, attention_mask=mask, max_new_tokens=4, **PLAIN)
    for row, prompt in zip(got, (idx[:1, :9], idx[1:, :14])):
        assert torch.equal(row[-prompt.size(1) - 4 :], greedy_by_hand(native, prompt, 4)[0])


@pytest.mark.slow
def test_every_variant_is_the_native_model(file, config):
    is_the_native_model(file, config)


@pytest.mark.slow
def test_every_pair_of_variants_is_the_native_model(file):
    for row in axes.rows()[0]:
        is_the_native_model(file, axes.config(axes.settings(row)))


def test_what_is_kept_in_fp32_is_what_the_model_computes_with_in_fp32(file, config):
    """And nothing else of any size: other parameters are cast to the compute dtype at each use."""
    model = GPT(config)
    parts = {name: set(name.split(".")) & file.SCALARS for name, _ in model.named_parameters()}
    cast = castable(model)
    assert all(parts[name] for name in parts if name not in cast)
    assert all(model.get_parameter(name).numel() < 100 for name in parts if parts[name])


def test_a_config_of_an_older_export_is_read(file):
    sink = axes.config(dict(softmax="sink"))
    older = {"normaliser" if name == "softmax" else name: value for name, value in to_json(sink).items()}
    assert file.NanolabConfig(gpt=older).gpt == to_json(sink)


# The rest is about the interface: on the default architecture.


@pytest.fixture(scope="module")
def native():
    return contracts.build(CONFIGS["default"])


@pytest.fixture(scope="module")
def model(file, native):
    return exported(file, native)


@pytest.fixture(scope="module")
def idx(native):
    return contracts.tokens(native.config, B=3)


def test_the_file_needs_torch_and_transformers_alone(file):
    tree = ast.parse(Path(file.__file__).read_text())
    found = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) == {"torch", "transformers"}
    assert list(file.KERNELS) == ["eager", "sdpa", "banded"] and file.PREFERENCE["cuda"] == ("sdpa", "banded", "eager")


@torch.no_grad()
@pytest.mark.parametrize(
    "how", [dict(), dict(use_cache=False), dict(num_beams=1, repetition_penalty=1.0, output_scores=True)], ids=str
)
def test_greedy_text(model, native, idx, how):
    prompt = idx[:, :20]
    got = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, **PLAIN | how)
    assert torch.equal(got, greedy_by_hand(native, prompt, 8))


@torch.no_grad()
def test_sampling_draws_from_the_model(model, native, idx):
    """The same random numbers choose the same tokens from the native model's probabilities."""
    want = prompt = idx[:, :10]
    torch.manual_seed(7)
    got = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        eos_token_id=None,
        pad_token_id=1,
    )
    torch.manual_seed(7)
    for _ in range(6):
        want = torch.cat([want, torch.multinomial((native(want)[:, -1] / 0.7).softmax(-1), 1)], dim=1)
    assert torch.equal(got, want)


@torch.no_grad()
def test_beam_search_reorders_the_cache(model, idx):
    """Of unequal prompts: the same beams as without a cache, which has nothing to reorder, and not the greedy text."""
    ids, mask = left_padded([idx[0, :6], idx[1, :12], idx[2, :12]])
    beams, plain = (
        model.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=4, use_cache=use_cache, **PLAIN)
        for use_cache in (True, False)
    )
    assert torch.equal(beams, plain)
    assert not torch.equal(beams, model.generate(ids, attention_mask=mask, max_new_tokens=8, **PLAIN))


@torch.no_grad()
@pytest.mark.fault("L1")
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_reads_each_token_once(model, idx, beams):
    """The first call reads the prompt; each later one reads one token of each row, whatever transformers calls the
    cache.
    """
    read = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].size(1)), with_kwargs=True
    )
    try:
        model.generate(idx[:1, :4], attention_mask=torch.ones(1, 4), max_new_tokens=5, num_beams=beams, **PLAIN)
    finally:
        hook.remove()
    assert read == [4, 1, 1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param("cache", marks=pytest.mark.fault("L1")), "past_key_values"])
def test_the_cache_has_two_names(model, idx, name):
    """In `forward` and in `prepare_inputs_for_generation`, which passes on the name that came."""
    cache = model(idx[:, :7], use_cache=True).past_key_values
    inputs = model.prepare_inputs_for_generation(idx[:, :9], use_cache=True, **{name: cache})
    assert (
        inputs[name] is cache
        and inputs["input_ids"].tolist() == idx[:, 7:9].tolist()
        and not {"cache", "past_key_values"} - {name} & inputs.keys()
    )
    out = model(**inputs)
    assert out.past_key_values is cache and cache.columns == 9
    torch.testing.assert_close(out.logits, model(idx[:, :9]).logits[:, 7:], atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_text_stops_where_the_rows_end(model, native, idx):
    """As in the Engine; a longer one of the batch stops the others."""
    ids, mask = left_padded([idx[0, :5], idx[1, :20]])
    got = model.generate(ids, attention_mask=mask, max_new_tokens=400, **PLAIN)
    assert got.shape == (2, native.config.sequence_len)
    assert torch.equal(got[1], greedy_by_hand(native, idx[1:2, :20], 12)[0])
    with pytest.raises(
        ValueError, match="a prompt of 32 tokens; this model reads 32, prompt and reply together; shorten the prompt"
    ):
        model.generate(torch.ones(1, 32, dtype=torch.int64), max_new_tokens=1)
    out = model(idx, use_cache=True)
    with pytest.raises(
        ValueError,
        match=(
            "a text of 33 tokens; this model reads 32 at most; shorten it, or generate fewer tokens with max_new_tokens"
        ),
    ):
        model(idx[:, :9], past_key_values=out.past_key_values, use_cache=True)


@torch.no_grad()
def test_a_second_turn_goes_on_from_the_cache(model, native, idx):
    first = model.generate(
        idx[:, :8], attention_mask=torch.ones(3, 8), max_new_tokens=4, return_dict_in_generate=True, **PLAIN
    )
    both = torch.cat([first.sequences, idx[:, 12:18]], dim=1)
    again = model.generate(
        both, attention_mask=torch.ones_like(both), past_key_values=first.past_key_values, max_new_tokens=4, **PLAIN
    )
    assert torch.equal(again, greedy_by_hand(native, both, 4))


@torch.no_grad()
def test_a_second_turn_of_rows_of_unequal_length(model, native, idx):
    """Its mask says what the first one said of the padding; also where a row has ended, whose end and padding are then
    read as text.
    """
    ids, mask = left_padded([idx[0, :5], idx[1, :8]])
    alone = greedy_by_hand(native, idx[:1, :5], 4)[0, 5:]
    end, stays = alone[1].item(), greedy_by_hand(native, idx[1:2, :8], 4)[0]
    assert end not in stays[8:] and end != alone[0]
    first = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True, **PLAIN | {"eos_token_id": end}
    )
    assert first.sequences[0, 8:].tolist() == [alone[0], end, 1, 1] and torch.equal(first.sequences[1], stays)
    both = torch.cat([first.sequences, idx[:2, 12:15]], dim=1)
    ones = torch.ones(2, 7, dtype=torch.int64)
    again = model.generate(
        both,
        attention_mask=torch.cat([mask, ones], dim=1),
        past_key_values=first.past_key_values,
        max_new_tokens=3,
        **PLAIN,
    )
    for row, begins in ((0, 3), (1, 0)):
        assert torch.equal(again[row, begins:], greedy_by_hand(native, both[row : row + 1, begins:], 3)[0])


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda mask: mask[1, 8].fill_(0),
            (
                "attention_mask of row 1 is 0 at tokens that past_key_values has read, or at new ones; expected padding"
                " only where the first call"
            ),
        ),
        (lambda mask: mask[0, 5].fill_(0), "attention_mask of row 0 is 0"),
        (lambda mask: (mask[0, 2].fill_(1), mask[0, 9].fill_(0)), "attention_mask of row 0 is 0"),
        (
            lambda mask: mask.set_(mask[:, 8:].clone()),
            (
                r"attention_mask has the shape \(2, 3\); expected \(2, 11\): what past_key_values has read, and the new"
                r" tokens"
            ),
        ),
    ],
)
def test_what_a_second_turn_cannot_leave_out_is_said(model, idx, change, text):
    """Padding among the new tokens, holes in what was read."""
    ids, mask = left_padded([idx[0, :5], idx[1, :8]])
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    longer = torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], dim=1)
    change(longer)
    with pytest.raises(ValueError, match=text):
        model(idx[:2, 8:11], attention_mask=longer, past_key_values=cache, use_cache=True)
    assert cache.columns == 8 and cache.lengths == [5, 8], "nothing was read"


@torch.no_grad()
def test_padding_on_either_side_changes_no_logit(model, native, idx):
    texts = [idx[0, :7], idx[1, :24], idx[2, :15]]
    ids, mask = left_padded(texts)
    left = model(ids, attention_mask=mask).logits
    flipped, mask_right = (torch.stack([row.roll(len(text) - 24) for row, text in zip(x, texts)]) for x in (ids, mask))
    right = model(flipped, attention_mask=mask_right).logits
    cached = model(ids, attention_mask=mask, use_cache=True).logits
    for row, text in enumerate(texts):
        want = native(text[None])[0]
        for got in (left[row, -len(text) :], right[row, : len(text)], cached[row, -len(text) :]):
            torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@torch.no_grad()
def test_loss_and_last_logits(model, native, idx):
    labels = idx.clone()
    labels[:, :5] = -100
    targets = idx[:, 1:].clone()
    targets[:, :4] = -1
    out = model(idx, labels=labels)
    torch.testing.assert_close(out.loss, native(idx[:, :-1], targets), atol=1e-6, rtol=0)
    assert out.past_key_values is None and torch.equal(model(idx, labels=labels, return_dict=False)[1], out.logits)
    for keep, columns in ((1, [-1]), (3, [-3, -2, -1]), (torch.tensor([2, 0, 9]), [2, 0, 9])):
        torch.testing.assert_close(model(idx, logits_to_keep=keep).logits, out.logits[:, columns], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.fault("L5")
@pytest.mark.parametrize("at_padding", [-100, 7])
def test_the_loss_of_padded_rows_is_that_of_the_rows_alone(model, native, idx, at_padding):
    """The first token of a row that is padded on the left is predicted by padding, and so is the padding after its
    first column.
    """
    texts = [idx[0, :7], idx[1, :24], idx[2, :15]]
    nats = sum(
        torch.nn.functional.cross_entropy(native(text[None])[0, :-1], text[1:], reduction="sum") for text in texts
    )
    ids, mask = left_padded(texts)
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, at_padding)).loss
    torch.testing.assert_close(loss, nats / sum(len(text) - 1 for text in texts), atol=1e-5, rtol=0)
    rows = [torch.stack([row.roll(len(text) - 24) for row, text in zip(x, texts)]) for x in (ids, mask)]
    right = model(rows[0], attention_mask=rows[1], labels=rows[0].masked_fill(rows[1] == 0, -100)).loss
    torch.testing.assert_close(right, loss, atol=1e-5, rtol=0)


def test_gradients_are_the_native_models(model, native, idx):
    native(idx[:, :-1], idx[:, 1:]).backward()
    model(idx, labels=idx).loss.backward()
    for (name, p), q in zip(native.named_parameters(), model.gpt.parameters()):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")
        p.grad = q.grad = None


@pytest.mark.slow
@pytest.mark.fault("S13")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_change_no_gradient(file, config, reentrant):
    """Each block runs again in the backward pass, and only there."""
    model, idx, ran = exported(file, contracts.build(config)).train(), contracts.tokens(config), []
    for block in model.gpt.h:
        block.attn.register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    found = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        ran.clear()
        torch.manual_seed(0)
        loss = model(idx, labels=idx).loss
        assert len(ran) == config.n_layer
        loss.backward()
        assert len(ran) == config.n_layer * (1 + on)
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    (loss, plain), (again, checkpointed) = found
    assert torch.equal(loss, again)
    for (name, _), p, q in zip(model.named_parameters(), plain, checkpointed):
        torch.testing.assert_close(q, p, atol=1e-6, rtol=1e-5, msg=lambda m: f"{name}: {m}")


@pytest.mark.fault("S13")
@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_learn_under_checkpointing(file, native, idx, reentrant):
    """As PEFT asks for it: only some late weights learn, and the embeddings' output is made to need gradients."""
    model, grads = exported(file, native).train(), []
    model.requires_grad_(False)
    learns = model.gpt.h[-1].mlp.c_proj.weight.requires_grad_(True)
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(idx, labels=idx).loss.backward()
        grads.append(learns.grad)
        learns.grad = None
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.fault("S13")
def test_the_base_model_is_what_the_head_reads(model, native, idx):
    base = model.base_model
    assert base is not model and torch.equal(base(input_ids=idx).last_hidden_state, native.hidden(idx))
    assert torch.equal(base(idx, return_dict=False)[0], native.hidden(idx))
    first = base(idx[:, :9], use_cache=True)
    rest = base(idx[:, 9:], use_cache=True, past_key_values=first.past_key_values).last_hidden_state
    torch.testing.assert_close(rest, native.hidden(idx)[:, 9:], atol=2e-5, rtol=0)
    raw = model.get_output_embeddings()(base(idx).last_hidden_state)[..., : native.config.vocab_size]
    cap = model.config.final_logit_softcapping
    torch.testing.assert_close(cap * torch.tanh(raw / cap), model(idx).logits, atol=2e-5, rtol=0)


@torch.no_grad()
def test_saved_and_loaded(file, model, native, idx, tmp_path):
    """To the bit; and in bf16 as the native model computes in bf16, with its learned scalars in fp32."""
    model.save_pretrained(tmp_path)
    assert torch.equal(file.NanolabForCausalLM.from_pretrained(tmp_path)(idx).logits, native(idx))
    half = file.NanolabForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    same = contracts.build(native.config, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.gpt.lambdas.resid.dtype == torch.float32
    assert torch.equal(half(idx).logits, same(idx))
    text = half.generate(idx[:, :9], attention_mask=torch.ones(3, 9), max_new_tokens=4, **PLAIN)
    assert text.shape == (3, 13)


@torch.no_grad()
def test_the_slopes_of_alibi_survive_loading_and_casting(file, idx, tmp_path):
    """They are in no file, and transformers gives empty memory to what is in none."""
    native = contracts.build(CONFIGS["alibi"])
    exported(file, native).save_pretrained(tmp_path)
    loaded = file.NanolabForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(idx).logits, native(idx))
    half = file.NanolabForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    slopes = native.positions.slopes_H
    for model in (
        half,
        loaded.to(torch.bfloat16),
        loaded.double(),
        loaded.to_empty(device="meta").to_empty(device="cpu"),
    ):
        assert model.gpt.positions.slopes_H.dtype == torch.float32 and torch.equal(model.gpt.positions.slopes_H, slopes)
    assert not [name for name in native.state_dict() if "slopes" in name]


def test_a_new_model_of_a_config_is_initialised(file, native, idx):
    loss = file.NanolabForCausalLM(file.NanolabConfig(gpt=to_json(native.config)))(idx, labels=idx.roll(1)).loss
    assert abs(loss.item() - math.log(native.config.vocab_size)) < 0.3


HOLE = torch.tensor([[1, 1, 0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda m, ids: m(ids, attention_mask=HOLE),
            "attention_mask of row 0 is not one piece of 1s; expected a text with padding before or behind it",
        ),
        (lambda m, ids: m(ids, attention_mask=0 * HOLE), "attention_mask of row 0 is not one piece"),
        (
            lambda m, ids: m(ids, attention_mask=HOLE[:, :3]),
            r"has the shape \(1, 3\); expected that of input_ids, \(1, 6\)",
        ),
        (
            lambda m, ids: m.generate(
                ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]), max_new_tokens=2, pad_token_id=1
            ),
            "ends in 0: a text cannot go on behind its padding",
        ),
        (lambda m, ids: m(inputs_embeds=torch.zeros(1, 6, 32)), "inputs_embeds is not offered"),
        (lambda m, ids: m(ids, output_hidden_states=True), "output_hidden_states is not offered"),
        (lambda m, ids: m(), "input_ids is missing"),
        (lambda m, ids: m(ids, labels=ids, logits_to_keep=2), "labels of 6 tokens for logits of 2"),
        (lambda m, ids: m.generate(ids, assistant_model=m, max_new_tokens=2), "not supported with stateful models"),
    ],
)
def test_what_it_cannot_do_is_said(model, idx, call, text):
    with pytest.raises(ValueError, match=text):
        call(model, idx[:1, :6])


def test_resizing_is_refused(model):
    with pytest.raises(
        NotImplementedError, match="resize_token_embeddings: the tables of this model have 61 tokens and keep them"
    ):
        model.resize_token_embeddings(70)


A = "from nanolab.b import f\n\n\ndef main(x):\n    return f(x)\n"


def test_only_what_is_read_is_stitched():
    """Text as it stands, with its comments; what nobody reads stays behind, and so do tables' lines of omitted
    modules.
    """
    b = (
        '"""Doubling."""\nimport math\nimport os\nfrom typing import Callable\nfrom nanolab.model.kernels import flex\n'
        "# why two\nTWO = 2  # a pair\nUNREAD = os.name\nTABLE = {\n    'a': TWO,\n    'b': flex.run,\n    'c':"
        " math.pi,\n    'd': flex.run,\n}\nORDER = {'x': ('b', 'a', 'd', 'c', 'd'), 'y': ['b']}\ndef f(x: Callable) ->"
        " int:\n    math = 3  # its own\n    return TABLE['a'] * x + len(ORDER['x']) * 0\n"
    )
    text = one_file.stitch("nanolab.a", "head", {"nanolab.a": A, "nanolab.b": b})
    assert text.startswith('"""head"""\n\nimport math\nfrom collections.abc import Callable\n')
    assert (
        "# nanolab/b.py: Doubling.\n" in text
        and "# why two\nTWO = 2  # a pair" in text
        and "UNREAD" not in text
        and "flex" not in text
    )
    space = {}
    exec(text, space)
    assert (
        space["main"](21) == 42
        and space["TABLE"] == {"a": 2, "c": math.pi}
        and space["ORDER"] == {"x": ("a", "c"), "y": []}
    )


@pytest.mark.parametrize(
    ("b", "text"),
    [
        ("def f(x):\n    return main(x)\ndef main(x): pass\n", "main is defined in nanolab.b and in nanolab.a"),
        (
            "from math import sin as main\ndef f(x):\n    return main(x)\n",
            "main is defined in nanolab.a and is elsewhere from math import sin as main",
        ),
        ("def len(x): pass\ndef f(x):\n    return len(x)\n", "len, defined in nanolab.b, is a name of Python's own"),
        ("from nanolab.c import g as h\ndef f(x):\n    return h(x)\n", "imports g under the name h"),
        ("import nanolab.c\ndef f(x):\n    return nanolab.c.g(x)\n", "imports nanolab.c as a whole"),
        (
            "from nanolab.model.kernels import fa3\ndef f(x):\n    return fa3.run(x)\n",
            "reads fa3, which one file does not have",
        ),
        (
            "from nanolab.c import g\nfrom math import pi\ndef f(x):\n    return g(pi)\n",
            "pi is from cmath import pi and, in nanolab.b, from math import pi",
        ),
    ],
)
def test_what_would_mean_something_else_is_refused(b, text):
    c = "from cmath import pi\ndef g(x):\n    return pi\n"
    with pytest.raises(ValueError, match=re.escape(text)):
        one_file.stitch("nanolab.a", texts={"nanolab.a": A, "nanolab.b": b, "nanolab.c": c})
