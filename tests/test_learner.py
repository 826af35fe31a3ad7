"""Continued BPE against a version that counts everything again from scratch for every piece."""

from collections import Counter
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvlib.learner import Learner


def whatever(piece):
    return True


def slow(runs, known):
    """The same rule without lists, heaps or memory: count, take the best, cut everything anew."""
    known = list(known)
    while True:
        saves = Counter()
        for run, weight in runs:
            symbols = cut(run, known)
            for symbol in symbols:
                if symbol not in known:
                    saves[symbol] += 2 * weight
            for left, right in pairwise(symbols):
                if left in known and right in known:
                    saves[left + right] += weight
        if not saves:
            return
        piece = min(saves, key=lambda piece: (-saves[piece], piece))
        known.append(piece)
        yield piece


def cut(text, ranked):
    """BPE as SentencePiece defines it: join the pair whose piece ranks highest, leftmost first."""
    symbols = list(text)
    while True:
        pairs = [(ranked.index(a + b), at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in ranked]
        if not pairs:
            return symbols
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def test_by_hand():
    """海 occurs 5 + 3 times at two tokens each; then 上海, 5 times, beats 海上, 3 times."""
    learner = Learner([("上海", 5), ("海上", 3)], known={"上"}, allowed=whatever)
    assert list(learner.learn()) == ["海", "上海", "海上"]


def test_pieces_asked_for_come_first():
    learner = Learner([("上海", 5), ("海上", 3)], known={"上"}, allowed=whatever)
    assert list(learner.learn(first=["大", "上", "海"])) == ["大", "海", "上海", "海上"]


def test_what_is_not_allowed_is_not_learnt():
    learner = Learner([("一二三", 5)], known=set("一二三"), allowed=lambda piece: piece != "一二")
    assert list(learner.learn()) == ["二三", "一二三"]


runs = st.lists(st.tuples(st.text("一二三", min_size=1, max_size=9), st.integers(1, 4)), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(runs, st.sets(st.sampled_from("一二三")))
def test_equals_counting_from_scratch(runs, known):
    assert list(islice(Learner(runs, known, whatever).learn(), 12)) == list(islice(slow(runs, sorted(known)), 12))


@settings(max_examples=300, deadline=None)
@given(runs)
def test_every_learnt_piece_is_reached_from_characters(runs):
    known = sorted(set("".join(run for run, _ in runs)))
    ranked = [*known, *islice(Learner(runs, set(known), whatever).learn(), 12)]
    assert all(cut(piece, ranked) == [piece] for piece in ranked)


def test_a_text_used_up_ends_the_learning():
    learner = Learner([("一二", 1)], known=set("一二"), allowed=whatever)
    assert list(learner.learn()) == ["一二"]
    with pytest.raises(StopIteration):
        next(learner.learn())
