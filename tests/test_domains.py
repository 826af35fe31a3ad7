"""Rows of a profession: three ways to phrase them, whose answers they are, which articles they cite."""

import json

import pytest

from cvlib import ROOT, InputError, assets, domains, evaluation, messages
from cvlib.contamination import Reference
from cvlib.domains import Citation
from cvlib.duplicates import row_text


@pytest.fixture(scope="module")
def statutes():
    return domains.Statutes(assets.fetch("china-law"))


@pytest.fixture(scope="module")
def medical():
    return messages.read(ROOT / "data_samples" / "medical_qa.jsonl")


@pytest.fixture(scope="module")
def general():
    prompts = json.loads((ROOT / "data_samples" / "general_prompts.json").read_text(encoding="utf-8"))
    return [*prompts["Chinese"], *prompts["English"]]


def test_the_three_ways_differ_and_keep_question_and_answer(medical):
    for row in medical[:20]:
        asked = [domains.phrased(row, way)[0].content for way in domains.WAYS]
        assert len(set(asked)) == 3
        assert all(row[0].content in text for text in asked)
        assert all(domains.phrased(row, way)[1:] == row[1:] for way in domains.WAYS)


def test_an_instruction_moves_no_row_to_another_split(medical):
    split = list(map(messages.held_out, medical))
    for way in domains.WAYS:
        assert [messages.held_out(domains.phrased(row, way)) for row in medical] == split
    bare = [[messages.Message("user", domains.phrased(row, way)[0].content), row[1]] for row in medical]
    assert list(map(messages.held_out, bare)) != split


def test_several_instructions_are_all_used(medical):
    first = {domains.phrased(row, "five instructions")[0].content.partition("\n")[0] for row in medical}
    assert first == set(domains.SEVERAL)


def test_an_unknown_way_is_refused(medical):
    with pytest.raises(InputError, match="way 'doctor' is unknown; choose one of question only"):
        domains.phrased(medical[0], "doctor")


def test_tell_tales_of_doctors_are_in_doctors_answers_only(medical):
    """What chapter 10 prints as the rule's own errors, bounded; and the rule comes from training rows alone."""
    files = [ROOT / "data_samples" / f"{name}.jsonl" for name in ("belle_zh", "chat_zh", "guanaco_multi")]
    train, held_out = messages.split(row for file in files for row in messages.read(file))
    learnt, others = messages.split(medical)
    tales = domains.tell_tales((row[-1].content for row in learnt), (turn.content for row in train for turn in row))
    seen = [domains.sounds_like(row[-1].content[:30], tales) for row in others]
    wrong = [domains.sounds_like(row[-1].content[:30], tales) for row in held_out]
    assert sum(seen) / len(seen) > 0.8
    assert sum(wrong) / len(wrong) < 0.1
    assert not any(domains.sounds_like(turn.content, tales) for row in train for turn in row)


def test_general_prompts_are_nobodys_training_rows(general):
    assert len(set(general)) == len(general) == 24
    showcase = json.loads((ROOT / "data_samples" / "showcase.json").read_text(encoding="utf-8"))
    rows = [row_text(row) for file in (ROOT / "data_samples").glob("*.jsonl") for row in messages.read(file)]
    reference = Reference(general, [(text, "") for text in general])
    assert not any(reference.found_in(rows))
    assert not set(general) & set(showcase)


def test_citations_in_the_words_people_use():
    text = "《中华人民共和国民法典》第1071条、《劳动合同法》的第八十二条，《刑法》第一百三十三条之一；《史记》第三回。"
    found = ["《民法典》第一千零七十一条", "《劳动合同法》第八十二条", "《刑法》第一百三十三条之一"]
    assert list(map(str, domains.citations(text))) == found


@pytest.mark.parametrize(
    ("number", "written"),
    zip(
        ("1", "10", "11", "110", "101", "1000", "1010", "1260", "0", "007"),
        ("一", "十", "十一", "一百一十", "一百零一", "一千", "一千零一十", "一千二百六十", "零", "七"),
        strict=True,
    ),
)
def test_numbers_as_law_books_write_them(number, written):
    assert domains.chinese(number) == written


def test_every_article_of_the_database_reads_as_its_own_number(statutes):
    """`chinese` against the database's own two columns."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(assets.fetch("china-law"))) as database:
        pairs = database.execute("SELECT article_no_arabic, article_no FROM articles WHERE article_no LIKE '第%条'")
        for number, article in pairs:
            assert f"第{domains.chinese(str(number))}条" == article.replace("○", "零").replace("〇", "零")


def test_the_rows_own_citations_exist_and_an_invented_one_does_not(statutes):
    rows = [json.loads(line) for line in (ROOT / "data_samples" / "legal_qa.jsonl").read_text("utf-8").splitlines()]
    cited = [domains.citations(row["answer"])[0] for row in rows]
    assert [str(found) for found in cited] == [f"《{domains.short(row['law'])}》{row['article']}" for row in rows]
    assert all(map(statutes.exists, cited))
    assert not statutes.exists(Citation("民法典", "第一千二百六十一条"))
    assert not statutes.exists(Citation("机器人法", "第一条"))


def test_distractors_are_other_articles_of_the_same_law_and_always_the_same(statutes):
    right = Citation("民法典", "第一百四十五条")
    first = statutes.distractors(right, "能退吗？")
    assert first == statutes.distractors(right, "能退吗？") != statutes.distractors(right, "怎么办？")
    assert len({*first, right}) == 4
    assert all(statutes.exists(other) and other.law == "民法典" for other in first)
    with pytest.raises(InputError, match="no such article in force"):
        statutes.distractors(Citation("民法典", "第九千条"), "能退吗？")


def test_choices_are_scored_as_answers(model, tokenizer, statutes):
    right = Citation("民法典", "第一百四十五条")
    rows = domains.choices("能退吗？", [right, *statutes.distractors(right, "能退吗？")])
    found = evaluation.score(model, tokenizer, rows, "chatml")
    assert rows[0][-1].content == "《民法典》第一百四十五条"
    assert len(found.nll) == 4
    assert all(value > 0 for value in found.nll)


def test_a_broken_database_is_one_line(tmp_path):
    (tmp_path / "laws.db").write_text("no database", encoding="utf-8")
    with pytest.raises(InputError, match="no database of laws"):
        domains.Statutes(tmp_path / "laws.db")
