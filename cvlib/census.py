"""A file of rows in, what is in it out: rows, languages, turns, lengths, duplicates, and every row that is broken.

Look before you train: half of the traps of this book are visible in a table of one's own data. The count never stops
at a bad row; it names the line and goes on to the end.

Languages are told by their letters alone, which needs no model and can be checked by hand: kana make a text Japanese;
Chinese is simplified or traditional by the characters that only one of the two old encodings, GB2312 and Big5, can
write; Latin letters count as English unless more than one in a hundred has an accent. So a German sentence without an
umlaut counts as English: the shares are a first look, no verdict.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from cvlib import InputError, sources
from cvlib.batching import encode
from cvlib.duplicates import Fingerprints, row_text
from cvlib.messages import Conversation, held_out
from cvlib.templates import render

KANA, HAN = re.compile("[\u3041-\u30ff]"), re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
QUANTILES = (0, 0.1, 0.5, 0.9, 1)
BATCH = 256  # rows fingerprinted at once
SHOWN = 20  # broken rows in a report


def language(text: str) -> str:
    """`zh-Hans`, `zh-Hant`, `zh` (characters that both share), `ja`, `en`, `other`, or `none` without letters.

    >>> [language(text) for text in ("我们学习", "我們學習", "上海", "学びます", "We learn", "Où ?", "1 + 1 = 2")]
    ['zh-Hans', 'zh-Hant', 'zh', 'ja', 'en', 'other', 'none']
    """
    letters = [character for character in text if character.isalpha()]
    han, kana = HAN.findall(text), KANA.findall(text)
    if not letters:
        return "none"
    if len(kana) * 10 > len(letters):
        return "ja"
    if len(han) * 4 > len(letters):  # a Chinese answer may quote English or hold code
        scripts = Counter(map(_script, han))
        simplified, traditional = scripts["simplified"], scripts["traditional"]
        return "zh" if simplified == traditional else "zh-Hans" if simplified > traditional else "zh-Hant"
    return "en" if sum(not letter.isascii() for letter in letters) * 100 <= len(letters) else "other"


@cache
def _script(character: str) -> str:
    """Whether a Chinese character is `simplified`, `traditional` or `shared`, by who could encode it."""

    def writes(codec: str) -> bool:
        return bool(character.encode(codec, "ignore"))

    return {(True, False): "simplified", (False, True): "traditional"}.get((writes("gb2312"), writes("big5")), "shared")


@dataclass
class Census:
    """What `count` found in one file.

    `held_out` rows are kept from training by their hash. `languages` and `turns` count conversations, by the language
    of all their text and by their number of questions. `characters` and `tokens` are quantiles (least, 10 %, median,
    90 %, most) of a whole conversation's length; tokens include the template's and are empty without a tokenizer.
    `duplicates` and `near_duplicates` pair a row with the first one like it, both by line. `broken` says of every row
    that cannot be used where and why.
    """

    name: str
    rows: int = 0
    held_out: int = 0
    languages: dict[str, int] = field(default_factory=dict)
    turns: dict[int, int] = field(default_factory=dict)
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    near_duplicates: list[tuple[int, int]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def count(name: str, tokenizer=None, template: str = "chatml") -> Census:
    """Everything about one file or source; a broken row is noted and the count goes on.

    Args:
        name: a file, or a name `sources` knows.
        tokenizer: counts tokens if given.
        template: how a conversation is rendered before its tokens are counted.

    Raises:
        InputError: no such file, or one that cannot be decoded.
    """
    from tqdm import tqdm

    census, lines, texts, prints = Census(name), [], [], Fingerprints()
    characters, tokens, languages, turns = [], [], Counter(), Counter()
    for line, row in tqdm(sources.scan(name), desc=f"counting {name}", unit="row", leave=False):
        if isinstance(row, InputError):
            census.broken.append(str(row))
            continue
        lines.append(line)
        texts.append(row_text(row))
        if len(texts) == BATCH:
            prints.add(texts)
            texts = []
        text = "".join(turn.content for turn in row)
        languages[language(text)] += 1
        turns[sum(turn.role == "user" for turn in row)] += 1
        characters.append(len(text))
        census.held_out += held_out(row)
        if tokenizer:
            tokens.append(length(row, tokenizer, template))
    census.rows, census.turns = len(lines), dict(sorted(turns.items()))
    census.languages = dict(languages.most_common())
    census.characters, census.tokens = _quantiles(characters), _quantiles(tokens)
    prints.add(texts)
    same, first = prints.first()
    census.duplicates = [(lines[i], lines[j]) for i, j in enumerate(same) if i != j]
    census.near_duplicates = [(lines[i], lines[j]) for i, j in enumerate(first) if i != j and same[i] == i]
    return census


def length(row: Conversation, tokenizer, template: str) -> int:
    """Tokens of a whole conversation as training sees it."""
    return len(encode(render(row, template, tokenizer.eos_token), tokenizer, max_length=1 << 40))


def _quantiles(values: Sequence[int]) -> list[int]:
    return np.quantile(values, QUANTILES, method="nearest").astype(int).tolist() if values else []


def report(census: Census) -> str:
    """The count as lines of text."""
    lines = [f"{census.name}: {census.rows:,} rows, {len(census.broken):,} broken"]
    if census.rows:
        lines += [f"  split       {census.rows - census.held_out:,} to train on, {census.held_out:,} held out by hash"]
        parts = ", ".join(f"{name} {n / census.rows:.0%}" for name, n in census.languages.items())
        lines += [f"  languages   {parts}"]
        lines += ["  questions   " + ", ".join(f"{turn} in {n:,} rows" for turn, n in census.turns.items())]
    for name, values in (("characters", census.characters), ("tokens", census.tokens)):
        if values:
            lines.append(f"  {name:<11} from {values[0]:,} to {values[4]:,}, median {values[2]:,}, "
                         f"eight of ten between {values[1]:,} and {values[3]:,}")  # fmt: skip
    for kind, pairs in (("duplicates", census.duplicates), ("near duplicates", census.near_duplicates)):
        shown = ", ".join(f"line {line} of {first}" for line, first in pairs[:8]) + (" …" if len(pairs) > 8 else "")
        lines.append(f"  {kind}: {len(pairs):,}" + (f" ({shown})" if pairs else ""))
    more = [f"  … and {len(census.broken) - SHOWN:,} more"] * (len(census.broken) > SHOWN)
    return "\n".join([*lines, *(f"  {reason}" for reason in census.broken[:SHOWN]), *more])
