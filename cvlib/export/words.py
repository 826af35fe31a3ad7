"""A tokenizer in, the vocabulary of a GGUF file out.

llama.cpp cuts text by itself. It knows two kinds of vocabulary, and what it cannot express is refused here: a wrong
cut raises no error, the model only gets worse (trap 16 was a C++ port that joined greedily).

* **"llama"**: SentencePiece. Joins the neighbours whose joined piece has the highest *score*. Our files rank pairs,
  so a piece's score is minus the rank of its first pair.
* **"gpt2"**: byte-level. Joins by the ranks of *pairs*, inside the parts of a first cut that llama.cpp knows by name.

Both are read from what the tokenizers library runs on, which is also what the model was trained with: grown and merged
vocabularies need nothing of their own. One difference stays: where a SentencePiece text goes on behind a special
token, llama.cpp begins it with a space of its own. So the file also carries the whole tokenizer, as the standard
provides for, and `engines.LlamaCpp` cuts with it and sends token ids.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from gguf import GGUFWriter, TokenType

from cvlib import InputError
from cvlib.engines import TOKENIZER

#: First cuts of byte-level texts by llama.cpp's name: GPT-2's; SmolLM2's, each digit alone; LLaMA 3's.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FIRST_CUTS = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False},
        BYTES | {"use_regex": False},
    ],
}


def describe_vocabulary(writer: GGUFWriter, tokenizer, rows: int, folder: Path) -> None:
    """Write the pieces, what each of them is, the rule that joins them, the special tokens and the chat template.

    Args:
        tokenizer: as `loading.read_tokenizer` gives it.
        rows: of the embedding. A model may have more than there are pieces (kernels like multiples of 64); they get
            names that no text produces.

    Raises:
        InputError: more pieces than rows, or a rule that llama.cpp has no name for.
    """
    if len(tokenizer) > rows:
        raise InputError(f"{folder}: {len(tokenizer)} pieces but {rows} rows; grow the model or mend its tokenizer")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = state["model"]
    if rules["type"] != "BPE":
        raise InputError(f"{folder}: a {rules['type']} tokenizer; only BPE is written here")
    describe_pieces(writer, state, rows)
    if rules["byte_fallback"]:
        describe_sentencepiece(writer, state, rows, folder)
    else:
        describe_byte_level(writer, state, folder)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    around = tokenizer("").input_ids  # what it puts around every text, seen rather than believed (trap 17)
    begins = around[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(around[begins:] == [tokenizer.eos_token_id])
    writer.add_chat_template(tokenizer.chat_template or "")
    writer.add_string(TOKENIZER, tokenizer.backend_tokenizer.to_str())


def describe_pieces(writer: GGUFWriter, state: dict, rows: int) -> None:
    """Every piece by number, and whether it is text, a single byte, a control token, a word added whole, or nothing."""
    rules = state["model"]
    pieces, kinds = [f"[PAD{number}]" for number in range(rows)], [TokenType.UNUSED] * rows
    for piece, number in rules["vocab"].items():
        byte = rules["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", piece)
        pieces[number], kinds[number] = piece, TokenType.BYTE if byte else TokenType.NORMAL
    for token in state["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        pieces[token["id"]], kinds[token["id"]] = token["content"], kind
    if rules["unk_token"]:
        kinds[rules["vocab"][rules["unk_token"]]] = TokenType.UNKNOWN
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)


def describe_byte_level(writer: GGUFWriter, state: dict, folder: Path) -> None:
    """The first cut by its name, and the pairs by rank."""
    steps = [{key: step[key] for key in step if key != "trim_offsets"} for step in listed(state["pre_tokenizer"])]
    name = next((name for name, known in FIRST_CUTS.items() if known == steps), None)
    if name is None or state["normalizer"] or state["model"]["ignore_merges"] != (name == "llama-bpe"):
        shown = " + ".join(step["type"] for step in [*listed(state["normalizer"]), *steps]) or "none"
        raise InputError(
            f"{folder}: its first cut ({shown}) is none of {', '.join(FIRST_CUTS)}; use llama.cpp's converter"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_add_space_prefix(False)


def describe_sentencepiece(writer: GGUFWriter, state: dict, rows: int, folder: Path) -> None:
    """A score for every piece, and whether a text begins with a space of its own."""
    steps = [*listed(state["normalizer"]), *listed(state["pre_tokenizer"])]
    if not {step["type"] for step in steps} <= {"Prepend", "Replace", "Metaspace"}:
        shown = " + ".join(step["type"] for step in steps)
        raise InputError(f"{folder}: it rewrites text ({shown}) as llama.cpp cannot; use llama.cpp's converter")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores(state["model"]["vocab"], state["model"]["merges"], rows))
    space = any("prepend" in step or step.get("prepend_scheme", "never") != "never" for step in steps)
    writer.add_add_space_prefix(space)


def listed(step: dict | None) -> list[dict]:
    """A normaliser or first cut of a tokenizer.json as the list of its steps."""
    if step is None:
        return []
    return step.get("normalizers") or step.get("pretokenizers") or [step]


def scores(vocab: dict[str, int], merges: list[list[str]], rows: int) -> list[float]:
    """Minus the rank of the first pair that makes a piece; what no pair makes comes last.

    >>> scores({"a": 0, "b": 1, "ab": 2, "aab": 3}, [["a", "b"], ["a", "ab"]], rows=4)
    [-2.0, -2.0, -0.0, -1.0]
    """
    found = [-float(len(merges))] * rows
    for rank, pair in reversed(list(enumerate(merges))):
        found[vocab["".join(pair)]] = -float(rank)
    return found
