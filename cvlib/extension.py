"""Continued BPE: grow a base tokenizer by Chinese pieces it can reach, and disturb nothing it had.

Merging a separately trained vocabulary into a base leaves pieces that no chain of merges arrives at. Here the new
pieces are learnt *from the base's own cut*: we take the runs of Chinese characters of a corpus, cut them as the base
does, and go on merging where the base stopped. One heap holds the candidates:

* a character that the base spells in three bytes saves two tokens every time it occurs;
* two neighbours that are both pieces already save one token every time they occur.

The best candidate becomes a piece, is put together everywhere, and its new neighbourhoods become candidates. New
pieces rank below the whole base, so the base's merges run first, exactly as before; and they consist of Chinese
characters only, so no other text can reach them. Both facts are checked on the finished file before it gets its name.

In a byte-level base every byte is a piece already, and a character can take two steps: its first two bytes (a
*bridge*), then all three. Pieces that straddle two characters or begin inside one are never learnt: other scripts
share those bytes.
"""

from __future__ import annotations

import heapq
import inspect
import json
import re
import shutil
import statistics
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cvlib import InputError
from cvlib.pieces import HAN, Model, Piece, chinese_runs, common_characters, read_bytes, written
from cvlib.vocabulary import Audit, Vocabulary, audit, load

#: Longest piece to learn, in characters: longer ones are boilerplate.
LONGEST = 8

#: A bridge, or whole Chinese characters, in GPT-2's byte alphabet: lead byte E4–E9, then bytes of 80–BF.
_BRIDGE_OR_HAN = re.compile(rf"[ä-é][Ģ-ł¡-¬®-¿Ń]|(?:[ä-é][Ģ-ł¡-¬®-¿Ń]{{2}}){{1,{LONGEST}}}")


class Learner:
    """Continued BPE: one long linked list of symbols, and for every candidate what it saves and where.

    Args:
        runs: (symbols, weight) pairs; the symbols of a run as the base cuts it.
        known: symbols that are pieces already; any other symbol is a character that costs three byte tokens.
        allowed: whether a joined string may become a piece.

    >>> learner = Learner([("上海", 5), ("海上", 3), ("大海", 2)], known={"上", "大"}, allowed=HAN.fullmatch)
    >>> list(learner.learn())      # 海 saves 2 × 10 tokens; then 上海 saves 5
    ['海', '上海', '海上', '大海']
    """

    def __init__(self, runs: Iterable[tuple[Sequence[str], int]], known: set[str], allowed: Callable[[str], object]):
        self.known, self.allowed = set(known), allowed
        self.symbol, self.weight = [""], [0]  # "" is the wall between two runs, or a place that was merged away
        for symbols, weight in runs:
            self.symbol += [*symbols, ""]
            self.weight += [weight] * (len(symbols) + 1)
        self.after = [*range(1, len(self.symbol)), 0]
        self.before = [len(self.symbol) - 1, *range(len(self.symbol) - 1)]
        self.saves: Counter[str] = Counter()
        self.places: defaultdict[str, list[int]] = defaultdict(list)
        self.touched: set[str] = set()
        for at, symbol in enumerate(self.symbol):
            if symbol in self.known:
                self._offer(at)
            elif symbol:
                self.saves[symbol] += 2 * self.weight[at]
                self.places[symbol].append(at)

    def learn(self, first: Iterable[str] = ()) -> Iterator[str]:
        """Pieces one by one: those of `first` that are missing, then always the one that saves most tokens."""
        for piece in first:
            if piece not in self.known:
                self._add(piece)
                yield piece
        heap = [(-saved, piece) for piece, saved in self.saves.items()]
        heapq.heapify(heap)
        while heap:
            saved, piece = heapq.heappop(heap)
            if piece in self.known or -saved != self.saves[piece]:
                continue  # an entry from before the count changed
            if saved >= 0:
                return
            self.touched.clear()
            self._add(piece)
            for candidate in self.touched - self.known:
                heapq.heappush(heap, (-self.saves[candidate], candidate))
            yield piece

    def _add(self, piece: str) -> None:
        """Make `piece` known and put it together everywhere, leftmost first."""
        self.known.add(piece)
        for at in sorted(self.places.pop(piece, ())):
            if self.symbol[at] == piece:  # a character: it was one symbol all along, now it has neighbours
                self._offer(at)
                if self.symbol[self.before[at]] != piece:
                    self._offer(self.before[at])
            elif self.symbol[at] and self.symbol[at] + self.symbol[self.after[at]] == piece:
                self._join(at)

    def _join(self, at: int) -> None:
        """Merge the symbols at `at` and behind it; go on while the result and a neighbour make a known piece."""
        symbol, before, after = self.symbol, self.before, self.after
        while True:
            right = after[at]
            self._withdraw(before[at])
            self._withdraw(right)
            symbol[at] += symbol[right]
            symbol[right] = ""
            after[at] = after[right]
            before[after[at]] = at
            self._offer(at)
            self._offer(before[at])
            if symbol[before[at]] and symbol[before[at]] + symbol[at] in self.known:
                at = before[at]
            elif not (symbol[after[at]] and symbol[at] + symbol[after[at]] in self.known):
                return

    def _offer(self, at: int) -> None:
        """Count the pair that begins at `at` as a candidate."""
        left, right = self.symbol[at], self.symbol[self.after[at]]
        if left in self.known and right in self.known:
            piece = left + right
            if piece in self.saves or (piece not in self.known and self.allowed(piece)):
                self.saves[piece] += self.weight[at]
                self.places[piece].append(at)
                self.touched.add(piece)

    def _withdraw(self, at: int) -> None:
        """Take the pair that begins at `at` back; its entry in `places` is recognised as stale later."""
        piece = self.symbol[at] + self.symbol[self.after[at]]
        if piece in self.saves and self.symbol[at] in self.known and self.symbol[self.after[at]] in self.known:
            self.saves[piece] -= self.weight[at]
            self.touched.add(piece)


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
        symbols, at, loose = [], 0, 0
        for piece in pieces if not old.byte_level else ():
            loose = (loose + 1) % 3 if piece in old.special else 0  # three byte pieces are one character
            if loose == 0:
                symbols.append(run[at] if piece in old.special else piece)
                at += len(symbols[-1])
        yield symbols or pieces


def _steps(old: Vocabulary, characters: Sequence[str]) -> Iterator[str]:
    """The pieces that lead to each character: itself, in a byte-level base after its bridge."""
    for symbols in _symbols(old, characters):
        for end in range(2, len(symbols) + 1) if old.byte_level else [len(symbols)]:
            yield "".join(symbols[:end])


def _grow_model(source: Path, new: list[str]) -> bytes:
    base = Model.read_base(source)
    if "<0xE4>" not in {piece.text for piece in base.pieces}:
        raise InputError(f"{source}: no byte fallback, so its unknown characters have no spelling; choose another base")
    return base.with_pieces(Piece(text, base.lowest() - rank) for rank, text in enumerate(new, 1))


def _grow_json(source: Path, new: list[str]) -> bytes:
    """New pieces behind every id in use, and for each all the pairs that make it, behind the base's merges."""
    state = json.loads(read_bytes(source))
    model = state["model"]
    vocabulary = model["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}
    start = max(vocabulary.values()) + 1
    rules = merge_rules(new, set(model["vocab"]))
    old_style = bool(model["merges"]) and isinstance(model["merges"][0], str)
    model["merges"] += [" ".join(rule) if old_style else list(rule) for rule in rules]
    model["vocab"] = vocabulary | {piece: start + rank for rank, piece in enumerate(new)}
    return json.dumps(state, ensure_ascii=False).encode()


def merge_rules(new: Iterable[str], known: set[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a new piece, in the order in which both halves have become pieces.

    >>> merge_rules(["海上", "海上人", "上人"], {"海", "上", "人"})
    [('海', '上'), ('海上', '人'), ('上', '人'), ('海', '上人')]
    """
    known, rules, waiting = set(known), [], defaultdict(list)
    for piece in new:
        known.add(piece)
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        for left, right in [*halves, *waiting.pop(piece, ())]:
            missing = [half for half in (left, right) if half not in known]
            if missing:
                waiting[missing[0]].append((left, right))
            else:
                rules.append((left, right))
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


def probes() -> list[str]:
    """Text that Chinese pieces may not touch: every assigned code point but the Chinese ones, English prose, code."""
    points = [chr(n) for n in range(sys.maxunicode + 1) if unicodedata.category(chr(n)) not in ("Cn", "Cs", "Co")]
    prose = "\n".join(inspect.getsource(module) for module in (json, statistics, shutil, inspect))
    return [point for point in points if not HAN.match(point)] + prose.splitlines()


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
