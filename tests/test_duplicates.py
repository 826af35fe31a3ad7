"""`cvlib.duplicates`: by hand, against brute force, and against datasketch."""

import itertools
import random

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from cvlib import duplicates
from cvlib.duplicates import BANDS, PER_BAND, SHINGLE, TURN, Fingerprints, normal, row_text, shingles, signatures
from cvlib.messages import Message


def texts(number=300, seed=0):
    """Random Chinese-like texts; every third is an earlier one with a few characters changed."""
    chance = random.Random(seed)
    made = []
    for place in range(number):
        if place % 3 == 2:
            text = list(chance.choice(made))
            for _ in range(chance.randrange(4)):
                text[chance.randrange(len(text))] = chr(chance.randrange(0x4E00, 0x9FA5))
        else:
            text = [chr(chance.randrange(0x4E00, 0x5E00)) for _ in range(chance.randrange(20, 120))]
        made.append("".join(text))
    return made


def pieces(text):
    return {text[place : place + SHINGLE] for place in range(len(text) - SHINGLE + 1)}


def by_row(made):
    hashes, counts = shingles(made)
    return np.split(hashes, np.cumsum(counts)[:-1])


def test_normal_keeps_what_matters_and_drops_what_does_not():
    assert normal("Ｈｅｌｌｏ， 世界！\n") == normal("hello,世界!")
    assert normal("1+1=2") != normal("1-1=2")
    assert TURN not in normal(f"a{TURN}b")


def test_a_shingle_hash_for_each_place_and_none_across_texts():
    one, none, two = by_row(["甲乙丙丁戊己", "甲乙", "乙丙丁戊己庚"])
    assert (len(one), len(none), len(two)) == (2, 0, 2)
    assert one[1] == two[0]  # 乙丙丁戊己 stands in both
    assert len(set(shingles(texts())[0].tolist())) == len(set().union(*map(pieces, texts())))


def test_what_the_assistant_says_is_another_alphabet():
    there = row_text([Message("user", "今天天气很好"), Message("assistant", "The weather is lovely")])
    back = row_text([Message("user", "The weather is lovely"), Message("assistant", "今天天气很好")])
    one, other, again = by_row([there, back, there])
    assert len(set(one.tolist()) & set(other.tolist())) <= 1
    assert (one == again).all()


def test_signatures_are_datasketchs_number_for_number():
    made = texts(30)
    found = signatures(*shingles(made))
    permutations = (duplicates.A, duplicates.B)
    for text, values in zip(by_row(made), found.T, strict=True):
        peer = MinHash(BANDS * PER_BAND, hashfunc=int, permutations=permutations, scheme="affine32")
        peer.update_batch(text.tolist())
        assert (peer.hashvalues == values).all()


def test_signatures_estimate_the_jaccard_similarity():
    base = texts(3, seed=1)[0] * 3
    for changed in (1, 4, 10):
        other = base[changed * 3 :] + texts(3, seed=2)[1][: changed * 3]
        true = len(pieces(base) & pieces(other)) / len(pieces(base) | pieces(other))
        one, two = signatures(*shingles([base, other])).T
        assert np.mean(one == two) == pytest.approx(true, abs=4 * (true * (1 - true) / 112) ** 0.5 + 0.01)


def test_groups_by_hand():
    base = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。这是一首很有名的唐诗，作者是孟浩然。"
    rows = [base, "好", base.replace("孟浩然。", "孟浩然！"), "好", "不", f" {base}", "白日依山尽，黄河入海流。"]
    seen = Fingerprints()
    seen.add([normal(text) for text in rows])
    same, first = seen.first()
    assert same.tolist() == [0, 1, 2, 1, 4, 0, 6]
    assert first.tolist() == [0, 1, 0, 1, 4, 0, 6]


def test_a_neighbours_neighbour_belongs_to_the_cluster():
    """a ~ b and b ~ c put a and c together, whatever the order in which they came."""
    made = texts(1, seed=5)[0] * 2
    chain = [made[:100], made[:100][6:] + made[100:106], made[:100][12:] + made[100:112]]
    for order in itertools.permutations(chain):
        seen = Fingerprints()
        seen.add(order)
        assert set(seen.first()[1].tolist()) == {0}


def test_the_same_groups_as_datasketchs_index():
    """The same signatures in datasketch's dictionaries and in our sorted arrays collide in the same pairs."""
    made = texts()
    peer = MinHashLSH(num_perm=BANDS * PER_BAND, params=(BANDS, PER_BAND))
    sketches = [MinHash(hashvalues=values, scheme="affine32") for values in signatures(*shingles(made)).T]
    for place, sketch in enumerate(sketches):
        peer.insert(place, sketch)
    first = list(range(len(made)))
    for place, sketch in enumerate(sketches):  # union by relabelling: slow and plain
        roots = {first[other] for other in peer.query(sketch)} | {first[place]}
        first = [min(roots) if root in roots else root for root in first]
    seen = Fingerprints()
    for start in range(0, len(made), 7):  # in uneven chunks
        seen.add(made[start : start + 7])
    assert seen.first()[1].tolist() == first
    assert len(set(first)) < len(made)


def test_at_most_300_bytes_a_row():
    import tracemalloc

    made, seen = texts(2560), Fingerprints()
    seen.add(made[:256])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for start in range(256, 2560, 256):
        seen.add(made[start : start + 256])
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.reset_peak()
    seen.first()
    peak = tracemalloc.get_traced_memory()[1] - before
    assert kept / 2304 < 150
    assert peak / 2304 < 300


def test_rows_too_short_to_shingle_are_compared_exactly():
    seen = Fingerprints()
    seen.add(["甲乙丙", "甲乙丁", "甲乙丙"])
    assert seen.first()[1].tolist() == [0, 1, 0]
