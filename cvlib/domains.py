"""Rows of a profession in, what they make of a model out: how they are phrased, whom it answers like, what it cites.

A general model that goes on learning from one profession's rows can lose two things, and both are counted here by
rules a reader can check by hand:

* **Whom it answers like.** Chinese-Vicuna phrased the same medical rows in three ways and reported, without numbers,
  that some of them made a doctor of the model whatever it was asked. `phrased` writes the three ways; `tell_tales` and
  `sounds_like` are the rule that counts.
* **What it cites.** A legal answer names an article. Whether that article exists can be looked up in the asset
  `china-law`; whether it is the right one cannot be seen from its existence, so there are `distractors` for it.

Nothing here is advice to anybody, and neither is anything a model of this book says about health or law.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cvlib import InputError
from cvlib.evaluation import is_han
from cvlib.messages import Conversation, Message
from cvlib.sources import pick

#: What stands before a patient's question, in the second and the third way.
SEVERAL = (
    "请像医生一样回答下面的问题。",
    "有人因身体不适前来咨询，请给出建议。",
    "阅读这段病情描述，然后作答。",
    "你在医院坐诊，请回复这位咨询者。",
    "请根据医学常识，解答这个健康问题。",
)
FIXED = "你是一名医生，请回答病人的问题。"
WAYS = ("question only", "five instructions", "one instruction")


def phrased(row: Conversation, way: str) -> Conversation:
    """A question and its answer in one of the three `WAYS`; the row's split stays that of its bare question.

    The held-out split goes by the first question (`messages.held_out`). An instruction in front of it would send the
    row to another split, and rows to be scored into training; so the bare question goes along as the row's `entry`.

    >>> row = [Message("user", "嗓子疼怎么办？"), Message("assistant", "多喝温水。")]
    >>> for way in WAYS:
    ...     print(phrased(row, way)[0].content.replace("\\n", " | "))
    嗓子疼怎么办？
    有人因身体不适前来咨询，请给出建议。 | 嗓子疼怎么办？
    你是一名医生，请回答病人的问题。 | 病人：嗓子疼怎么办？
    """
    question, *rest = row
    prompts = {
        "question only": question.content,
        "five instructions": f"{pick(SEVERAL, question.content)}\n{question.content}",
        "one instruction": f"{FIXED}\n病人：{question.content}",
    }
    if way not in prompts:
        raise InputError(f"way {way!r} is unknown; choose one of {', '.join(WAYS)}")
    return [Message("user", prompts[way], question.entry or question.content), *rest]


def pairs(text: str) -> set[str]:
    """Every two neighbouring Chinese characters of a text.

    >>> sorted(pairs("看医生, 好"))
    ['医生', '看医']
    """
    return {a + b for a, b in pairwise(text) if is_han(a) and is_han(b)}


def tell_tales(answers: Iterable[str], general: Iterable[str], least: int = 4) -> set[str]:
    """What gives a profession away: pairs of characters in at least `least` of its answers and in no general text.

    Derived from training rows alone, so that the rule can be tried on held-out answers of both kinds.

    >>> sorted(tell_tales(["请就医。", "尽快就医。", "请休息。"], ["请坐。", "尽快来。"], least=2))
    ['就医']
    """
    count = Counter(pair for answer in answers for pair in pairs(answer))
    elsewhere = set().union(*map(pairs, general))
    return {pair for pair, times in count.items() if times >= least and pair not in elsewhere}


def sounds_like(answer: str, tales: set[str]) -> bool:
    """Whether an answer holds one of a profession's tell-tale pairs."""
    return not pairs(answer).isdisjoint(tales)


@dataclass(frozen=True)
class Citation:
    """An article as a text names it: the law without its country, the article as the law book writes it."""

    law: str
    article: str

    def __str__(self) -> str:
        return f"《{self.law}》{self.article}"


NUMBER = "零一二三四五六七八九十百千"


def citations(text: str) -> list[Citation]:
    """Every article that a text cites together with the name of its law.

    >>> [str(found) for found in citations("《中华人民共和国民法典》第一百四十五条规定，……；另见《刑法》第120条之一。")]
    ['《民法典》第一百四十五条', '《刑法》第一百二十条之一']
    """
    found = re.findall(rf"《([^《》]+)》(?:中的?|的)?第([{NUMBER}]+|\d{{1,4}})条(之[{NUMBER}]+)?", text)
    return [Citation(short(law), f"第{chinese(number)}条{part}") for law, number, part in found]


def short(law: str) -> str:
    """A law's name as people write it."""
    return law.removeprefix("中华人民共和国")


def chinese(number: str) -> str:
    """A number below ten thousand in Chinese, as law books write it; one that is Chinese already stays.

    >>> [chinese(text) for text in ("8", "15", "120", "205", "1071", "十五")]
    ['八', '十五', '一百二十', '二百零五', '一千零七十一', '十五']
    """
    if not number.isdecimal():
        return number
    digits, written = number.lstrip("0"), ""
    for place, digit in enumerate(digits):
        unit = ("", "十", "百", "千")[len(digits) - 1 - place]
        written += NUMBER[int(digit)] + (unit if digit != "0" else "")
    return re.sub("零+", "零", written).rstrip("零").removeprefix("一" if re.match("一十", written) else "") or "零"


class Statutes:
    """The articles in force, by law, in the order of the book.

    Args:
        path: the database of the asset `china-law`.
    """

    def __init__(self, path: str | Path):
        self.articles: dict[str, list[str]] = {}
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                query = "SELECT law_name, article_no FROM articles WHERE status = '现行有效' ORDER BY id"
                for law, article in database.execute(query):
                    self.articles.setdefault(short(law), []).append(article)
        except sqlite3.Error as error:
            raise InputError(f"{path}: no database of laws ({error}); fetch the asset china-law") from None

    def exists(self, citation: Citation) -> bool:
        """Whether there is such an article in force. That it exists says nothing about whether it applies."""
        return citation.article in self.articles.get(citation.law, ())

    def distractors(self, right: Citation, question: str, count: int = 3) -> list[Citation]:
        """Other articles of the same law, drawn by a hash of the question: the same ones on every machine."""
        others = [article for article in self.articles.get(right.law, ()) if article != right.article]
        if len(others) < count or not self.exists(right):
            raise InputError(f"{right}: no such article in force with {count} others beside it; cite another one")

        def place(article: str) -> bytes:
            return hashlib.sha256(f"{question}{article}".encode()).digest()

        return [Citation(right.law, article) for article in sorted(others, key=place)[:count]]


def choices(question: str, candidates: Iterable[Citation]) -> list[Conversation]:
    """The question answered by each article, to be scored: the candidate with the fewest nats is the model's choice."""
    return [[Message("user", question), Message("assistant", f"{citation}")] for citation in candidates]
