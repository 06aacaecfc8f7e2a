"""The covering array covers, the axes are all there, and what cannot go together is refused."""

import dataclasses
import itertools
import random

import pytest
import torch

import axes
import contracts
from covering import covering_rows, every_pair
from nanolab.config import Architecture, UserError
from nanolab.model import variants

TOY = {"a": ["1", "2", "3"], "b": ["1", "2", "3", "4"], "c": ["1", "2"], "d": ["1", "2", "3"], "e": ["1", "2"]}


def not_all_alike(row):
    return not (row.get("a") == "3" and row.get("b") in ("1", "4")) and not (row.get("c") == "2" and row.get("d") == "2")


def pairs_in(rows):
    return {frozenset(pair) for row in rows for pair in itertools.combinations(row.items(), 2)}


@pytest.mark.parametrize("allowed", [lambda row: True, not_all_alike], ids=["free", "with refusals"])
def test_a_toy_array_covers_what_is_allowed(allowed):
    """By hand: 12 + 6 + 9 + 6 + 8 + 12 + 8 + 6 + 4 + 6 pairs, of which a3b1, a3b4 and c2d2 are refused."""
    rows, refused = covering_rows(TOY, allowed)
    assert len(every_pair(TOY)) == 77
    assert all(list(row) == sorted(TOY) and all(row[axis] in TOY[axis] for axis in TOY) and allowed(row) for row in rows)
    assert len(refused) == (0 if allowed({"a": "3", "b": "1"}) else 3)
    assert pairs_in(rows) == set(every_pair(TOY)) - set(refused)
    assert 12 <= len(rows) <= 16, "12 pairs of a and b need a row each; a greedy array takes few more"
    assert (rows, refused) == covering_rows(TOY, allowed), "the same every time"


def test_a_refusal_of_three_values_is_not_hidden():
    """Alone c1 and d1 may go together, in no row they do."""
    with pytest.raises(ValueError, match="depends on more than two values"):
        covering_rows(TOY, lambda row: not (row.get("c") == row.get("d") == "1" and "a" in row))


def test_every_pair_of_values_is_in_a_row_or_refused():
    """Counted by brute force. A refused pair is refused also with everything else at random; a value alone never is."""
    table = {axis: list(values) for axis, values in axes.axes().items()}
    rows, refused = covering_rows(table, axes.allowed)
    assert all(set(row) == set(table) and axes.allowed(row) for row in rows)
    wanted = {frozenset([(a, x), (b, y)]) for a, b in itertools.combinations(table, 2) for x in table[a] for y in table[b]}
    assert pairs_in(rows) == wanted - set(refused)
    rng = random.Random(0)
    for pair in refused:
        for _ in range(20):
            assert not axes.allowed({axis: rng.choice(values) for axis, values in table.items()} | dict(pair)), pair
    assert all(axes.allowed({axis: value}) for axis, values in table.items() for value in values)


def flag(name):
    return "--" + name.replace("_", "-")


def test_a_refused_pair_names_both_flags():
    table = axes.axes()
    _, refused = covering_rows({axis: list(values) for axis, values in table.items()}, axes.allowed)
    assert refused
    for pair in refused:
        with pytest.raises(UserError) as error:
            axes.config(axes.settings(dict(pair)))
        for axis, value in pair:
            names = {flag(name) for name in table[axis][value]} | {flag("no_" + name) for name in table[axis][value]}
            assert any(name in str(error.value) for name in names), (pair, str(error.value))


def test_every_field_and_entry_is_on_an_axis():
    assert not axes.uncovered(), (
        f"no contract test sets {axes.uncovered()} to two values: in tests/contracts/axes.py add a line to NUMBERS, or to MORE where only one entry "
        f"of a table reads it"
    )


def test_a_new_number_is_missed_and_a_new_entry_is_found(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Later(Architecture):
        new_number: float = 1.0

    assert axes.uncovered(Later) == ["new_number"]
    table = variants.AXES["mlp"]

    class Throwaway(table["relu"]):
        """W2 (-max(0, W1 x)). Of no paper."""

        @staticmethod
        def activation(x):
            return -x.relu()

    monkeypatch.setitem(table, "throwaway", Throwaway)
    assert "mlp=throwaway" in axes.singles() and "mlp=throwaway" in axes.axes()["mlp"] and not axes.uncovered()
    contracts.fast(axes.config({"mlp": "throwaway"}))


def test_an_entry_that_breaks_a_contract_fails(monkeypatch):
    """The contracts are seen failing, each by a variant that breaks just that."""
    table = variants.AXES["mlp"]

    class Peeks(table["relu"]):
        def forward(self, x):
            return super().forward(x + x.flip(1))

    class Draws(table["relu"]):
        def forward(self, x):
            return super().forward(x * (1 + x.new_empty(1).uniform_(-0.1, 0.1)))

    class Adds(table["relu"]):
        def __init__(self, c):
            super().__init__(c)
            self.unused = torch.nn.Parameter(torch.empty(c.n_embd))

        def forward(self, x):
            return super().forward(x) + 0 * self.unused

    class Idles(Adds):
        def init_constants(self):
            self.unused.zero_()

    for broken, check, message in (
        (Peeks, contracts.causal, "changed an earlier logit"),
        (Peeks, contracts.cache_equals_forward, "chunks"),
        (Draws, contracts.drops_only_in_training, "equal"),
        (Adds, contracts.init_fills, "unused"),
        (Idles, contracts.counts, "parameters"),
        (Idles, lambda c: contracts.kernels_agree(c, []), "no gradient in 100% of h.0.mlp.unused"),
    ):
        monkeypatch.setitem(table, "broken", broken)
        with pytest.raises(AssertionError, match=message):
            check(axes.config({"mlp": "broken"}))
