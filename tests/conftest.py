"""Shared fixtures: an empty base directory for every test, one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    """NANOLAB_BASE_DIR is a fresh folder: no test reads or writes the user's."""
    path = tmp_path / "base"
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(path))
    return path
