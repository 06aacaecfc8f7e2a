"""Shared fixtures: an empty base directory for every test, one thread."""

import functools
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import ranks
import warm
from _pytest.assertion import rewrite

gc.disable()  # until the tests are collected: all of it stays

# The files that take longest, begun first: a process that gets one of them last would finish long after the others.
LONGEST = (
    "tests/test_readme.py",
    "tests/contracts",
    "tests/browser",
    "tests/training",
    "tests/interop",
    "tests/test_flags.py",
    "tests/inference",
)


def pytest_addoption(parser):
    parser.addoption(
        "--fault", default="", help="only tests of these entries of dev/results/faults.md, joined by commas"
    )


def pytest_collection_modifyitems(config, items):
    only = set(filter(None, config.getoption("--fault").split(",")))
    for item in items:
        # read by dev/faults.py
        item.user_properties += [("fault", name) for mark in item.iter_markers("fault") for name in mark.args]
    if only:
        other = [
            item for item in items if not only & {value for name, value in item.user_properties if name == "fault"}
        ]
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item not in other]
    items.sort(
        key=lambda item: next((i for i, name in enumerate(LONGEST) if item.nodeid.startswith(name)), len(LONGEST))
    )


def pytest_xdist_setupnodes(config, specs):
    """The workers are forks of a server, share another for their processes, and find the asserts of all files rewritten
    (by functions of pytest that are not public): each would import and write the same.
    """
    workers, os.environ[warm.SHARED] = warm.executable(*warm.WORKERS), str(warm.executable())
    for spec in specs:
        spec.python = str(workers)
    for path in Path(__file__).parent.rglob("test_*.py"):
        kept = rewrite.get_cache_dir(path) / (path.stem + rewrite.PYC_TAIL)
        if not sys.dont_write_bytecode and rewrite._read_pyc(path, kept) is None:
            kept.parent.mkdir(exist_ok=True)
            source, code = rewrite._rewrite_test(path, config)
            rewrite._write_pyc(config.stash[rewrite.assertstate_key], code, source, kept)


def pytest_collection_finish():
    """The speed of this machine, which a base directory holds, is measured once for all of them."""
    gc.enable()
    gc.freeze()
    if runtime := sys.modules.get("nanolab.runtime"):
        runtime._measure_gflops = functools.cache(runtime._measure_gflops)


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    """NANOLAB_BASE_DIR is a fresh folder: no test reads or writes the user's."""
    path = tmp_path / "base"
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(path))
    return path


@pytest.fixture(scope="session")
def run_ranks():
    """A function (fn, world_size, *args) -> results of fn(runtime, *args) by rank, on gloo processes of this
    machine.
    """
    return ranks.run_ranks


@pytest.fixture(scope="session")
def transformers_python(tmp_path_factory):
    """A `python` that has imported transformers, in the environment that an export is read in, and nothing of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        names = "auto.modeling_auto", "auto.tokenization_auto", "gpt2.modeling_gpt2"
        return warm.executable("safetensors.torch", *(f"transformers.models.{name}" for name in names))


@pytest.fixture
def exports_read_warm(transformers_python, monkeypatch):
    """The process that reads an export begins as a fork."""
    monkeypatch.setattr(sys, "executable", str(transformers_python))


@pytest.fixture
def make_gpt():
    """A function (config, **GPT arguments) -> GPT with every weight moved off its initial value.

    At initialisation the projections into the residual stream, the smear weight and the gates' effects are zero, so
    that a fresh model would hide most mistakes."""
    import torch

    from nanolab.model.gpt import GPT

    def make(config, seed: int = 0, scale: float = 0.05, **arguments):
        model = GPT(config, **arguments)
        model.init_weights(seed)
        g = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(scale * torch.randn(p.shape, generator=g))
            if config.smear:
                model.smear.scale.add_(0.7)
        return model

    return make


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> Path:
    """A folder for base directories to point to: what a test builds there, all processes of this pytest find."""
    temporary = tmp_path_factory.getbasetemp()
    folder = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "corpora"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def in_checkout(tmp_path_factory):
    """A function (bash text, **environment) -> CompletedProcess, run in a copy of this tree with a base directory of
    its own.

    One copy for all tests of a file; its folder is the function's `.path`, the base directory its `.base`.
    """
    root, folder = Path(__file__).parents[1], tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns(
        ".git", ".venv", ".venv-newest", "*.egg-info", "*.pyc.*", ".pytest_cache", ".hypothesis", "report.md"
    )
    path, base = shutil.copytree(root, folder / "nanolab", ignore=ignore), folder / "base"
    python = warm.executable(root=path)

    def run(text: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
        env = (
            os.environ
            | {
                "PATH": f"{python.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(path),
                "NANOLAB_PYTHON": str(python),
                "NANOLAB_BASE_DIR": str(base),
                "NANOLAB_SCALE": "toy",
                "PYTEST_ADDOPTS": "",  # those of this run are not for a run inside
            }
            | environment
        )
        command = ["bash", "-euo", "pipefail", "-c", text]
        return subprocess.run(
            command, cwd=path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )

    run.path, run.base = path, base
    return run
