"""Exam folders in, subjects with their questions and worked examples out.

Two layouts are read as they are published; column names decide, so that one reader serves both:

| exam | subjects | worked examples | questions | columns |
|---|---|---|---|---|
| C-Eval (Huang et al. 2023) | 52 | `dev/SUBJECT_dev.csv` | `val/SUBJECT_val.csv` | `id,question,A,B,C,D,answer` |
| CMMLU (Li et al. 2023) | 67 | `dev/SUBJECT.csv` | `test/SUBJECT.csv` | unnamed, `Question,A,B,C,D,Answer` |

(C-Eval's own `test` split has no answers; its scores come from its web site.)

A subject stands in *one* category: STEM, Humanities, Social Science or Other. CMMLU marks 15 of its 67 subjects as
"China specific" on top of that. Published code kept the last category it met, so that this mark took the 15 out of
their own groups and three category averages were wrong; here it is a flag, and categories add up to the whole.
An exam of your own brings a `subjects.json`: `{"geography": {"zh": "地理", "category": "Social Science"}}`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cvlib import InputError, messages

LETTERS = "ABCD"
COLUMNS = ("question", *"abcd", "answer")


@dataclass(frozen=True)
class Question:
    """A question, its four options, and the letter of the right one."""

    text: str
    options: tuple[str, ...]
    answer: str

    @property
    def right(self) -> str:
        """The text of the right option."""
        return self.options[LETTERS.index(self.answer)]

    def block(self, solved: bool = False, listed: bool = True) -> str:
        """The question as both exams' published prompts write it, up to its answer or with it.

        Args:
            solved: with the answer and an empty line behind it, as a worked example.
            listed: the options stand in the question and the answer is a letter; else the answer is the option itself.

        >>> print(Question("1 + 1 = ?", ("1", "2", "3", "4"), "B").block())
        1 + 1 = ?
        A. 1
        B. 2
        C. 3
        D. 4
        答案：
        >>> Question("1 + 1 = ?", ("1", "2", "3", "4"), "B").block(solved=True, listed=False)
        '1 + 1 = ?\\n答案：2\\n\\n'
        """
        shown = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=True)] if listed else []
        answer = f"{self.answer if listed else self.right}\n\n" if solved else ""
        return "\n".join([self.text, *shown, f"答案：{answer}"])


@dataclass(frozen=True)
class Subject:
    """One subject of an exam; `china` if the exam marks it as specific to China."""

    name: str
    zh: str
    category: str
    china: bool
    examples: list[Question]
    questions: list[Question]

    @property
    def heading(self) -> str:
        """The sentence above the worked examples, as published ("single-choice questions of the … exam of China")."""
        return f"以下是中国关于{self.zh}考试的单项选择题，请选出其中的正确答案。\n\n"


def read(folder: str | Path, shots: int = 5, limit: int | None = None) -> list[Subject]:
    """All subjects of an exam folder, by name.

    Args:
        folder: has `dev/` with worked examples, and `val/` or `test/` with the questions.
        shots: worked examples to keep; a subject with fewer is refused.
        limit: keep only so many questions of each subject.

    Raises:
        InputError: no questions here, a missing column, or a row that cannot be asked.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name an exam folder as C-Eval or CMMLU publish it")
    asked = next((found for part in ("val", "test") if (found := sorted((folder / part).glob("*.csv")))), [])
    if not asked:
        raise InputError(f"{folder}: no .csv files in val/ or test/; name an exam folder as C-Eval or CMMLU publish it")
    known, subjects = _known(folder, asked), []
    for path in asked:
        name = path.stem.removesuffix("_val")
        about = known.get(name, {"zh": name.replace("_", " "), "category": "Other"})
        examples = read_file(folder / "dev" / (path.name.replace("_val.", "_dev.")))[:shots] if shots else []
        if len(examples) < shots:
            raise InputError(f"{folder}: {name} has {len(examples)} worked examples in dev/; ask with fewer --shots")
        questions = read_file(path)[:limit]
        subjects.append(Subject(name, about["zh"], about["category"], about.get("china", False), examples, questions))
    return subjects


def _known(folder: Path, asked: Sequence[Path]) -> dict[str, dict]:
    """Names and categories by subject: the folder's own, or those of the exam whose layout it has."""
    own = folder / "subjects.json"
    try:
        text = (own if own.is_file() else Path(__file__).with_name("subjects.json")).read_text(encoding="utf-8")
        found = json.loads(text)
        known = found if own.is_file() else found["C-Eval" if asked[0].stem.endswith("_val") else "CMMLU"]
        if all(isinstance(about["zh"], str) and isinstance(about["category"], str) for about in known.values()):
            return known
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise InputError(f'{own}: write {{"subject": {{"zh": "Chinese name", "category": "…"}}, …}} for its subjects')


def read_file(path: str | Path) -> list[Question]:
    """The questions of one file; capital letters in column names do not matter, further columns are ignored.

    Raises:
        InputError: no such file, a missing column, no questions, or a row without a question and its right option.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; each subject needs one in dev/ and one in val/ or test/")
    questions = []
    with path.open(encoding=messages.encoding(path), errors="replace", newline="") as stream:
        table = csv.reader(stream)
        names = [name.strip().lower() for name in next(table, [])]
        if missing := [name for name in COLUMNS if name not in names]:
            raise InputError(
                f"{path}: no column {missing[0]!r}; write question, A, B, C, D and answer in its first line"
            )
        for row in filter(None, table):
            if len(row) < len(names):
                raise InputError(f"{path}:{table.line_num}: {len(row)} columns of {len(names)}; mend this row")
            text, *options, answer = (row[names.index(name)].strip() for name in COLUMNS)
            if answer not in tuple(LETTERS):
                raise InputError(f"{path}:{table.line_num}: the answer is {answer!r}; write A, B, C or D")
            question = Question(text, tuple(options), answer)
            if not text or not question.right:
                raise InputError(f"{path}:{table.line_num}: no question or no text for {answer}; mend this row")
            questions.append(question)
    if not questions:
        raise InputError(f"{path}: no questions in this file; give at least one row")
    return questions
