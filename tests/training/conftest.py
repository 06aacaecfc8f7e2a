"""Fixtures for tests with several ranks."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_ranks():
    """A function (fn, world_size, *args) -> results of fn(runtime, *args) by rank, on gloo processes of this machine."""
    spec = importlib.util.spec_from_file_location("nanolab_tests_distributed", Path(__file__).parents[1] / "distributed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run_ranks
