"""pass@k against enumeration, Wilson's interval against its definition and published values, paired differences by hand
and by simulation.
"""

import itertools
import math
import random

import pytest

from nanolab.evals.score import Graded, paired, pass_at_k, readable_turn, summary, wilson


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_reply(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_stays_exact_for_many_replies():
    assert pass_at_k(5000, 1, 1) == pytest.approx(1 / 5000)
    assert pass_at_k(5000, 2500, 1000) == 1.0


# R. G. Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3
@pytest.mark.parametrize(
    "right, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_published_values(right, n, low, high):
    assert wilson(right / n, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("p, n", [(0.0, 1), (1.0, 1), (0.5, 7), (0.93, 400), (0.123, 50)])
def test_the_ends_of_wilsons_interval_are_just_not_rejected(p, n):
    """|p - e| = 1.96 standard errors at e, for each end e that is not the end of the scale."""
    for end in wilson(p, n):
        assert 0 <= end <= 1
        if 0 < end < 1:
            assert abs(p - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-6)
    low, high = wilson(p, n)
    assert low <= p <= high and low < high


def test_a_summary_counts_every_problem():
    """Three problems, one of them unread, two replies each: by hand."""
    replies = [
        Graded(7, 1, "b", True, True),
        Graded(7, 0, "a", False, True),
        Graded(3, 0, "c", True, False),
        Graded(3, 1, "d", True, True),
    ]
    result = summary("t", [3, 5, 7], 2, replies)
    assert (result.task, result.n, result.k, result.too_long) == ("t", 3, 2, 1)
    assert result.pass_at == pytest.approx({1: (1 + 0 + 0.5) / 3, 2: (1 + 0 + 1) / 3})
    assert result.accuracy == result.pass_at[1] and result.interval == wilson(0.5, 3)
    assert result.intervals[2] == wilson(result.pass_at[2], 3)
    assert [(r.index, r.sample) for r in result.replies] == [(3, 0), (3, 1), (7, 0), (7, 1)]
    assert result.outcomes == [1.0, 0.0, 0.5]


def pairs(both: int, lost: int, won: int, neither: int) -> tuple[list[int], list[int]]:
    """(before, after) with these counts."""
    return [1] * (both + lost) + [0] * (won + neither), [1] * both + [0] * lost + [1] * won + [0] * neither


@pytest.mark.parametrize(
    "counts, difference, low, high",
    [
        ((1, 1, 7, 12), 6 / 21, 0.0134, 0.5084),  # 2/23, 8/23: 6/23 +- z sqrt((10/23 - 36/529) / 23) = .26087 +- .24749
        ((40, 0, 0, 60), 0.0, -0.0272, 0.0272),  # 1/102 twice: +- 1.96 sqrt(2/102 / 102)
        ((0, 3, 0, 0), -1.0, -1.0, 0.1012),  # 4/5, 1/5: -.6 +- z sqrt((1 - .36) / 5) = -.6 +- .70122, cut at -1
    ],
)
def test_paired_outcomes_by_hand(counts, difference, low, high):
    mean, interval = paired(*pairs(*counts))
    assert mean == pytest.approx(difference) and interval == pytest.approx((low, high), abs=5e-5)


def test_paired_is_antisymmetric_and_order_of_problems_does_not_matter():
    before, after = pairs(5, 2, 9, 4)
    mean, (low, high) = paired(before, after)
    back, (back_low, back_high) = paired(after, before)
    assert (back, back_low, back_high) == pytest.approx((-mean, -high, -low))
    assert paired(before[::-1], after[::-1]) == (mean, (low, high))


def test_paired_shares_by_hand():
    """Differences .5, 0, .25, .25: mean .25, s = sqrt(.125 / 3)."""
    mean, (low, high) = paired([0.0, 0.5, 0.25, 0.75], [0.5, 0.5, 0.5, 1.0])
    half = 1.959964 * math.sqrt(0.125 / 3) / 2
    assert (mean, low, high) == pytest.approx((0.25, 0.25 - half, 0.25 + half), rel=1e-6)
    assert paired([0.5], [0.75]) == (0.25, (-1.0, 1.0))  # one difference says nothing of its spread


@pytest.mark.parametrize("n, both, lost, won", [(20, 0.3, 0.1, 0.3), (100, 0.85, 0.02, 0.1), (200, 0.5, 0.15, 0.15)])
def test_paired_intervals_hold_the_true_difference_as_often_as_they_say(n, both, lost, won):
    rng = random.Random(n)
    weights, cells = (both, lost, won, 1 - both - lost - won), ((1, 1), (1, 0), (0, 1), (0, 0))
    held = 0
    for _ in range(2000):
        _, (low, high) = paired(*zip(*rng.choices(cells, weights, k=n)))
        held += low <= won - lost <= high
    assert 0.935 <= held / 2000 <= 0.985  # 0.95 +- 3 standard errors, and conservative where n is small


def test_paired_intervals_of_shares_hold_the_true_difference_as_often_as_they_say():
    rng, held = random.Random(1), 0
    for _ in range(1000):
        hard = [rng.random() for _ in range(100)]
        before, after = (
            [sum(rng.random() < p + gain * (1 - p) for _ in range(4)) / 4 for p in hard] for gain in (0, 0.2)
        )
        _, (low, high) = paired(before, after)
        held += low <= 0.1 <= high  # the mean of 0.2 (1 - p)
    assert 0.925 <= held / 1000 <= 0.97


def test_paired_needs_the_same_problems():
    with pytest.raises(ValueError, match="shorter"):
        paired([1, 0], [1])


def test_a_turn_is_readable():
    call = [
        {"type": "python", "text": "12+34"},
        {"type": "python_output", "text": "46"},
        {"type": "text", "text": " It is 46. "},
    ]
    assert readable_turn(call, "calculator") == "[calculator: 12+34 = 46]  It is 46."
    assert readable_turn([{"type": "text", "text": "So "}, *call[:1]]) == "So [python: 12+34]"
    assert readable_turn([*call[:2], *call[:2]], "c") == "[c: 12+34 = 46] [c: 12+34 = 46]"
    assert readable_turn("plain") == "plain"
