"""How sure a number is: intervals, a paired test, and how many questions a claim needs.

A score of some rows says what the model did on *these* rows; a claim is about all the others like them. Three tools:

* **Bootstrap** (Efron 1979): draw as many rows as there are, with replacement, many times, and compute the score of
  each draw. The middle 95 % of these scores are the interval. For bits per byte a row is a numerator (its bits) and a
  denominator (its bytes), so rows weigh by their bytes in every draw.
* **Pairs**: two models on the same rows differ less by chance than two models on different ones, because a hard row is
  hard for both. So differences are taken row by row first, and the rows are drawn in pairs.
* **Proportions**: right answers out of questions asked, against the chance of guessing.

Left out: correction for many comparisons. With twenty intervals on a page, expect one to miss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

MIDDLE = torch.tensor([0.025, 0.975], dtype=torch.float64)  # the ends of the middle 95 %
AT_ONCE = 4_000_000  # numbers drawn at once


def ratio(tops: Sequence[float], bottoms: Sequence[float], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval over rows of `sum(tops) / sum(bottoms)`.

    Args:
        tops: one number a row, such as its bits, or 1 for a right answer.
        bottoms: one weight a row, such as its bytes, or 1 for a question.

    >>> ratio([2.0, 2.0, 2.0], [4, 4, 4])           # equal rows: nothing can vary
    (0.5, 0.5)
    """
    top, bottom = _columns(tops, bottoms)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for some in _portions(draws, len(top)):
        picks = torch.randint(len(top), (some, len(top)), generator=generator)
        values.append(top[picks].sum(1) / bottom[picks].sum(1))
    low, high = torch.cat(values).quantile(MIDDLE).tolist()
    return low, high


@dataclass(frozen=True)
class Difference:
    """What changed from one score to another on the same rows: the change, its 95 % interval, and the test's p."""

    value: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def difference(
    before: Sequence[float], after: Sequence[float], sizes: Sequence[float], draws: int = 1000, seed: int = 0
) -> Difference:
    """`sum(after) / sum(sizes) - sum(before) / sum(sizes)`, with its paired interval and test.

    >>> print(difference(before=[1, 0, 1, 0], after=[1, 1, 1, 1], sizes=[1, 1, 1, 1]))
    +0.500 [+0.000, +1.000]
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} rows before and {len(after)} after; score the same rows")
    changes = [new - old for old, new in zip(before, after, strict=True)]
    low, high = ratio(changes, sizes, draws, seed)
    return Difference(sum(changes) / sum(sizes), low, high, sign_flips(changes, seed=seed))


def sign_flips(changes: Sequence[float], draws: int = 10_000, seed: int = 0) -> float:
    """p of a two-sided paired test: how often random signs give a sum as far from zero as the true one.

    If nothing had changed but noise, each row's change could as well have had the other sign (Fisher 1935). The true
    signs count as one of the draws, so that p is never 0.

    >>> sign_flips([0.0, 0.0, 0.0])
    1.0
    """
    change = torch.tensor(changes, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    far = change.sum().abs() * (1 - 1e-9)  # sums in another order differ in their last digit
    as_far = 0
    for some in _portions(draws, len(change)):
        signs = torch.randint(2, (some, len(change)), generator=generator, dtype=torch.float64) * 2 - 1
        as_far += int(((signs @ change).abs() >= far).sum())
    return (1 + as_far) / (1 + draws)


def proportion(right: int, asked: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927): sound for few questions, and near 0 and 1.

    >>> [round(end, 3) for end in proportion(9, 30)]     # 30 % of 30 questions, and chance would be 25 %
    [0.167, 0.479]
    """
    if not 0 <= right <= asked or not asked:
        raise ValueError(f"{right} right of {asked} asked is no share; ask at least one question")
    z, share = NormalDist().inv_cdf(0.5 + confidence / 2), right / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return max(0.0, middle - half), min(1.0, middle + half)


def questions_needed(share: float, chance: float = 0.25, level: float = 0.05, power: float = 0.8) -> int:
    """Questions after which a model that truly answers `share` right is told from `chance`, in `power` of all exams.

    The two-sided test at `level`, by the normal approximation: the gap must cover the chance line's own noise, z of
    `level`, and the model's, z of `power`.

    >>> questions_needed(0.30)          # five points above guessing
    610
    """
    if not (0 < share < 1 and 0 < chance < 1) or share == chance:
        raise ValueError(f"share is {share} and chance is {chance}; give two different numbers between 0 and 1")
    normal = NormalDist()
    noise = normal.inv_cdf(1 - level / 2) * math.sqrt(chance * (1 - chance))
    noise += normal.inv_cdf(power) * math.sqrt(share * (1 - share))
    return math.ceil((noise / (share - chance)) ** 2)


def _columns(tops: Sequence[float], bottoms: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    top, bottom = (torch.tensor(list(column), dtype=torch.float64) for column in (tops, bottoms))
    if not len(top) or len(top) != len(bottom) or not (bottom > 0).all():
        raise ValueError(f"{len(top)} numerators over {len(bottom)} sizes; give one size above 0 for each row")
    return top, bottom


def _portions(draws: int, width: int):
    """Numbers of draws, at most `AT_ONCE` numbers each."""
    step = max(1, AT_ONCE // width)
    for done in range(0, draws, step):
        yield min(step, draws - done)
