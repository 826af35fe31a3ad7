"""Exam folders as published, each subject in its one category, and what cannot be asked."""

import json
from collections import Counter

import pytest

from cvlib import ROOT, InputError, questions

KNOWN = json.loads((ROOT / "cvlib" / "subjects.json").read_text(encoding="utf-8"))
CEVAL = "id,question,A,B,C,D,answer,explanation\n0,一加一？,1,2,3,4,B,因为\n1,二加二？,4,5,6,7,A,\n"
CMMLU = ",Question,A,B,C,D,Answer\n0,一加一？,1,2,3,4,B\n1,二加二？,4,5,6,7,A\n"


def put(folder, **files):
    """Files by name, dots for slashes: `dev.law` is dev/law.csv."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_both_layouts_are_read_as_published(tmp_path):
    ceval = put(tmp_path / "ceval", dev__law_dev=CEVAL, val__law_val=CEVAL, test__law_test="id,question,A,B,C,D\n")
    cmmlu = put(tmp_path / "cmmlu", dev__agronomy=CMMLU, test__agronomy=CMMLU)
    (law,), (agronomy,) = questions.read(ceval, shots=2), questions.read(cmmlu, shots=1)
    assert (law.name, law.zh, law.category, law.china) == ("law", "法学", "Humanities", False)
    assert (agronomy.name, agronomy.zh, agronomy.category) == ("agronomy", "农学", "Other")
    assert law.questions == agronomy.questions == law.examples
    assert len(agronomy.examples) == 1
    assert law.questions[0] == questions.Question("一加一？", ("1", "2", "3", "4"), "B")
    assert law.questions[0].right == "2"
    assert law.heading == "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"


@pytest.mark.parametrize("codec", ["utf-8-sig", "gb18030"])
def test_files_from_windows(codec, tmp_path):
    put(tmp_path, val__law_val="")
    (tmp_path / "val/law_val.csv").write_text(CEVAL.replace("\n", "\r\n"), encoding=codec)
    assert questions.read(tmp_path, shots=0)[0].questions[1].text == "二加二？"


def test_the_limit_is_of_each_subject(tmp_path):
    put(tmp_path, val__law_val=CEVAL, val__logic_val=CEVAL)
    assert [len(subject.questions) for subject in questions.read(tmp_path, shots=0, limit=1)] == [1, 1]


def test_every_published_subject_has_one_category():
    """The slip of FACTS: the mark "China specific" took 15 subjects out of their own categories."""
    ceval, cmmlu = (Counter(about["category"] for about in KNOWN[exam].values()) for exam in ("C-Eval", "CMMLU"))
    assert ceval == {"STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11}
    assert cmmlu == {"STEM": 17, "Humanities": 13, "Social Science": 22, "Other": 15}
    china = {name: about["category"] for name, about in KNOWN["CMMLU"].items() if about.get("china")}
    assert len(china) == 15
    assert (china["chinese_history"], china["ethnology"]) == ("Humanities", "Social Science")


def test_the_subjects_are_lm_evals():
    import re
    from pathlib import Path

    tasks = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    for exam, folder in (("C-Eval", "ceval"), ("CMMLU", "cmmlu")):
        pairs = re.findall(r'^    "(\w+)": "(.+)",$', (tasks / folder / "_generate_configs.py").read_text(), re.M)
        assert dict(pairs) == {name: about["zh"] for name, about in KNOWN[exam].items()}


def test_a_folder_with_subjects_of_its_own(tmp_path):
    put(tmp_path, val__cooking_val=CEVAL)
    (subject,) = questions.read(tmp_path, shots=0)
    assert (subject.zh, subject.category) == ("cooking", "Other")
    (tmp_path / "subjects.json").write_text('{"cooking": {"zh": "烹饪", "category": "Life"}}', encoding="utf-8")
    (subject,) = questions.read(tmp_path, shots=0)
    assert (subject.zh, subject.category) == ("烹饪", "Life")
    for broken in ("[]", "{", '{"cooking": "烹饪"}'):
        (tmp_path / "subjects.json").write_text(broken, encoding="utf-8")
        with pytest.raises(InputError, match=r"subjects\.json: write "):
            questions.read(tmp_path, shots=0)


HEAD = "id,question,A,B,C,D,answer\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,question,A,B,C,answer\n0,问,1,2,3,A\n", r"law_val\.csv: no column 'd'; write question, A, B, C, D"),
        ("", r"law_val\.csv: no column 'question'"),
        (HEAD + "0,问,1,2,3,4,E\n", r"law_val\.csv:2: the answer is 'E'; write A, B, C or D"),
        (HEAD + "0,问,1,2,3,4,A\n1,问,1,2,3,4,\n", r"law_val\.csv:3: the answer is ''; write A, B, C or D"),
        (HEAD + "0,问,1,2,3,4,AB\n", r"law_val\.csv:2: the answer is 'AB'"),
        (HEAD + "0,问,1,2\n", r"law_val\.csv:2: 4 columns of 7; mend this row"),
        (HEAD + "0, ,1,2,3,4,A\n", r"law_val\.csv:2: no question or no text for A"),
        (HEAD + "0,问,,2,3,4,A\n", r"law_val\.csv:2: no question or no text for A"),
        (HEAD, r"law_val\.csv: no questions in this file"),
    ],
)
def test_what_cannot_be_asked(text, words, tmp_path):
    with pytest.raises(InputError, match=words) as refused:
        questions.read(put(tmp_path, val__law_val=text), shots=0)
    assert "\n" not in str(refused.value)


def test_a_folder_that_is_no_exam(tmp_path):
    with pytest.raises(InputError, match=r"no \.csv files in val/ or test/; name an exam folder"):
        questions.read(tmp_path)


def test_worked_examples_that_are_not_there(tmp_path):
    put(tmp_path, val__law_val=CEVAL)
    with pytest.raises(InputError, match=r"dev/law_dev\.csv: no such file"):
        questions.read(tmp_path, shots=1)
    put(tmp_path, dev__law_dev=CEVAL)
    with pytest.raises(InputError, match="law has 2 worked examples in dev/; ask with fewer --shots"):
        questions.read(tmp_path, shots=5)
