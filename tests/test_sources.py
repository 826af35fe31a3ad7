"""`cvlib.sources`: small files by hand, the real assets, and files shaped as those on the hub."""

import csv
import json
import sqlite3
from collections import Counter, defaultdict

import pytest

from cvlib import InputError, assets, messages, mixture, sources


def texts(conversations):
    return [tuple(turn.content for turn in conversation) for conversation in conversations]


def idiom_file(tmp_path, *entries):
    path = tmp_path / "idiom.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ("word", "explanation", "example"))
        writer.writeheader()
        writer.writerows(dict(zip(("word", "explanation", "example"), entry, strict=True)) for entry in entries)
    return path


def law_file(tmp_path, *articles):
    path = tmp_path / "laws.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE articles (id INTEGER PRIMARY KEY, law_name, status, article_no, article_text)")
        database.executemany("INSERT INTO articles VALUES (NULL, ?, ?, ?, ?)", articles)
    return path


def test_a_pair_becomes_two_rows_by_hand(tmp_path):
    path = tmp_path / "pairs.json"
    pairs = {"我走了。": "I'm off.", "树在动。": "placeholder-p1", "他来了。": "PH"}
    entries = [{"chinese": chinese, "translation": {"en": english}} for chinese, english in pairs.items()]
    path.write_text(json.dumps(entries), encoding="utf-8")
    (into_english, english), (into_chinese, chinese) = texts(sources.sentence_pairs(path))
    assert (english, chinese) == ("I'm off.", "我走了。")
    assert into_english in [form.format(text="我走了。", short="我走了") for form in sources.INTO_ENGLISH]
    assert into_chinese in [form.format(text="I'm off.", short="I'm off") for form in sources.INTO_CHINESE]


def test_idioms_by_hand(tmp_path):
    path = idiom_file(
        tmp_path,
        ("不能自拔", "拔摆脱。不能主动解脱出来。", "他沉迷其中，～。"),
        ("一落千丈", "原指琴声陡然降落◇形容急剧下降。", "声势～。★蔡东藩《演义》"),
        ("守口如瓶", "同守口如甁”。形容说话谨慎。", "断了的引号～”。"),
        ("七上八下", "无", "无"),
        ("八仙过海，各显神通", "比喻各有办法。", "无"),
    )
    rows = texts(sources.idioms(path))
    assert [answer for _, answer in rows] == [
        "不能主动解脱出来。",
        "他沉迷其中，不能自拔。",
        "原指琴声陡然降落。后形容急剧下降。",
        "声势一落千丈。（蔡东藩《演义》）",
        "形容说话谨慎。",
    ]
    assert rows[1][0] in [form.format(word="不能自拔") for form in sources.USE]
    assert rows[3][0] in [form.format(word="一落千丈") for form in sources.QUOTE]


def test_laws_by_hand(tmp_path):
    path = law_file(
        tmp_path,
        ("中华人民共和国水法", "现行有效", "第三条", "水资源属于国家所有 ， 由国务院行使。另有规定的除外。"),
        ("中华人民共和国水法", "现行有效", "第四条", "本法自公布之日起开始施行有效。"),
        ("森林法", "现行有效", "第九条", "本法自公布之日起开始施行有效。"),
        ("旧法", "已废止", "第一条", "这一条已经废止，不应当再有人提起它。"),
        ("刑法修正案", "现行有效", "全文", "将第一条修改为下面这样的一句话。"),
    )
    rows = texts(sources.laws(path))
    assert rows[0][1] == "水资源属于国家所有，由国务院行使。另有规定的除外。"
    assert "水资源属于国家所有，由国务院行使" in rows[1][0]
    assert rows[1][1] in ("出自《水法》第三条。", "出自《中华人民共和国水法》第三条。")
    assert len(rows) == 4  # three articles in force, one of which has a first sentence of its own


@pytest.mark.parametrize("name", sources.TEXTS)
def test_the_same_rows_in_the_same_order_and_none_asked_alike(name):
    rows = texts(sources.rows(name))
    assert rows == texts(row for _, row in sources.scan(name))
    assert all(question.strip() and answer.strip() for question, answer in rows)
    beginnings = Counter(question[:4] for question, _ in rows)
    assert beginnings.most_common(1)[0][1] < 0.25 * len(rows)


def test_each_phrasing_is_picked_about_equally():
    count = Counter(sources.pick("abcdef", str(number)) for number in range(6000))
    assert sorted(count) == list("abcdef")
    assert max(count.values()) - min(count.values()) < 150  # 5 standard deviations of a count


def test_every_law_row_is_in_force_and_word_for_word():
    with sqlite3.connect(assets.fetch("china-law")) as database:
        rows = database.execute("SELECT article_text FROM articles WHERE status = '现行有效'")
        in_force = {"".join(text.split()) for (text,) in rows}
    said = [row[1].content for row in sources.rows("china-law") if not row[1].content.startswith("出自《")]
    assert len(said) > 20_000
    assert all("".join(text.split()) in in_force for text in said)


def test_translation_round_trip():
    """What one row of a pair asks for is what the other translates back."""
    rows = sources.rows("hsk-sentences")
    for to_english, to_chinese in zip(rows[::2], rows[1::2], strict=True):
        assert to_chinese[1].content.rstrip("。") in to_english[0].content
        assert to_english[1].content.rstrip(".") in to_chinese[0].content


@pytest.mark.parametrize("name", sources.TEXTS)
def test_rows_of_one_entry_fall_on_the_same_side(name, tmp_path):
    """Both directions of a pair, both rows of an idiom, both rows of an article; also once they were mixed and read."""
    sides = defaultdict(set)
    for row in (rows := sources.rows(name)):
        sides[row[0].entry].add(messages.held_out(row))
    assert "" not in sides
    assert all(len(side) == 1 for side in sides.values())
    assert len(sides) < len(rows)
    assert 0.18 < sum(side == {True} for side in sides.values()) / len(sides) < 0.22


def test_no_held_out_pair_is_trained_the_other_way_round(tmp_path):
    mixture.mix(mixture.Plan({"hsk-sentences": 1}), tmp_path / "mix.jsonl")
    learnt = messages.read(tmp_path / "mix.jsonl")
    assert not any(map(messages.held_out, learnt))  # training splits the mix once more, and must lose nothing
    held = [row for row in sources.rows("hsk-sentences") if messages.held_out(row)]
    entries = {row[0].entry for row in held}
    assert len(held) > 1000
    assert not any(row[0].entry in entries or row[1].content in entries for row in learnt)


SHAPES = {
    "belle": ({"instruction": "你好", "input": "", "output": "您好"}, ["你好", "您好"]),
    "guanaco": (
        {"instruction": "再说一次", "input": "User:早\nAssistant:早上好", "output": "早上好！"},
        ["早", "早上好", "再说一次", "早上好！"],
    ),
    "guanaco-belle": ({"instruction": "译成英文", "input": "水", "output": "water"}, ["译成英文\n水", "water"]),
    "alpaca-zh": ({"instruction": "水的分子式？", "input": "", "output": "H₂O"}, ["水的分子式？", "H₂O"]),
    "cmedqa2": ({"instruction": "头痛怎么办？", "input": "", "output": "先休息。"}, ["头痛怎么办？", "先休息。"]),
    "lawyer-llama": (
        {
            "instruction": "那押金呢？",
            "input": "",
            "output": "应退。",
            "history": [["租约到期？", "可续租。"]],
            "source": "x",
        },
        ["租约到期？", "可续租。", "那押金呢？", "应退。"],
    ),
    "sharegpt-zh": (
        {
            "conversation_id": "1",
            "conversation": [{"human": "嗨", "assistant": "你好"}, {"human": "忙吗", "assistant": "不忙"}],
        },
        ["嗨", "你好", "忙吗", "不忙"],
    ),
}


@pytest.mark.parametrize("name", sources.HUB)
def test_a_file_of_the_shape_published_on_the_hub(name, tmp_path, monkeypatch):
    row, expected = SHAPES[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for _ in range(3)), encoding="utf-8")
    there = sources.HUB[name]
    monkeypatch.setitem(sources.HUB, name, sources.HubSet("json", there.licence, (str(path),), there.shape))
    assert texts(sources.rows(name)) == [tuple(expected)] * 3


def test_a_broken_row_is_named_and_the_rest_goes_on():
    good, bad = {"instruction": "问", "input": None, "output": "答"}, {"instruction": "问", "input": "", "output": " "}
    found = [row for _, row in sources.shaped("belle", [good, bad, good])]
    assert [isinstance(row, InputError) for row in found] == [False, True, False]
    assert "belle:2: ValueError, the assistant's text is empty" in str(found[1])
    ((_, broken),) = sources.shaped("sharegpt-zh", [{"conversation": [{"human": "嗨"}]}])
    assert "KeyError" in str(broken)


def test_a_file_is_a_source_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "问", "answer": "答"}\n', encoding="utf-8")
    assert texts(sources.rows(str(path))) == [("问", "答")]
    assert len(sources.rows("data_samples/alpaca_en.jsonl")) == 200


def test_an_unknown_source_names_the_known_ones():
    with pytest.raises(InputError, match=r"bell: no such file or source; .* one of hsk-sentences"):
        sources.rows("bell")


def test_a_hub_out_of_reach_names_the_remedy(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(InputError, match=r"BelleGroup.*no route.*HF_ENDPOINT"):
        sources.rows("belle")
