"""Files of pieces: the protobuf reader, the byte alphabet, corpora in the wrong encoding, outputs that failed."""

import struct

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import pre_tokenizers

from cvlib import InputError, assets
from cvlib.pieces import (
    BYTE_OF,
    Model,
    Piece,
    chinese_runs,
    common_characters,
    fields,
    from_byte_level,
    read_text,
    read_words,
    to_byte_level,
    written,
)

TEXT = "你好，world 2024! 😀 caf\u00e9\n\tdef f(x):  return x"


@pytest.fixture(scope="module")
def base():
    return assets.fetch("mistral-v1-tokenizer")


# ------------------------------------------------------------------------------------------------- protobuf by hand
def test_a_message_written_by_hand():
    message = b"\x08\x96\x01" + b"\x12\x03abc" + b"\x1d" + struct.pack("<f", 1.5) + b"\x21" + bytes(8)
    assert [(number, value) for number, value, _ in fields(message)] == [
        (1, 150),
        (2, b"abc"),
        (3, struct.pack("<f", 1.5)),
        (4, bytes(8)),
    ]
    assert [end for _, _, end in fields(message)] == [3, 8, 13, 22]


@pytest.mark.parametrize("message", [b"\x0a", b"\x0a\x05abc", b"\x1d\x00", b"\x96"])
def test_a_message_cut_short_is_noticed(message):
    with pytest.raises((IndexError, KeyError)):
        list(fields(message))


def test_a_real_model_reads_as_sentencepiece_reads_it(base):
    model, reference = Model.read(base), SentencePieceProcessor(model_file=str(base))
    ids = range(reference.get_piece_size())
    assert [piece.text for piece in model.pieces] == [reference.id_to_piece(i) for i in ids]
    assert [piece.score for piece in model.pieces] == [reference.get_score(i) for i in ids]
    assert [piece.kind == 3 for piece in model.pieces] == [reference.is_control(i) for i in ids]
    assert [piece.kind == 6 for piece in model.pieces] == [reference.is_byte(i) for i in ids]
    assert model.algorithm == "bpe"


def test_the_lowest_real_score_is_not_the_parked_whitespace(base):
    model = Model.read(base)
    assert min(piece.score for piece in model.pieces) == -1e9
    assert model.lowest() == -31740


def test_pieces_round_trip_and_the_rest_stays_to_the_byte(base, tmp_path):
    model, new = Model.read(base), [Piece("我们", -5.0), Piece("😀x", 0.25)]
    grown = tmp_path / "grown.model"
    grown.write_bytes(model.with_pieces(new))
    again = Model.read(grown)
    assert again.pieces == [*model.pieces, *new]
    assert again.proto[: model.end] == model.proto[: model.end]
    assert again.proto[again.end :] == model.proto[model.end :]
    assert SentencePieceProcessor(model_file=str(grown)).get_score(len(model.pieces)) == -5.0


def test_our_bytes_are_protobufs_bytes(base):
    pytest.importorskip("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(base.read_bytes())
    for text in ("我们", "▁x"):
        added = proto.pieces.add()
        added.piece, added.score = text, 0
    assert Model.read(base).with_pieces([Piece("我们"), Piece("▁x")]) == proto.SerializeToString()


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"<!doctype html>", b"", b"{}"])
def test_what_is_not_a_model_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "base.model"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"base\.model: not a SentencePiece model") as refusal:
        Model.read(path)
    assert "\n" not in str(refusal.value)


def test_a_model_cut_short_is_refused(base, tmp_path):
    path = tmp_path / "cut.model"
    path.write_bytes(base.read_bytes()[:10_001])
    with pytest.raises(InputError, match="not a SentencePiece model"):
        Model.read(path)


def test_an_overlong_piece_is_not_written():
    with pytest.raises(InputError, match="more than 120"):
        Piece("字" * 41).to_bytes()


# ---------------------------------------------------------------------------------------------------- the byte alphabet
def test_the_byte_alphabet_is_that_of_tokenizers():
    assert sorted(BYTE_OF) == sorted(pre_tokenizers.ByteLevel.alphabet())
    (cut,) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(TEXT)
    assert to_byte_level(TEXT) == cut[0]


def test_the_byte_alphabet_round_trips():
    assert from_byte_level(to_byte_level(TEXT)) == TEXT
    assert from_byte_level(to_byte_level("海")[1:]) == "‹b5 b7›"


# --------------------------------------------------------------------------------------------------------- corpora
def test_runs_are_weighed_by_hand(tmp_path):
    (tmp_path / "a.txt").write_text("我们去Beijing，我们。ok", encoding="utf-8")
    (tmp_path / "words.txt").write_text("我们 7 r\n北京\t3\nABC 9\n", encoding="utf-8")
    runs = chinese_runs([tmp_path / "a.txt"], [tmp_path / "words.txt"])
    assert runs == {"我们去": 10, "我们": 10 + 7, "北京": 3}


def test_gb2312_level_one_is_all_of_level_one():
    characters = common_characters()
    assert len(set(characters)) == 3755
    assert characters[-1] == "座"
    assert {"的", "我", "镕"} & set(characters) == {"的", "我"}  # 镕 is not in GB2312 at all


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("第一行\n中文".encode("gb18030"), r"text\.txt:1: GBK, not UTF-8; convert it: iconv"),
        (b"ok\n\xff\xff\xff", r"text\.txt:2: not UTF-8 text \(byte 0xff\)"),
        (b" \n", "is empty"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "中".encode())
    assert read_text(path) == "中"


def test_no_chinese_no_runs(tmp_path):
    path = tmp_path / "english.txt"
    path.write_text("only English here", encoding="utf-8")
    with pytest.raises(InputError, match="no Chinese character to learn from"):
        chinese_runs([path])


def test_a_word_without_a_count_is_named(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("北京\t3\n上海\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"words\.txt:2: '上海' is not a word and its count"):
        read_words(path)


# ---------------------------------------------------------------------------------------------------------- output
def write_and_fail(out):
    with written(out) as part:
        part.write_bytes(b"half")
        raise RuntimeError


def test_a_failed_write_leaves_nothing_and_a_good_one_only_the_file(tmp_path):
    out = tmp_path / "new" / "out.model"
    with pytest.raises(RuntimeError):
        write_and_fail(out)
    assert not out.parent.exists()
    with written(out) as part:
        part.write_bytes(b"whole")
    assert [path.name for path in out.parent.iterdir()] == ["out.model"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    out = tmp_path / "out.model"
    out.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        write_and_fail(out)
    assert out.read_bytes() == b"old"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="could not be written"), written(tmp_path / "file" / "out.model") as part:
        part.write_bytes(b"")
