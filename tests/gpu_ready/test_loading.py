"""A model of a run on a GPU that is not there."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from nanolab.model.gpt import GPT
from nanolab.records.models import load_model
from nanolab.runtime import Runtime

spec = importlib.util.spec_from_file_location(
    "nanolab_tests_pretrained", Path(__file__).parents[1] / "training" / "pretrained.py"
)
pretrained = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrained)


@pytest.mark.fault("core likely: SFT compiled before kernels are chosen")
def test_kernels_are_chosen_when_the_model_is_on_its_device(tmp_path, monkeypatch):
    """Not in the first pass, which torch.compile may trace: a kernel is fetched and tried for it."""
    pretrained.pretrain("base", pretrained.write_text(tmp_path / "text"), Runtime(torch.device("cpu"), torch.float32))
    monkeypatch.setattr(GPT, "to", lambda self, device: self)
    model, _, _ = load_model("base", Runtime(torch.device("cuda"), torch.float16))
    assert model.placed == (torch.float16, "cuda") and all(block.attn.core.kernel for block in model.h)
