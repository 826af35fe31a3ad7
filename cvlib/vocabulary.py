"""Vocabularies: load one, train one, merge two, audit the result, count what a text costs in each.

A vocabulary is a numbered list of *pieces* and a rule that cuts text into them. Under byte-pair encoding (BPE) the rule
is a ranking: start from single characters (or bytes), then again and again join the neighbouring pair whose joined
piece ranks highest. What ranks below everything else can never disturb what was there before. That one sentence is why
`merge(scores="below")` is safe and the published `scores="zero"` is not: score 0 ranks *above* all merges of the base.

A vocabulary can be a SentencePiece `.model`, a `tokenizer.json` or a model folder that holds one of the two.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cvlib import InputError
from cvlib.pieces import (
    HAN,
    NORMAL,
    Model,
    Piece,
    from_byte_level,
    read_bytes,
    read_text,
    read_words,
    to_byte_level,
    written,
)


@dataclass(frozen=True)
class Vocabulary:
    """A loaded tokenizer: `encode` cuts texts as a model would see them, `spell` cuts single pieces by merges alone.

    `special` holds the pieces that plain text does not produce: control tokens, single bytes, added tokens.
    """

    name: str
    byte_level: bool
    pieces: list[str]
    special: frozenset[str]
    encode: Callable[[Sequence[str]], list[list[int]]] = field(repr=False)
    spell: Callable[[Sequence[str]], list[list[int]]] = field(repr=False)

    def alphabet(self, text: str) -> str:
        """Text in the alphabet of the pieces: itself, or GPT-2's byte characters."""
        return to_byte_level(text) if self.byte_level else text

    def readable(self, ids: Iterable[int]) -> list[str]:
        """Ids as text, piece by piece; a part of a character as ‹hex›."""
        return [from_byte_level(self.pieces[i]) if self.byte_level else self.pieces[i] for i in ids]

    def plain(self) -> list[tuple[int, str]]:
        """The numbered pieces that text can produce."""
        return [(i, piece) for i, piece in enumerate(self.pieces) if piece and piece not in self.special]


def load(path: str | Path) -> Vocabulary:
    """Load a SentencePiece `.model`, a `tokenizer.json`, or whichever of the two a model folder holds."""
    path = Path(path)
    if path.is_dir():
        inside = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not inside:
            raise InputError(f"{path}: holds neither tokenizer.json nor tokenizer.model; name another folder")
        path = inside[0]
    return _load_json(path) if read_bytes(path)[:1] == b"{" else _load_model(path)


def _load_model(path: Path) -> Vocabulary:
    from sentencepiece import SentencePieceProcessor

    model = Model.read(path)
    # In protobuf the last value wins: appending a normaliser spec (field 3) switches the invented leading space (3),
    # the whitespace clean-up (4) and the escaping of spaces (5) off, so that a piece goes in exactly as it is written.
    alone = model.proto + b"\x1a\x06" + b"\x18\x00\x20\x00\x28\x00"
    special = frozenset(piece.text for piece in model.pieces if piece.kind != NORMAL)
    whole, alone = (SentencePieceProcessor(model_proto=proto) for proto in (model.proto, alone))

    def cut(processor: SentencePieceProcessor, texts: Sequence[str]) -> list[list[int]]:
        return processor.encode(list(texts), num_threads=1)

    pieces = [piece.text for piece in model.pieces]
    return Vocabulary(path.name, False, pieces, special, partial(cut, whole), partial(cut, alone))


def _load_json(path: Path) -> Vocabulary:
    from tokenizers import Tokenizer

    try:
        state = json.loads(read_bytes(path))
        whole = alone = Tokenizer.from_str(json.dumps(state))
        if state["model"]["type"] == "BPE":
            # LLaMA-3's `ignore_merges` takes a whole word straight from the list: off, to see what merges reach.
            bare = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor")) | {"added_tokens": []}
            alone = Tokenizer.from_str(json.dumps(state | bare | {"model": state["model"] | {"ignore_merges": False}}))
    except Exception as error:  # this library raises nothing more specific
        raise InputError(f"{path}: not a tokenizer.json ({str(error).splitlines()[0][:80]}); name another") from None
    numbers = whole.get_vocab()
    pieces = [""] * (max(numbers.values()) + 1)
    for piece, number in numbers.items():
        pieces[number] = piece

    def cut(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    special = frozenset(token["content"] for token in state["added_tokens"])
    name = path.parent.name if path.name == "tokenizer.json" else path.name
    byte_level = '"ByteLevel"' in json.dumps(state["decoder"])
    return Vocabulary(name, byte_level, pieces, special, partial(cut, whole), partial(cut, alone))


def train(
    texts: Sequence[str | Path], out: str | Path, size: int, words: Sequence[str | Path] = (), algorithm: str = "bpe"
) -> Model:
    """Train a SentencePiece model that a LLaMA-family base can take pieces from.

    SentencePiece's defaults would put a space before every text (thousands of useless pieces `▁` + character) and
    rewrite characters (full-width forms, …). Both are off here, digits stay single, and unknown characters fall back
    to bytes, as in LLaMA.

    Args:
        texts: UTF-8 text files, a sentence or paragraph a line.
        size: pieces in all, the 256 bytes and 3 control tokens included.
        words: word lists, `WORD<tab>COUNT` a line; each word counts as a text seen COUNT times.
        algorithm: "bpe", or "unigram" as in the published Chinese model.
    """
    from sentencepiece import SentencePieceTrainer

    lines = [
        f"{line.replace(chr(9), ' ')}\t1" for path in texts for line in read_text(path).splitlines() if line.strip()
    ]
    lines += [f"{word}\t{count}" for path in words for word, count in read_words(path).items()]
    if not lines:
        raise InputError("no text to learn from; name at least one text file or word list")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            input_format="tsv",
            model_writer=model,
            model_type=algorithm,
            vocab_size=size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise InputError(f"{out}: a vocabulary of {size} could not be learnt ({reason}); change --size") from None
    with written(out) as part:
        part.write_bytes(model.getvalue())
    return Model.read(out)


def merge(
    base: str | Path, extra: str | Path, out: str | Path, scores: str = "below", han_only: bool = False
) -> list[str]:
    """Append the pieces of `extra` that `base` lacks, in their order, and write the result to `out`.

    With `scores="zero"` this is the rule of the published Chinese-LLaMA merge, byte for byte: score 0, type left unset,
    everything else as in the base. With `"below"` the new pieces rank under the base's lowest real score.

    Args:
        han_only: leave out every piece that is not purely Chinese (digits, Latin, punctuation, spaces).

    Returns:
        The appended pieces.

    Raises:
        InputError: nothing to add (merged twice), or a piece that is special in one model and plain in the other.
    """
    if scores not in ("below", "zero"):
        raise ValueError(f'scores is {scores!r}; choose "below" or "zero"')
    first, second = Model.read_base(base), Model.read(extra)
    kinds = {piece.text: piece.kind for piece in first.pieces}
    clash = [p.text for p in second.pieces if (p.kind == NORMAL) != (kinds.get(p.text, NORMAL) == NORMAL)]
    if clash:
        shown = ", ".join(map(repr, clash[:3]))
        raise InputError(f"{extra}: {shown} special in one model and plain in the other; train EXTRA without them")
    new = [p.text for p in second.pieces if p.text not in kinds and (HAN.fullmatch(p.text) or not han_only)]
    if not new:
        raise InputError(f"{base}: already holds every piece of {extra} (merged twice?); nothing was written")
    start, step = (first.lowest() - 1, -1) if scores == "below" else (0, 0)
    with written(out) as part:
        part.write_bytes(first.with_pieces(Piece(text, start + step * n) for n, text in enumerate(new)))
    return new


@dataclass(frozen=True)
class Audit:
    """What a grown vocabulary did to its base. Every finding maps the victim to how it is cut now.

    `lost`: pieces of the base that its own merges reached and the new ones do not. `dead`: new pieces that no text
    can produce. `changed`: lines of the audited text that are cut differently. `bridges` (byte-level only) counts new
    pieces that are the first two bytes of a Chinese character, steps on the way to whole ones.
    """

    size: int
    added: int
    bridges: int
    lost: dict[str, list[str]]
    dead: dict[str, list[str]]
    changed: dict[str, list[str]]


def audit(merged: str | Path, base: str | Path, lines: Sequence[str] = ()) -> Audit:
    """Compare a grown vocabulary with its base, piece by piece, and on `lines` of text.

    Raises:
        InputError: `merged` does not begin with the pieces of `base`, under the same ids.
    """
    new, old = load(merged), load(base)
    for number, (was, now) in enumerate(zip(old.pieces, new.pieces + [""] * len(old.pieces), strict=False)):
        if was != now:
            raise InputError(f"{merged}: id {number} is {now!r}, in {base} it is {was!r}; this is not a growth of it")
    added = [(i, piece) for i, piece in new.plain() if i >= len(old.pieces)]
    kept = _misspelt(old, old.plain())
    lost = {p: cut for p, cut in _misspelt(new, old.plain()).items() if p not in kept}
    bridges = [(i, piece) for i, piece in added if new.byte_level and is_bridge(piece)]
    whole = [(i, piece) for i, piece in added if not (new.byte_level and is_bridge(piece))]
    dead = _misspelt(new, whole) | {piece: [] for i, piece in bridges if not _witness(new, i, piece)}
    cuts = zip(lines, old.encode(lines), new.encode(lines), strict=True) if lines else ()
    changed = {line: new.readable(now) for line, was, now in cuts if was != now}
    return Audit(len(new.pieces), len(added), len(bridges), lost, dead, changed)


def _misspelt(vocabulary: Vocabulary, pieces: list[tuple[int, str]]) -> dict[str, list[str]]:
    """The pieces that merges alone do not put together, and what they give instead."""
    cuts = vocabulary.spell([piece for _, piece in pieces])
    return {piece: vocabulary.readable(cut) for (i, piece), cut in zip(pieces, cuts, strict=True) if cut != [i]}


def is_bridge(piece: str) -> bool:
    """Whether a byte-level piece is the first two bytes of a Chinese character (lead byte E4–E9).

    >>> is_bridge("æĪ"), is_bridge("æĪĳ"), is_bridge("Īĳ")
    (True, False, False)
    """
    return len(piece) == 2 and "ä" <= piece[0] <= "é"


def _witness(vocabulary: Vocabulary, number: int, bridge: str) -> bool:
    """Whether some Chinese character is cut into the bridge and its last byte."""
    lasts = [to_byte_level(chr(0x4E00 + n))[2] for n in range(64)]
    return any(cut[0] == number for cut in vocabulary.spell([bridge + last for last in lasts]))


@dataclass(frozen=True)
class Fertility:
    """What one text costs in one vocabulary; `chinese_*` count the runs of Chinese characters alone."""

    name: str
    size: int
    tokens: int
    characters: int
    bytes: int
    chinese_tokens: int
    chinese_characters: int

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / self.characters

    @property
    def tokens_per_chinese_character(self) -> float:
        return self.chinese_tokens / self.chinese_characters

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


def fertility(tokenizer: str | Path | Vocabulary, text: str) -> Fertility:
    """Count `text` in one vocabulary. (Rust and others, 2021, call tokens per word *fertility*; Chinese
    has no spaces, so we count per character.)"""
    vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else load(tokenizer)
    runs = HAN.findall(text)
    if not runs:
        raise InputError("the text holds no Chinese character to count; give it Chinese text")
    chinese = sum(map(len, vocabulary.spell([vocabulary.alphabet(run) for run in runs])))
    tokens = len(vocabulary.encode([text])[0])
    sizes = len(text), len(text.encode()), chinese, sum(map(len, runs))
    return Fertility(vocabulary.name, len(vocabulary.pieces), tokens, *sizes)
