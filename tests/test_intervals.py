"""Intervals and tests: worked by hand, against formulas where one exists, and right as often as they say."""

import itertools
import math

import numpy as np
import pytest

from cvlib import intervals


def test_for_a_mean_the_bootstrap_is_the_standard_error():
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = intervals.ratio(values, [1] * 400, draws=4000)
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(400), rel=0.06)


def test_rows_weigh_by_their_size():
    """A row of one byte, however odd, must not move the interval like a row of a hundred."""
    tops, bottoms = [100.0, 300.0] * 20, [100] * 40
    assert intervals.ratio([*tops, 50.0], [*bottoms, 1]) == pytest.approx(intervals.ratio(tops, bottoms), abs=0.1)


def test_the_interval_depends_on_the_seed_alone():
    values = list(range(30))
    assert intervals.ratio(values, [1] * 30) == intervals.ratio(values, [1] * 30)
    assert intervals.ratio(values, [1] * 30, seed=1) != intervals.ratio(values, [1] * 30, seed=2)


def test_many_rows_are_drawn_in_portions(monkeypatch):
    monkeypatch.setattr(intervals, "AT_ONCE", 100)
    values = np.random.default_rng(0).normal(0, 1, 40)
    low, high = intervals.ratio(values, [1] * 40, draws=3001)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(40), rel=0.1)
    assert intervals.sign_flips([1.0] * 200, draws=50) == pytest.approx(1 / 51)


@pytest.mark.parametrize(("tops", "bottoms"), [([], []), ([1.0], [0]), ([1.0, 2.0], [1])])
def test_rows_without_a_size_are_refused(tops, bottoms):
    with pytest.raises(ValueError, match="give one size above 0 for each row"):
        intervals.ratio(tops, bottoms)


# pairs


def test_pairs_see_what_two_intervals_cannot():
    """Hard rows are hard for both: the scores' own intervals overlap, the paired one is clear of zero."""
    rng = np.random.default_rng(0)
    before = rng.normal(100, 30, 60)
    after = before - rng.normal(2, 1, 60)
    sizes = [50] * 60
    apart = [intervals.ratio(scores, sizes) for scores in (before, after)]
    assert apart[0][0] < apart[1][1]  # they overlap
    found = intervals.difference(before, after, sizes)
    assert found.value == pytest.approx((after.sum() - before.sum()) / 3000)
    assert found.low < found.value < found.high < 0
    assert found.p < 0.001


def test_the_same_scores_do_not_differ():
    found = intervals.difference([3.0, 4.0], [3.0, 4.0], [1, 2])
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_pairs_need_the_same_rows():
    with pytest.raises(ValueError, match="2 rows before and 1 after; score the same rows"):
        intervals.difference([1, 2], [1], [1, 1])


def test_sign_flips_are_the_whole_enumeration():
    changes = [0.3, -0.1, 0.4, 0.25, -0.05, 0.6]
    signs = itertools.product((-1, 1), repeat=len(changes))
    far = [abs(sum(s * c for s, c in zip(sign, changes, strict=True))) for sign in signs]
    exact = sum(value >= sum(changes) - 1e-9 for value in far) / len(far)
    assert intervals.sign_flips(changes, draws=40_000) == pytest.approx(exact, abs=0.01)


def test_the_test_errs_as_often_as_it_says():
    """Of 200 comparisons of two equal models about one in twenty has p below 0.05."""
    rng = np.random.default_rng(0)
    low = sum(intervals.sign_flips(rng.normal(0, 1, 25), draws=400) < 0.05 for _ in range(200))
    assert 2 <= low <= 20


# proportions


def test_wilsons_interval_by_hand():
    """Its ends p solve (p - share)² = z² p (1 - p) / n."""
    for right, asked in ((9, 30), (0, 10), (180, 180)):
        for end in intervals.proportion(right, asked):
            assert (end - right / asked) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / asked, abs=1e-6)
    assert intervals.proportion(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert intervals.proportion(10, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize(("right", "asked"), [(1, 0), (3, 2), (-1, 4)])
def test_no_share_of_nothing(right, asked):
    with pytest.raises(ValueError, match="is no share; ask at least one question"):
        intervals.proportion(right, asked)


@pytest.mark.parametrize("share", [0.3, 0.35, 0.4, 0.15])
def test_so_many_questions_are_enough(share):
    """Drawn exams of that many questions tell the model from chance four times out of five."""
    asked = intervals.questions_needed(share)
    right = np.random.default_rng(0).binomial(asked, share, 20_000) / asked
    told = abs(right - 0.25) > 1.96 * math.sqrt(0.25 * 0.75 / asked)
    assert told.mean() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("share", [0.25, 0.0, 1.2])
def test_what_no_number_of_questions_can_show(share):
    with pytest.raises(ValueError, match="give two different numbers between 0 and 1"):
        intervals.questions_needed(share)
