"""Held-out texts and exams in, a test of whether a training row gives one of them away out.

A model that has seen the answers scores well and knows nothing (trap 19). A row is *contaminated* if

* it asks exactly a question of the held-out rows or of the exam, or
* it contains most of the shingles (see `duplicates`) of a held-out question or answer, anywhere and in any order, or
* it contains most of an exam question and the right option: whether the options follow, shuffled or not, or none does.

Containment, not similarity: a short question inside a long row has a small Jaccard similarity to it, and is leaked all
the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from cvlib import ROOT, InputError, messages, questions, sources
from cvlib.duplicates import TURN, key, normal, shingles

CONTAINED = 0.8  # of a text's shingles: a row that holds so many gives the text away
DISTINCTIVE = 40  # UTF-8 bytes, 13 Chinese or 40 Latin letters: shorter texts could be met anywhere


class Reference:
    """Texts that must not be trained on.

    Args:
        questions: found if a row begins with exactly one of them.
        passages: pairs of a text and its answer; found if a row contains most of the text and all of the answer. With
            no answer to confirm it, the text must be distinctive.

    >>> exam = Reference([], [("我国的首都是哪座城市？", "北京")])
    >>> exam.found_in(["选一选：我国的首都是哪座城市?上海,北京,广州", "我国的首都是哪座城市?不知道", "北京是一座城市"])
    [True, False, False]
    """

    def __init__(self, questions: Iterable[str], passages: Iterable[tuple[str, str]]):
        self.questions = {key(normal(question)) for question in questions}
        self.owners: defaultdict[int, list[int]] = defaultdict(list)  # shingle → the passages it occurs in
        self.needed: list[tuple[float, str]] = []
        for passage, answer in dict.fromkeys((normal(passage), normal(answer)) for passage, answer in passages):
            pieces = np.unique(shingles([passage])[0]).tolist()
            if pieces and (answer or len(passage.encode()) >= DISTINCTIVE):
                for piece in pieces:
                    self.owners[piece].append(len(self.needed))
                self.needed.append((CONTAINED * len(pieces), answer))
        self.known = np.array(sorted(self.owners), dtype=np.uint32)

    def found_in(self, texts: Sequence[str]) -> list[bool]:
        """Whether each row, as `duplicates.row_text` gives it, gives one of the texts away."""
        found = [key(text.partition(TURN)[0]) in self.questions for text in texts]
        plain = [text.replace(TURN, "") for text in texts]
        hashes, counts = shingles(plain)
        if not len(self.known) or not texts:
            return found
        at = np.searchsorted(self.known, hashes).clip(max=len(self.known) - 1)
        hits = np.split(np.where(self.known[at] == hashes, hashes, 0), np.cumsum(counts)[:-1])
        for number, (text, row) in enumerate(zip(plain, hits, strict=True)):
            if not row.any():
                continue
            shared = Counter(owner for piece in np.unique(row[row != 0]).tolist() for owner in self.owners[piece])
            for owner, count in shared.items():
                enough, answer = self.needed[owner]
                found[number] |= count >= enough and answer in text
        return found


def reference(names: Iterable[str]) -> Reference:
    """The held-out split of row files and sources, and every question of exam folders.

    Raises:
        InputError: a name that cannot be read, or a broken row in it.
    """
    asked, passages = [], []
    for name in names:
        folder = next((path for path in (Path(name), ROOT / name) if path.is_dir()), None)
        for question, texts in _exam(folder) if folder else _held_out_rows(name):
            asked.append(question)
            passages += texts
    return Reference(asked, passages)


def _held_out_rows(name: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    for row in filter(messages.held_out, sources.rows(name)):
        yield next(turn.content for turn in row if turn.role == "user"), [(turn.content, "") for turn in row]


def _exam(folder: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """All questions in a folder, each with the text of its right option."""
    files = sorted(folder.rglob("*.csv"))
    if not files:
        raise InputError(f"{folder}: no .csv file of questions in this folder; name an exam folder or a file of rows")
    for question in chain.from_iterable(map(questions.read_file, files)):
        yield question.text, [(question.text, question.right)]
