"""The exported modelling file: one file that is nanolab's model for every variant, under the interface of transformers."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from nanolab.config import to_json
from nanolab.interop import one_file

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


@pytest.fixture(params=axes.singles())
def config(request):
    return axes.singles()[request.param]


def left_padded(rows):
    """(ids, mask) of texts of unequal length, 1 where there is none; the model must not see it."""
    T = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.ones(T - len(row), dtype=torch.int64), row]) for row in rows])
    return ids, torch.stack([(torch.arange(T) >= T - len(row)).long() for row in rows])


PLAIN = dict(do_sample=False, eos_token_id=None, pad_token_id=1)


@torch.no_grad()
def test_every_variant_is_the_native_model(file, config):
    """Logits to the bit; greedy text of a batch of unequal prompts as of each alone, without a cache, from the native model."""
    native = contracts.build(config)
    model, idx = exported(file, native), contracts.tokens(config)
    assert type(model.gpt).__module__ == "exported_nanolab"
    assert torch.equal(model(idx).logits, native(idx))
    ids, mask = left_padded([idx[0, :9], idx[1, :14]])
    got = model.generate(ids, attention_mask=mask, max_new_tokens=4, **PLAIN)
    for row, prompt in zip(got, (idx[:1, :9], idx[1:, :14])):
        assert torch.equal(row[-prompt.size(1) - 4 :], greedy_by_hand(native, prompt, 4)[0])
