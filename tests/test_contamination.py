"""`cvlib.contamination`: every way to plant a held-out text is found, and what merely sounds alike is not."""

import csv

import pytest

from cvlib import InputError, contamination
from cvlib.contamination import Reference, reference
from cvlib.duplicates import row_text
from cvlib.messages import Message, held_out

STEM, RIGHT = "我国面积最大的省级行政区是哪一个？", "新疆维吾尔自治区"
OPTIONS = [RIGHT, "西藏自治区", "内蒙古自治区", "青海省"]
ANSWER = "高血压患者平时应当少吃盐，多吃蔬菜水果，每天散步半小时，并按医生的要求服药。"


def row(question, answer):
    return row_text([Message("user", question), Message("assistant", answer)])


@pytest.fixture
def forbidden():
    return Reference(["怎么降血压？"], [(ANSWER, ""), (STEM, RIGHT)])


@pytest.mark.parametrize(
    "planted",
    [
        row("怎么降血压？", "不知道。"),
        row(" 怎么 降血压?", "少吃盐。"),
        row("给老人写几条建议", f"建议如下：{ANSWER}祝您健康！"),
        row("给老人写几条建议", ANSWER.replace("每天", "每日")),
        row(f"{STEM}\nA. {OPTIONS[2]} B. {OPTIONS[3]} C. {OPTIONS[0]} D. {OPTIONS[1]}", "C"),
        row(STEM, f"是{RIGHT}。"),
        row(f"请回答：{STEM.replace('？', '')}", RIGHT),
    ],
)
def test_planted_rows_are_found(forbidden, planted):
    assert forbidden.found_in([row("你好", "你好！"), planted]) == [False, True]


@pytest.mark.parametrize(
    "innocent",
    [
        row("怎么降血脂？", "少吃油。"),
        row("新疆在哪里？", f"{RIGHT}在我国西北。"),
        row("我国面积最大的淡水湖是哪一个？", "鄱阳湖。"),
        row("高血压患者能喝茶吗？", "可以喝淡茶，少吃盐。"),
        row("", ""),
    ],
)
def test_innocent_rows_are_not(forbidden, innocent):
    assert forbidden.found_in([innocent]) == [False]


def test_no_reference_finds_nothing():
    assert Reference([], []).found_in([row("怎么降血压？", "少吃盐。")]) == [False]
    assert Reference(["问"], []).found_in([]) == []


def test_the_books_own_held_out_rows_and_exam_are_found_and_its_training_rows_are_clean():
    files = ["data_samples/belle_zh.jsonl", "data_samples/alpaca_en.jsonl", "data_samples/exam"]
    forbidden = reference(files)
    for file in files[:2]:
        rows = contamination.sources.rows(file)
        for found, conversation in zip(forbidden.found_in(list(map(row_text, rows))), rows, strict=True):
            assert found == held_out(conversation), conversation
    folder = contamination.ROOT / "data_samples/exam"
    questions = [
        entry for file in sorted(folder.rglob("*.csv")) for entry in csv.DictReader(file.open(encoding="utf-8"))
    ]
    shuffled = [row(q["question"] + "".join(q[o] for o in "DBAC"), q["answer"]) for q in questions]
    assert len(questions) > 100
    assert all(forbidden.found_in(shuffled))


def test_a_broken_exam_is_named_by_its_file(tmp_path):
    (tmp_path / "broken.csv").write_text("id,question,A,B,C,D\n0,问,甲,乙,丙,丁\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"broken\.csv: no column 'answer'"):
        reference([str(tmp_path)])


def test_a_folder_without_questions_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no \.csv file of questions"):
        reference([str(tmp_path)])
