"""The rows shipped with the book: readable, enough, no two alike, and the showcase questions never trained on."""

import csv
import json
import sqlite3
from collections import Counter, defaultdict
from functools import cache
from itertools import chain

import pytest

from cvlib import ROOT, assets
from cvlib.evaluation import han_share
from cvlib.messages import held_out, read

FOLDER = ROOT / "data_samples"
ROWS = sorted(FOLDER.glob("*.jsonl"))
SHOWCASE = (
    "请介绍一下北京。",
    "天空为什么是蓝色的？",
    "写一首关于春天的短诗。",
    "怎样才能学好一门外语？",
    "请列出三种常见的水果。",
    "把“今天天气很好，我们去公园吧。”翻译成英文。",
)


@cache
def rows(path):
    return read(path)


def squeezed(text):
    """A text without spaces and punctuation, in small letters: what two people would call the same question."""
    return "".join(character for character in text.lower() if character.isalnum())


def grams(texts, n=5):
    text = "".join("".join(texts).split())
    return {text[i : i + n] for i in range(max(1, len(text) - n + 1))}


def alike(sets, limit=0.5):
    """Pairs of places whose sets overlap by a Jaccard index above `limit`, by counting shared grams."""
    places, found = defaultdict(list), []
    for here, own in enumerate(sets):
        shared = Counter(chain.from_iterable(places[gram] for gram in own))
        found += [
            (there, here) for there, both in shared.items() if both / (len(own) + len(sets[there]) - both) > limit
        ]
        for gram in own:
            places[gram].append(here)
    return found


def test_alike_finds_what_it_should():
    texts = ["今天天气很好我们去公园吧", "今天天气很好，我们去公园吧！", "昨天下雨了我们在家看书", "今天天气很好"]
    assert alike([grams(squeezed(text)) for text in texts]) == [(0, 1)]
    assert alike([{1, 2, 3}, {2, 3, 4}, {2, 3}]) == [(0, 2), (1, 2)]  # 2/4 is not above one half, 2/3 is


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.name)
def test_every_row_can_be_read(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(rows(path)) == len(lines)  # no blank line, no row over two lines


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.json")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_json_file_can_be_read(path):
    assert json.loads(path.read_text(encoding="utf-8"))


def test_there_are_enough():
    assert len(rows(FOLDER / "belle_zh.jsonl")) >= 300
    assert len(rows(FOLDER / "alpaca_en.jsonl")) >= 100


def test_they_are_in_the_language_they_claim():
    assert han_share([turn.content for row in rows(FOLDER / "belle_zh.jsonl") for turn in row]) > 0.85
    assert han_share([turn.content for row in rows(FOLDER / "alpaca_en.jsonl") for turn in row]) < 0.02


def test_tasks_and_lengths_vary():
    answers = [len(row[-1].content) for row in rows(FOLDER / "belle_zh.jsonl")]
    assert min(answers) < 15 < 150 < max(answers)
    assert len({row[0].content[:4] for row in rows(FOLDER / "belle_zh.jsonl")}) > 150
    passages = [json.loads(line)["input"] for line in (FOLDER / "belle_zh.jsonl").read_text("utf-8").splitlines()]
    assert 0.1 < sum(map(bool, passages)) / len(passages) < 0.9


@pytest.fixture(scope="module")
def everything():
    return [(path.name, row) for path in ROWS for row in rows(path)]


def test_no_question_stands_twice(everything):
    """Not even with other punctuation, nor in two files."""
    first = Counter(squeezed("".join(turn.content for turn in row[:-1])) for _, row in everything)
    assert [question for question, count in first.items() if count > 1] == []


@pytest.mark.parametrize("part", ["whole rows", "questions"])
def test_no_two_rows_are_alike(everything, part):
    """Jaccard index of character 5-grams at most one half: inside a file, between files, and across the split."""
    last = None if part == "whole rows" else -1
    sets = [grams(turn.content for turn in row[:last]) for _, row in everything]
    found = [(everything[one], everything[two]) for one, two in alike(sets)]
    assert [(a[0], a[1][0].content[:40], b[0], b[1][0].content[:40]) for a, b in found] == []


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.name)
def test_about_a_fifth_is_held_out(path):
    share = sum(map(held_out, rows(path))) / len(rows(path))
    assert 0.1 < share < 0.3


def test_showcase_questions_are_in_no_file(everything):
    shown = [squeezed(question) for question in SHOWCASE]
    asked = [squeezed(turn.content) for _, row in everything for turn in row if turn.role == "user"]
    for question in shown:
        assert [text for text in asked if question in text or (len(text) > 4 and text in question)] == []


def test_nothing_like_a_showcase_question_is_trained_on(everything):
    asked = [turn.content for _, row in everything for turn in row if turn.role == "user" and not held_out(row)]
    sets = [grams([squeezed(text)], n=3) for text in (*SHOWCASE, *asked)]
    found = [(SHOWCASE[one], asked[two - len(SHOWCASE)]) for one, two in alike(sets) if one < len(SHOWCASE) <= two]
    assert found == []


@pytest.mark.parametrize("path", sorted((FOLDER / "exam").rglob("*.csv")), ids=lambda path: path.stem)
def test_exam_questions(path):
    with path.open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert table
    assert [row["id"] for row in table] == [str(n) for n in range(len(table))]
    for row in table:
        options = [row[letter] for letter in "ABCD"]
        assert all(text.strip() for text in (row["question"], *options))
        assert len(set(options)) == 4
        assert row["answer"] in "ABCD"
        assert None not in row  # a comma too many


def test_exam_answers_are_spread():
    """A model that always says C must not look clever."""
    answers = Counter()
    for path in (FOLDER / "exam" / "val").glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as stream:
            answers.update(row["answer"] for row in csv.DictReader(stream))
    assert max(answers.values()) / sum(answers.values()) < 0.35


def test_every_exam_subject_has_worked_examples_and_questions():
    subjects = json.loads((FOLDER / "exam" / "subjects.json").read_text(encoding="utf-8"))
    for split in ("dev", "val"):
        files = {path.stem.removesuffix(f"_{split}") for path in (FOLDER / "exam" / split).glob("*.csv")}
        assert files == set(subjects)


def test_the_card_says_what_the_files_hold():
    """Every row of the table in data_samples/README.md: rows, split and quartiles of answer length."""
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in ROWS:
        line = next(line for line in card.splitlines() if line.startswith(f"| `{path.name}`"))
        kept = sum(map(held_out, rows(path)))
        lengths = sorted(len(turn.content) for row in rows(path) for turn in row if turn.role == "assistant")
        quartiles = [lengths[share * (len(lengths) - 1) // 4] for share in range(5)]
        expected = [len(rows(path)), len(rows(path)) - kept, kept, ", ".join(map(str, quartiles))]
        assert [cell.strip() for cell in line.split("|")][4:8] == list(map(str, expected))


def test_every_cited_article_exists_and_is_in_force():
    with sqlite3.connect(f"file:{assets.fetch('china-law')}?mode=ro", uri=True) as laws:
        known = set(laws.execute("select law_name, article_no from articles where status = '现行有效'"))
    cited = [json.loads(line) for line in (FOLDER / "legal_qa.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row for row in cited if (row["law"], row["article"]) not in known] == []
