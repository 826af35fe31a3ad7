"""`cvlib.census`: what is counted in a small file by hand, in every encoding, broken rows and all."""

import json
import re

import pytest

from cvlib import InputError, census
from cvlib.census import count, language, report

LONG = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。这是一首很有名的唐诗，作者是孟浩然。"
ROWS = [
    {"instruction": "翻译", "input": "学习", "output": "to study"},
    {"question": "Why?", "answer": "Because it is so."},
    {"input": ["早", "忙吗"], "output": ["早上好", "不忙"]},
    {"question": LONG, "answer": "对。"},
    {"question": LONG.replace("孟浩然。", "孟浩然！"), "answer": "对。"},
    {"question": "Why?", "answer": "Because  it is so."},
]


def file_of(tmp_path, encoding="utf-8"):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join([*lines[:2], "{broken", *lines[2:], '{"question": "然后呢？"}']).encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_a_small_file_by_hand(tmp_path, encoding):
    path = file_of(tmp_path, encoding)
    found = count(str(path))
    assert (found.rows, len(found.broken)) == (6, 2)
    assert [f"{path}:{line}:" in reason for line, reason in zip((3, 8), found.broken, strict=True)] == [True, True]
    assert found.turns == {1: 5, 2: 1}
    assert found.languages == {"zh-Hans": 4, "en": 2}
    assert found.duplicates == [(7, 2)]
    assert found.near_duplicates == [(6, 5)]
    assert found.characters[0] == len("早忙吗早上好不忙")
    assert found.tokens == []


def test_tokens_are_those_of_training(tmp_path):
    class Letters:
        """A tokenizer of one token a character."""

        eos_token = "$"

        def __call__(self, text, **_):
            return type("Encoding", (), {"input_ids": list(map(ord, text))})

    path = tmp_path / "one.jsonl"
    path.write_text('{"question": "一", "answer": "二"}', encoding="utf-8")
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    text = "".join(
        f"<|im_start|>{role}\n{said}$\n" for role, said in (("system", system), ("user", "一"), ("assistant", "二"))
    )
    assert count(str(path), Letters()).tokens == [len(text)] * 5


def test_the_report_names_every_broken_row_and_the_counts(tmp_path):
    text = report(count(str(file_of(tmp_path))))
    assert "6 rows, 2 broken" in text
    assert "1 in 5 rows, 2 in 1 rows" in text
    assert re.search(r"split +\d to train on, \d held out by hash", text)
    assert "duplicates: 1 (line 7 of 2)" in text
    assert text.count("rows.jsonl:") == 3


def test_a_file_without_a_usable_row_is_counted_too(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("[1]\n".replace("[1]", "1"), encoding="utf-8")
    assert "0 rows, 1 broken" in report(count(str(path)))


def test_a_missing_file_is_an_error():
    with pytest.raises(InputError, match="no such file"):
        count("missing.jsonl")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("请写一个 Python 函数，返回列表的长度：def f(x): return len(x)", "zh-Hans"),
        ("請問圖書館幾點開門？", "zh-Hant"),
        ("図書館は何時に開きますか。", "ja"),
        ("Die Bibliothek öffnet um acht Uhr früh.", "other"),
        ("A café opens at eight, and most of the people of the quarter are there by nine already, in all weathers, "
         "with their dogs and papers.", "en"),
        ("你好", "zh"),
        ("42", "none"),
    ],
)  # fmt: skip
def test_languages(text, expected):
    assert language(text) == expected


def test_the_scripts_of_guanaco_as_its_authors_meant_them():
    """The book's own multilingual rows: the four languages they were written in, and nearly nothing else."""
    found = count("data_samples/guanaco_multi.jsonl").languages
    assert set(found) <= {"zh-Hans", "zh-Hant", "zh", "ja", "en", "other"}
    assert sum(found.get(name, 0) for name in ("zh-Hans", "zh-Hant", "ja", "en")) / sum(found.values()) > 0.95
    assert census.language("")
