"""Growing a SentencePiece and a byte-level base: nothing lost, dead or changed, or nothing written."""

import json
import os
import subprocess
import sys

import pytest
from sentencepiece import SentencePieceProcessor
from test_vocabulary import byte_level
from tokenizers import Tokenizer

from cvlib import InputError, extension, vocabulary
from cvlib.extension import extend, merge_rules, packaged_corpus
from cvlib.pieces import HAN, Model, Piece, common_characters, from_byte_level, to_byte_level

MIXED = [
    "你好，我是学生。",
    "老师 says hello",
    "2024年3月，版本v1.2",
    "😀😀 好！",
    "def 函数(x): return x",
    "ひらがな 漢字 한국어",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return packaged_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def sentences(corpus):
    return corpus.texts[2]


@pytest.fixture(scope="module")
def grown(base, sentences, tmp_path_factory):
    return extend(base, [sentences], tmp_path_factory.mktemp("grown") / "zh.model", 1200)


@pytest.fixture(scope="module")
def byte_grown(byte_base, sentences, tmp_path_factory):
    return extend(byte_base, [sentences], tmp_path_factory.mktemp("byte-grown") / "grown", 600, common=True)


@pytest.fixture(scope="module")
def byte_base(tmp_path_factory):
    """A small byte-level base with merges inside Chinese characters, across two of them, and in other scripts."""
    folder = tmp_path_factory.mktemp("byte-base")
    texts = ["the people of 2024", "的的 中国 中国人", "아름다운", "ひらがな", "😀😃", *"一丁七万丈三上下"] * 3
    byte_level(folder / "tokenizer.json", texts, size=340, special=("<|end|>", "<|user|>"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


# -------------------------------------------------------------------------------------------------- SentencePiece
def test_nothing_is_lost_dead_or_changed(base, grown):
    again = vocabulary.audit(grown.path, base, extension.probes())
    assert (len(again.lost), len(again.dead), len(again.changed)) == (0, 0, 0)
    assert again == grown.audit
    assert again.size == 32_000 + 1200 == 32_000 + len(grown.added)
    assert all(HAN.fullmatch(piece) for piece in grown.added)


def test_new_pieces_rank_below_the_base_in_order(grown):
    added = Model.read(grown.path).pieces[32_000:]
    assert added == [Piece(text, -31_741.0 - rank) for rank, text in enumerate(grown.added)]


def test_unseen_chinese_takes_fewer_tokens(base, grown, corpus):
    before, after = (vocabulary.fertility(path, corpus.held_out["hsk"]) for path in (base, grown.path))
    assert after.tokens_per_character < 0.8 * before.tokens_per_character


def test_a_smaller_growth_is_a_prefix_of_a_larger_one(base, sentences, grown, tmp_path):
    small = extend(base, [sentences], tmp_path / "small.model", 300)
    assert small.added == grown.added[:300]
    assert Model.read(small.path).pieces == Model.read(grown.path).pieces[:32_300]


def test_growing_is_deterministic_whatever_the_hash_seed(base, sentences, grown, tmp_path):
    code = "import sys; from cvlib.extension import extend; extend(sys.argv[1], [sys.argv[2]], sys.argv[3], 1200)"
    out = tmp_path / "again.model"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, base, sentences, out], env=environment, check=True)
    assert out.read_bytes() == grown.path.read_bytes()


def test_the_size_can_be_rounded_up_with_useful_pieces(base, sentences, grown, tmp_path):
    rounded = extend(base, [sentences], tmp_path / "rounded.model", 290, multiple=64)
    assert rounded.audit.size == 32_320 == 64 * 505
    assert rounded.added == grown.added[:320]


def test_common_characters_come_first(base, sentences, tmp_path):
    have = {piece.text for piece in Model.read(base).pieces}
    wanted = [character for character in common_characters() if character not in have]
    out = extend(base, [sentences], tmp_path / "common.model", len(wanted) + 10, common=True)
    assert sorted(out.added[: len(wanted)]) == sorted(wanted)
    assert all(len(cut) == 1 for cut in vocabulary.load(out.path).spell(common_characters()))


def test_transformers_gives_the_same_ids(base, grown, tmp_path):
    pytest.importorskip("google.protobuf", reason="transformers needs protobuf to read a .model file")
    from transformers import LlamaTokenizer

    (tmp_path / "tokenizer.model").write_bytes(grown.path.read_bytes())
    reference, ours = SentencePieceProcessor(model_file=str(grown.path)), LlamaTokenizer.from_pretrained(tmp_path)
    for text in MIXED:
        assert ours.encode(text, add_special_tokens=False) == reference.encode(text), text
    # Upstream differences that any LLaMA-family model has, grown or not:
    (tmp_path / "tokenizer.model").write_bytes(base.read_bytes())
    plain, before = LlamaTokenizer.from_pretrained(tmp_path), SentencePieceProcessor(model_file=str(base))
    for text in ("two  spaces", " a leading space", "    indented"):
        assert plain.tokenize(text) != before.encode(text, out_type=str), text


# ----------------------------------------------------------------------------------------------------- byte-level
def test_a_byte_level_base_grows(byte_grown):
    out, audit = byte_grown, byte_grown.audit
    assert (len(audit.lost), len(audit.dead), len(audit.changed)) == (0, 0, 0)
    assert audit.bridges > 0
    assert audit.added == 600
    for piece in out.added:
        assert HAN.fullmatch(from_byte_level(piece)) or vocabulary.is_bridge(piece)
    loaded = Tokenizer.from_file(str(out.path / "tokenizer.json"))
    assert all(loaded.decode(loaded.encode(text).ids) == text for text in MIXED)


def test_special_tokens_keep_their_ids(byte_base, byte_grown):
    from transformers import AutoTokenizer

    out = byte_grown
    before, after = AutoTokenizer.from_pretrained(byte_base), AutoTokenizer.from_pretrained(out.path)
    for special in ("<|end|>", "<|user|>"):
        assert before.convert_tokens_to_ids(special) == after.convert_tokens_to_ids(special)
    assert after.encode("你好<|end|>")[-1] == before.eos_token_id == after.eos_token_id
    assert len(after) == len(before) + 600
    reference = Tokenizer.from_file(str(out.path / "tokenizer.json"))
    assert [after.encode(text) for text in MIXED] == [reference.encode(text).ids for text in MIXED]


def test_byte_level_growth_is_a_prefix_too(byte_base, byte_grown, sentences, tmp_path):
    small = extend(byte_base, [sentences], tmp_path / "small", 100, common=True)
    assert small.added == byte_grown.added[:100]
    few, many = (
        json.loads((out.path / "tokenizer.json").read_bytes())["model"]["merges"] for out in (small, byte_grown)
    )
    assert few == many[: len(few)]


def test_the_running_model_grows(sentences, tmp_path):
    from cvlib.loading import resolve

    out = extend(resolve("smollm2-135m"), [sentences], tmp_path / "grown", 512, multiple=64)
    assert out.audit.size == 49_152 + 512
    assert vocabulary.load(out.path).encode(["2024"]) == vocabulary.load(resolve("smollm2-135m")).encode(["2024"])


def test_rules_for_an_old_piece_whose_halves_come_later():
    """甲乙 exists, made in some other way; once 乙 is a piece, 甲 + 乙 must join as well, before anything later."""
    jia, yi = to_byte_level("甲"), to_byte_level("乙")
    rules = merge_rules([yi], {jia, jia + yi, yi[:2], yi[2]})
    assert rules == [(yi[:2], yi[2]), (jia, yi)]


# ------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("scores", [0.0, -40_000.0])
def test_a_growth_that_does_harm_is_not_written(base, sentences, tmp_path, monkeypatch, scores):
    """Above the base the new pieces cut old ones in two (lost); 甲乙丙 below it has no halves (dead)."""
    extra = [Piece("eo", scores)] if scores == 0 else [Piece("甲乙丙", scores)]
    monkeypatch.setattr(extension, "_grow_model", lambda source, new: Model.read(source).with_pieces(extra))
    with pytest.raises(InputError, match="lost by this growth" if scores == 0 else "dead by this growth") as refusal:
        extend(base, [sentences], tmp_path / "new" / "zh.model", 10)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_change_in_another_script_is_noticed(byte_base, sentences, tmp_path, monkeypatch):
    """Bytes that continue a character are shared: joining two of them changes Korean, emoji and more."""

    tail, honest = to_byte_level("한")[1:], extension._grow_json
    monkeypatch.setattr(extension, "_grow_json", lambda source, new: honest(source, [tail]))
    with pytest.raises(InputError, match="changed by this growth"):
        extend(byte_base, [sentences], tmp_path / "new", 10)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line_and_no_file(base, sentences, tmp_path):
    gbk, empty, web = tmp_path / "gbk.txt", tmp_path / "empty.txt", tmp_path / "web.model"
    gbk.write_bytes("中文".encode("gb18030"))
    empty.write_text("", encoding="utf-8")
    web.write_text("<html>", encoding="utf-8")
    before = set(tmp_path.iterdir())
    for start, text, pieces, message in (
        (web, sentences, 10, "not a SentencePiece model"),
        (base, gbk, 10, "GBK"),
        (base, empty, 10, "empty"),
        (base, sentences, 10**6, "give more text or ask for fewer"),
        (tmp_path, sentences, 10, "No such file"),
    ):
        with pytest.raises(InputError, match=message) as refusal:
            extend(start, [text], tmp_path / "out.model", pieces)
        assert "\n" not in str(refusal.value)
    assert set(tmp_path.iterdir()) == before


def test_the_base_is_never_overwritten(base, sentences, byte_base):
    with pytest.raises(InputError, match="overwrite the base"):
        extend(base, [sentences], base, 10)
    with pytest.raises(InputError, match="overwrite the base"):
        extend(byte_base, [sentences], byte_base, 10)


# -------------------------------------------------------------------------------------------------------- corpus
def test_the_held_out_text_is_fixed_and_never_trained_on(corpus):
    for path in corpus.texts:
        learnt, held = path.read_text(encoding="utf-8").splitlines(), corpus.held_out[path.stem].splitlines()
        assert not set(held) & set(learnt)
    assert {name: len(text) for name, text in corpus.held_out.items()} == {"law": 156899, "idiom": 111070, "hsk": 2140}
