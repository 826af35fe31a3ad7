"""A tiktoken file and its splitting rule in, tokens out: how GPT-2, Whisper and Qwen publish their vocabularies.

Such a file lists every piece as bytes with its rank, and *the rank of a join is the rank of the joined piece*: nothing
else is needed to cut a text. Chapter 01 builds this in the open; here is the same for later chapters. It is plain
Python and meant for counting some pages of text, not for training (transformers has a fast one for that).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from cvlib import InputError
from cvlib.pieces import read_bytes

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN36 = QWEN.replace(r"\p{L}+|", r"[\p{L}\p{M}]+|").replace(r"\s\p{L}", r"\s\p{L}\p{M}")  # accents count as letters


@dataclass
class Ranks:
    """A byte-level vocabulary: pieces as bytes with their ranks, and the pattern that a text is split by first.

    >>> small = Ranks({b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4}, r"\\S+|\\s+")
    >>> small.encode("abc")                      # b and c join first: their piece ranks before that of a and b
    [0, 3]
    """

    rank: dict[bytes, int]
    pattern: str
    _seen: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rank)

    @cached_property
    def _split(self):
        from tokenizers import Regex, pre_tokenizers

        return pre_tokenizers.Split(Regex(self.pattern), "isolated")

    def encode(self, text: str) -> list[int]:
        """The ids (ranks) of a text; special tokens are text like any other."""
        return [number for part, _ in self._split.pre_tokenize_str(text) for number in self._cut(part)]

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; bytes that are no whole character become �."""
        pieces = {number: piece for piece, number in self.rank.items()}
        return b"".join(pieces[number] for number in ids).decode(errors="replace")

    def _cut(self, part: str) -> list[int]:
        """Join neighbours, best rank first and leftmost first, until no join is in the list."""
        if part not in self._seen:
            symbols = [bytes([byte]) for byte in part.encode()]
            while joins := [(self.rank[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in self.rank]:
                _, i = min(joins)
                symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            self._seen[part] = [self.rank[symbol] for symbol in symbols]
        return self._seen[part]


def read(path: str | Path, pattern: str = QWEN) -> Ranks:
    """A `.tiktoken` file: on every line a piece in base64 and its rank.

    Raises:
        InputError: a line of another kind, or a byte that the vocabulary lacks.
    """
    rank = {}
    for number, line in enumerate(read_bytes(Path(path)).splitlines(), 1):
        row = line.split()
        try:
            piece, place = base64.b64decode(row[0], validate=True), int(row[-1])
        except (IndexError, ValueError):
            raise InputError(f"{path}:{number}: not a piece in base64 and its rank; name a .tiktoken file") from None
        if piece:  # Whisper's file has an empty one
            rank[piece] = place
    if missing := [byte for byte in range(256) if bytes([byte]) not in rank]:
        raise InputError(f"{path}: no piece for the byte {missing[0]:#04x}; name a byte-level .tiktoken file")
    return Ranks(rank, pattern)
