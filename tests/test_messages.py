"""Rows: every published shape becomes the same conversation, and a bad row is named by file and line."""

import json

import pytest

from cvlib import InputError
from cvlib.messages import Message, from_row, held_out, read, scan, split

U, A, S = "user", "assistant", "system"


def turns(row):
    return [(turn.role, turn.content) for turn in from_row(row)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "你好", "input": "", "output": "好"}, [(U, "你好"), (A, "好")]),
        ({"instruction": "你好", "output": "好"}, [(U, "你好"), (A, "好")]),
        ({"instruction": "你好", "input": None, "output": "好"}, [(U, "你好"), (A, "好")]),
        ({"instruction": "翻译", "input": "水", "output": "water"}, [(U, "翻译\n水"), (A, "water")]),
        ({"instruction": "", "input": "水是什么？", "output": "H2O"}, [(U, "水是什么？"), (A, "H2O")]),
        (
            {"instruction": "再短些", "input": "User:写诗\nAssistant:春眠\n不觉晓", "output": "春"},
            [(U, "写诗"), (A, "春眠\n不觉晓"), (U, "再短些"), (A, "春")],
        ),
        (
            {"instruction": "c", "input": "User: a\nAssistant: b\nUser：x\nAssistant：y", "output": "d"},
            [(U, "a"), (A, "b"), (U, "x"), (A, "y"), (U, "c"), (A, "d")],
        ),
        (  # a passage that only mentions the words
            {"instruction": "总结", "input": "他说 User: 是用户", "output": "x"},
            [(U, "总结\n他说 User: 是用户"), (A, "x")],
        ),
        ({"input": ["a", "b"], "output": ["1", "2"]}, [(U, "a"), (A, "1"), (U, "b"), (A, "2")]),
        ({"instruction": "", "input": ["a"], "output": ["1"]}, [(U, "a"), (A, "1")]),
        ({"question": "头疼怎么办", "answer": "休息"}, [(U, "头疼怎么办"), (A, "休息")]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [(U, "q"), (A, "a")],
        ),
        (
            {"messages": [{"role": S, "content": "s"}, {"role": U, "content": "q"}, {"role": A, "content": "a"}]},
            [(S, "s"), (U, "q"), (A, "a")],
        ),
        ({"instruction": " \n你好 ", "output": "\n\n好\n"}, [(U, "你好"), (A, "好")]),
    ],
)
def test_every_shape_by_hand(row, expected):
    assert turns(row) == expected


def test_shapes_of_one_talk_agree():
    pairs = [("一", "1"), ("二", "2"), ("三", "3")]
    flat = [text for pair in pairs for text in pair]
    said = [Message((U, A)[i % 2], text) for i, text in enumerate(flat)]
    history = "\n".join(f"User:{q}\nAssistant:{a}" for q, a in pairs[:-1])
    rows = [
        {"input": [q for q, _ in pairs], "output": [a for _, a in pairs]},
        {"instruction": pairs[-1][0], "input": history, "output": pairs[-1][1]},
        {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(flat)]},
        {"messages": [{"role": (U, A)[i % 2], "content": text} for i, text in enumerate(flat)]},
    ]
    assert all(from_row(row) == said for row in rows)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input": "x", "output": "y"}, 'no key "instruction"'),
        ({"output": "y"}, 'no key "instruction"'),
        ({"instruction": "x"}, 'no key "output"'),
        ({"instruction": "x", "output": ""}, "the assistant's text is empty"),
        ({"instruction": " ", "output": "y"}, "the user's text is empty"),
        ({"instruction": 3, "output": "y"}, '"instruction" must be text; found int'),
        ({"question": "x"}, 'no key "answer"'),
        ({"prompt": "x"}, "'prompt' match no known shape"),
        ({}, "none match no known shape"),
        (["x"], "found list"),
        ("x", "found str"),
        ({"input": ["a"], "output": ["1", "2"]}, "same length"),
        ({"input": ["a"], "output": "1"}, "same length"),
        ({"input": [1], "output": ["1"]}, "the user's text is empty"),
        ({"input": [], "output": []}, "turns must go"),
        ({"messages": "x"}, '"messages" must be a list'),
        ({"messages": ["x"]}, '"messages" must be a list'),
        ({"messages": []}, "turns must go"),
        ({"messages": [{"role": U, "content": "x"}]}, "turns must go"),
        ({"messages": [{"role": A, "content": "x"}, {"role": U, "content": "x"}]}, "turns must go"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "\"role\" is 'tool'; use one of human, gpt"),
        ({"messages": [{"role": [U], "content": "x"}]}, "\"role\" is ['user']"),
        ({"messages": [{"content": "x"}]}, '"role" is None'),
        ({"conversations": [{"from": "human"}]}, 'no key "value"'),
        ({"instruction": "x\ud83d", "output": "y"}, "half a character"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        from_row(row)
    assert words in str(caught.value)


# files

GOOD = '{"instruction": "你好", "output": "好"}\n'


def saved(folder, content, name="rows.jsonl", encoding="utf-8"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_encodings_and_line_ends(codec, end, tmp_path):
    path = saved(tmp_path, GOOD.strip() + end + GOOD.strip(), encoding=codec)
    assert read(path) == [[Message(U, "你好"), Message(A, "好")]] * 2


@pytest.mark.parametrize("before", ["", "\n", " \r\n\t"])
def test_a_json_array(before, tmp_path):
    rows = [json.loads(GOOD)] * 3
    assert len(read(saved(tmp_path, before + json.dumps(rows, indent=1), "rows.json"))) == 3


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    row = {"instruction": "a\u2028b\x85c", "output": "ok"}
    assert read(saved(tmp_path, json.dumps(row, ensure_ascii=False)))[0][0].content == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"instruction": "x", "output":', "not valid JSON"),
        ('{"input": "x", "output": "y"}', 'no key "instruction"'),
        ("[1]", "found list"),
        ('{"instruction": ' + "[" * 100_000, "too deep"),
    ],
)
def test_line_17_is_named(line, words, tmp_path):
    path = saved(tmp_path, GOOD * 8 + "\n" * 2 + GOOD * 6 + line + "\n" + GOOD)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:17: ")
    assert words in str(caught.value)
    assert "mend or remove this" in str(caught.value)


def test_scan_goes_on_after_a_bad_row(tmp_path):
    found = list(scan(saved(tmp_path, GOOD + "oops\n" + GOOD + '{"a": 1}\n')))
    assert [number for number, _ in found] == [1, 2, 3, 4]
    assert [isinstance(item, InputError) for _, item in found] == [False, True, False, True]


def test_an_array_names_the_place_of_a_bad_row(tmp_path):
    with pytest.raises(InputError, match=r"rows\.json:2: .*no key"):
        read(saved(tmp_path, json.dumps([json.loads(GOOD), {"output": "x"}]), "rows.json"))
    with pytest.raises(InputError, match=r"rows\.json:2: not a valid JSON array"):
        read(saved(tmp_path, "[\n oops ]", "rows.json"))


@pytest.mark.parametrize("content", ["", "\n \n", "[]", "\ufeff"])
def test_an_empty_file(content, tmp_path):
    with pytest.raises(InputError, match="no rows in this file; give at least one"):
        read(saved(tmp_path, content))


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="this is a folder"):
        read(tmp_path)


@pytest.mark.parametrize("codec", ["utf-8", "gb18030"])
@pytest.mark.parametrize("before", [10, 40_000])  # within the first megabyte, which tells the encoding, and beyond it
def test_a_line_of_broken_bytes_is_one_bad_row(codec, before, tmp_path):
    bad = b'{"instruction": "\xff", "output": "x"}\n'
    path = saved(tmp_path, GOOD.encode(codec) * before + bad + GOOD.encode(codec))
    found = list(scan(path))
    assert [number for number, row in found if isinstance(row, InputError)] == [before + 1]
    assert found[-1] == (before + 2, [Message(U, "你好"), Message(A, "好")])
    name = "UTF-8" if codec == "utf-8" else "GB18030"
    with pytest.raises(InputError, match=rf"rows\.jsonl:{before + 1}: byte 0xff does not belong in {name}; mend"):
        read(path)


def test_a_character_cut_in_two_does_not_turn_utf8_into_gb18030(tmp_path):
    whole = '{"instruction": "请问你好", "output": "好的"}\n'.encode()
    cut = whole.replace("问".encode(), "问".encode()[:1])
    assert all("output" in line.decode("gb18030") for line in (whole, cut))  # valid by chance, and nonsense
    found = list(scan(saved(tmp_path, whole * 3 + cut + whole)))
    assert [isinstance(row, InputError) for _, row in found] == [False, False, False, True, False]
    assert found[-1][1][0].content == "请问你好"


def test_a_file_of_no_encoding_is_refused_whole(tmp_path):
    with pytest.raises(InputError, match=r"rows\.jsonl: neither UTF-8 nor GB18030; save the file as UTF-8"):
        read(saved(tmp_path, GOOD.encode("utf-16")))


def test_an_array_with_broken_bytes_names_their_line(tmp_path):
    rows = json.dumps([json.loads(GOOD)] * 3, ensure_ascii=False, indent=0).encode()
    with pytest.raises(InputError, match=r"rows\.json:17: byte 0xff does not belong in UTF-8; save"):
        read(saved(tmp_path, rows + b"\n\n\n\xff", "rows.json"))


# the held-out split


def test_the_split_knows_the_question_only(talk):
    rows = [talk(f"问题{n}", "甲") for n in range(200)]
    longer = [talk(f" 问题{n}\n", "乙", "再问", "丙", system="x") for n in range(200)]
    assert [held_out(row) for row in rows] == [held_out(row) for row in longer]


def test_rows_of_one_entry_are_held_out_together(talk):
    rows = [[Message(U, f"问题{n}", f"entry {n // 3}"), Message(A, "甲")] for n in range(300)]
    sides = [held_out(row) for row in rows]
    assert sides[::3] == sides[1::3] == sides[2::3]
    assert 10 < sum(sides[::3]) < 35
    assert sides[::3] == [held_out(talk(f"entry {n}", "x")) for n in range(100)]


def test_an_entry_is_written_and_read_back(talk):
    row = [Message(U, "问", "entry"), Message(A, "答")]
    again = from_row({"messages": [turn.row() for turn in row]})
    assert [turn.entry for turn in again] == ["entry", ""]
    assert again == row == talk("问", "答")  # it is no part of what is said
    assert talk("问", "答")[0].row() == {"role": U, "content": "问"}


def test_the_split_does_not_know_the_order(talk):
    rows = [talk(f"问题{n}", "甲") for n in range(200)]
    train, test = split(rows)
    again = split([*reversed(rows), talk("更多", "x")])
    key = lambda row: row[0].content  # noqa: E731
    assert sorted(test, key=key) == sorted((row for row in again[1] if row[0].content != "更多"), key=key)
    assert len(train) + len(test) == 200
    assert 20 <= len(test) <= 60


def test_the_split_never_changes(talk):
    """These five were decided by SHA-256 and stand in trained adapters' cards: a new rule would leak held-out rows."""
    questions = ["请介绍一下北京。", "天空为什么是蓝色的？", "1+1等于几？", "Hello", "写一首诗。"]
    by_hand = [int(digest, 16) < 0.2 * 2**64 for digest in DIGESTS]
    assert [held_out(talk(question, "x")) for question in questions] == by_hand


# the first 16 digits of `printf %s QUESTION | sha256sum`
DIGESTS = ("b1146626706cf762", "9bb2ca74d332bdbf", "1e6c1e89478a0e41", "185f8db32271fe25", "64b6270ae902e13c")
