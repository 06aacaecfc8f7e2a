"""Every pair of values of two axes that may go together, in about a hundred tiny models; under `slow`, random ones of
any order.
"""

import dataclasses
import random

import axes
import contracts
import pytest

from nanolab.cli import UserError
from nanolab.model.kernels import banded

TABLE = {axis: list(values) for axis, values in axes.axes().items()}
ROWS, _ = axes.rows()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The rows of these tests fit into one block of the banded kernel; now they are three."""
    monkeypatch.setattr(banded, "BLOCK", 8)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=map(axes.row_id, ROWS))
def test_pairs(row):
    contracts.fast(axes.config(axes.settings(row)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_random_combinations(seed):
    """Any values together, in any shape of model: refused before it is built, or everything holds."""
    rng = random.Random(seed)
    row = {axis: rng.choice(values) for axis, values in TABLE.items()}
    try:
        config = axes.config(axes.settings(row))
    except UserError:
        return
    n_layer, n_head, head_dim, vocab_size = (
        rng.choice([1, 2, 3, 5]),
        rng.choice([2, 4, 6]),
        rng.choice([16, 18, 20]),
        rng.choice([61, 64, 100]),
    )
    contracts.fast(
        dataclasses.replace(config, n_layer=n_layer, n_head=n_head, n_embd=n_head * head_dim, vocab_size=vocab_size)
    )
