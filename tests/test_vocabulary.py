"""Loading, training, merging, auditing and counting, each against SentencePiece or tokenizers themselves."""

import json

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cvlib import InputError, assets, vocabulary
from cvlib.pieces import HAN, Model, Piece, fields

TEXTS = [
    "你好，世界。",
    "The people's 2024 report",
    "def f(x):\n    return x",
    "😀 caf\u00e9 – ½",
    "一个 test 获取数据",
]


@pytest.fixture(scope="module")
def bilingual(tmp_path_factory):
    """The learners' sentences in both languages: enough for a small vocabulary with Latin and Chinese pieces."""
    path = tmp_path_factory.mktemp("corpus") / "pairs.txt"
    rows = json.loads(assets.fetch("hsk-sentences").read_bytes())
    path.write_text("\n".join(f"{row['chinese']}\n{row['translation']['en']}" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unigram(bilingual, tmp_path_factory):
    out = tmp_path_factory.mktemp("unigram") / "zh.model"
    vocabulary.train([bilingual], out, 3000, algorithm="unigram")
    return out


def byte_level(path, texts, size=400, special=("<|end|>",)):
    """A small byte-level BPE, as GPT-2's, trained on the spot."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(special))  # behind the vocabulary, as in LLaMA-3 and Qwen
    tokenizer.save(str(path))
    return path


# ------------------------------------------------------------------------------------------------------------- load
def test_a_model_file_cuts_as_sentencepiece_does(base):
    loaded = vocabulary.load(base)
    assert loaded.encode(TEXTS) == SentencePieceProcessor(model_file=str(base)).encode(TEXTS)
    assert len(loaded.pieces) == 32_000
    assert {"<s>", "<0xE4>"} <= loaded.special


def test_spelling_puts_a_piece_in_as_it_is_written(base):
    loaded = vocabulary.load(base)
    assert loaded.spell(["▁people", "people", "一个"]) == [
        [loaded.pieces.index(p)] for p in ("▁people", "people", "一个")
    ]


def test_a_tokenizer_json_cuts_as_tokenizers_does(tmp_path):
    path = byte_level(tmp_path / "tokenizer.json", TEXTS)
    loaded = vocabulary.load(tmp_path)  # a folder stands for the tokenizer in it
    reference = Tokenizer.from_file(str(path))
    assert loaded.encode(TEXTS) == [reference.encode(text).ids for text in TEXTS]
    assert loaded.byte_level
    assert loaded.special == {"<|end|>"}
    assert "".join(loaded.readable(loaded.encode(["café"])[0])) == "café"


@pytest.mark.parametrize("content", ['{"model": 1}', "{broken", "{}"])
def test_a_json_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer\.json") as refusal:
        vocabulary.load(path)
    assert "\n" not in str(refusal.value)


def test_a_folder_without_a_tokenizer_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor"):
        vocabulary.load(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        vocabulary.load(tmp_path / "missing.model")


# ------------------------------------------------------------------------------------------------------------ train
def test_training_makes_pieces_that_llama_can_use(bilingual, tmp_path):
    model = vocabulary.train([bilingual], tmp_path / "zh.model", 2600)
    assert model.algorithm == "bpe"
    assert len(model.pieces) == 2600
    texts = [piece.text for piece in model.pieces if piece.kind == 1]
    assert not [text for text in texts if text[0] == "▁" and HAN.search(text)]  # no invented space
    assert not [text for text in texts if len(text) > 1 and any(c.isdigit() for c in text)]
    loaded = SentencePieceProcessor(model_file=str(tmp_path / "zh.model"))
    assert loaded.decode(loaded.encode("ＡＢ，１ 鑫")) == "ＡＢ，１ 鑫"  # identity normaliser, byte fallback


def test_training_twice_gives_the_same_bytes_and_words_count(bilingual, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("饕餮\t5000\n", encoding="utf-8")
    runs = [vocabulary.train([bilingual], tmp_path / name, 2600, words=[words]) for name in "ab"]
    assert runs[0].proto == runs[1].proto
    assert "饕餮" in [piece.text for piece in runs[0].pieces]


def test_training_refuses_in_one_line(bilingual, tmp_path):
    out = tmp_path / "zh.model"
    for texts, size in (([bilingual], 900_000), ([bilingual], 20), ([], 1000)):
        with pytest.raises(InputError) as refusal:
            vocabulary.train(texts, out, size)
        assert "\n" not in str(refusal.value)
        assert not out.exists()


# ------------------------------------------------------------------------------------------------------------ merge
def test_zero_is_the_published_rule(base, unigram, tmp_path):
    out = tmp_path / "merged.model"
    new = vocabulary.merge(base, unigram, out, scores="zero")
    before, extra, after = Model.read(base), Model.read(unigram), Model.read(out)
    have = {piece.text for piece in before.pieces}
    assert new == [piece.text for piece in extra.pieces if piece.text not in have]
    assert after.pieces == before.pieces + [Piece(text, 0.0) for text in new]
    untouched = [(n, value) for n, value, _ in fields(after.proto) if n != 1]
    assert untouched == [(n, value) for n, value, _ in fields(before.proto) if n != 1]
    assert all(
        3 not in dict(f[:2] for f in fields(value)) for n, value, _ in list(fields(after.proto))[32_000:] if n == 1
    )


def test_zero_loses_and_below_keeps(base, unigram, tmp_path):
    vocabulary.merge(base, unigram, tmp_path / "zero.model", scores="zero")
    vocabulary.merge(base, unigram, tmp_path / "below.model")
    english = ["The people want to understand more.", "不"]
    zero, below = (vocabulary.audit(tmp_path / f"{name}.model", base, english) for name in ("zero", "below"))
    assert len(zero.lost) > 0
    assert len(zero.dead) > 0
    assert len(below.lost) == 0
    assert english[0] not in below.changed
    victim, cut = next(iter(zero.lost.items()))
    merged = vocabulary.load(tmp_path / "zero.model")
    assert merged.readable(merged.spell([victim])[0]) == cut != [victim]


def test_below_starts_under_the_lowest_real_score(base, unigram, tmp_path):
    new = vocabulary.merge(base, unigram, tmp_path / "below.model", han_only=True)
    added = Model.read(tmp_path / "below.model").pieces[32_000:]
    assert [piece.score for piece in added] == [-31_741.0 - n for n in range(len(new))]
    assert all(HAN.fullmatch(piece) for piece in new)


def test_merging_twice_is_refused(base, unigram, tmp_path):
    vocabulary.merge(base, unigram, tmp_path / "once.model")
    with pytest.raises(InputError, match="merged twice"):
        vocabulary.merge(tmp_path / "once.model", unigram, tmp_path / "twice.model")
    assert [path.name for path in tmp_path.iterdir()] == ["once.model"]


def test_special_pieces_that_collide_are_refused(base, unigram, tmp_path):
    model = Model.read(unigram)
    clash = tmp_path / "clash.model"
    clash.write_bytes(model.proto.replace(b"\x0a\x03<s>", b"\x0a\x03<q>", 1))  # a control token the base does not know
    with pytest.raises(InputError, match="'<q>' special in one model and plain in the other"):
        vocabulary.merge(base, clash, tmp_path / "out.model")
    clash.write_bytes(model.proto[: model.end] + Piece("<0x41>").to_bytes() + model.proto[model.end :])
    with pytest.raises(InputError, match="'<0x41>' special"):
        vocabulary.merge(base, clash, tmp_path / "out.model")
    assert not (tmp_path / "out.model").exists()


def test_only_a_bpe_can_be_a_base(base, unigram, tmp_path):
    with pytest.raises(InputError, match="a unigram model"):
        vocabulary.merge(unigram, base, tmp_path / "out.model")


# ------------------------------------------------------------------------------------------------------------ audit
def test_audit_by_hand(base, tmp_path):
    """数据 is a piece of the base; 据获 ranked above it steals the 据; 甲乙丙 has no halves to be made from."""
    out = tmp_path / "grown.model"
    out.write_bytes(Model.read(base).with_pieces([Piece("据获"), Piece("甲乙丙"), Piece("的人", -40_000.0)]))
    found = vocabulary.audit(out, base, ["数据获取", "数据 people"])
    assert (found.size, found.added, found.bridges) == (32_003, 3, 0)
    assert list(found.dead) == ["甲乙丙"]
    assert found.lost == {}
    assert found.changed == {"数据获取": ["▁", "数", "据获", "取"]}


def test_a_lost_piece_by_hand(base, tmp_path):
    out = tmp_path / "grown.model"
    out.write_bytes(Model.read(base).with_pieces([Piece("eo")]))
    assert vocabulary.audit(out, base).lost["▁people"] == ["▁p", "eo", "ple"]


def test_what_does_not_begin_with_the_base_is_no_growth(base, unigram):
    with pytest.raises(InputError, match="this is not a growth of it"):
        vocabulary.audit(unigram, base)


# -------------------------------------------------------------------------------------------------------- fertility
def test_fertility_by_hand(base):
    found = vocabulary.fertility(base, "数据 is 饕")
    # ▁ 数 据? no: 数据 is one piece; ▁is; ▁; 饕 in three bytes
    assert found.tokens == len(["▁", "数据", "▁is", "▁", "<0xE9>", "<0xA5>", "<0x95>"])
    assert (found.characters, found.bytes) == (7, 13)
    assert (found.chinese_tokens, found.chinese_characters) == (4, 3)
    assert found.tokens_per_chinese_character == 4 / 3
    assert found.bytes_per_token == 13 / 7


def test_fertility_of_bytes_is_three(tmp_path):
    path = byte_level(tmp_path / "tokenizer.json", ["abc"], size=256)
    assert vocabulary.fertility(path, "你好").tokens_per_chinese_character == 3


def test_fertility_needs_chinese(base):
    with pytest.raises(InputError, match="no Chinese character"):
        vocabulary.fertility(base, "English only")
