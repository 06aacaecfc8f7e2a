"""What the formatter, the linter and the type checker say; pyproject.toml holds their settings."""

import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.parametrize(
    "command", ["ruff format --check", "ruff check", f"pyrefly check --python-interpreter-path {sys.executable}"]
)
def test_no_complaints(command):
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
