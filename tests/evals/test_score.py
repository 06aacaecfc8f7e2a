"""pass@k against enumeration, Wilson's interval against its definition and published values."""

import itertools
import math

import pytest

from nanolab.evals.score import Graded, pass_at_k, summary, wilson


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
@pytest.mark.parametrize("right, n, low, high", [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
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
    replies = [Graded(7, 1, "b", True, True), Graded(7, 0, "a", False, True), Graded(3, 0, "c", True, False), Graded(3, 1, "d", True, True)]
    result = summary("t", [3, 5, 7], 2, replies)
    assert (result.task, result.n, result.k, result.too_long) == ("t", 3, 2, 1)
    assert result.pass_at == pytest.approx({1: (1 + 0 + 0.5) / 3, 2: (1 + 0 + 1) / 3})
    assert result.accuracy == result.pass_at[1] and result.interval == wilson(0.5, 3)
    assert result.intervals[2] == wilson(result.pass_at[2], 3)
    assert [(r.index, r.sample) for r in result.replies] == [(3, 0), (3, 1), (7, 0), (7, 1)]
