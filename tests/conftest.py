"""Shared fixtures: an empty base directory for every test, one thread."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    """NANOLAB_BASE_DIR is a fresh folder: no test reads or writes the user's."""
    path = tmp_path / "base"
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(path))
    return path


@pytest.fixture(scope="session")
def run_ranks():
    """A function (fn, world_size, *args) -> results of fn(runtime, *args) by rank, on gloo processes of this machine."""
    spec = importlib.util.spec_from_file_location("nanolab_tests_distributed", Path(__file__).parent / "distributed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run_ranks


@pytest.fixture
def make_gpt():
    """A function (config, **GPT arguments) -> GPT with every weight moved off its initial value.

    At initialisation the projections into the residual stream, the smear weight and the gates' effects are zero, so that
    a fresh model would hide most mistakes.
    """
    import torch

    from nanolab.model.gpt import GPT

    def make(config, seed: int = 0, scale: float = 0.05, **arguments):
        model = GPT(config, **arguments)
        model.init_weights(seed)
        g = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(scale * torch.randn(p.shape, generator=g))
            model.smear_lambda.add_(0.7)
        return model

    return make
