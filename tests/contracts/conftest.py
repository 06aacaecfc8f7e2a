"""Lets the contract tests import their shared modules (axes, contracts, covering), with pytest's messages for their
asserts.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("contracts")
