"""Verdicts of the lab against simulated truth, published tables and scipy's distributions."""

import pytest

from nanolab.cli import UserError
from nanolab.lab.stats import minimum_detectable, threshold, verdicts


# nanochat's leaderboard of November 2026: CORE of repeated runs against GPT-2's
@pytest.mark.parametrize(
    ("values", "t", "reached"),
    [
        ((0.25373, 0.2584, 0.25489, 0.2568, 0.25732, 0.26765, 0.25119), 0.3, False),
        ((0.2592, 0.2557, 0.2584), 1.2, False),
    ],
)
def test_a_mean_against_a_bar_as_published(values, t, reached):
    found = threshold(values, above=0.256525)
    assert (round(found.t, 1), found.reached) == (t, reached)


def test_a_number_of_seeds_that_is_no_look_is_refused():
    with pytest.raises(UserError) as error:
        minimum_detectable(4)
    assert (error.value.code, error.value.values) == ("no-look", {"n": 4})


def test_the_same_numbers_are_identical():
    assert [e.verdict for e in verdicts([1, 2, 3], {"a": [1, 2, 3]}, matters=0.1)] == ["identical"]
