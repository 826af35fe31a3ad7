"""Texts in, groups of duplicates out, exact and near.

Comparing every pair of a million rows is half a million million comparisons. Four steps avoid it (Broder 1997):

1. **Shingles.** A text is the set of its five-character pieces. Chinese has no spaces, so characters are the unit.
2. **Signature.** Hash the pieces with 112 different hash functions and keep each one's smallest value. Two texts agree
   in one such value with probability |A ∩ B| / |A ∪ B|, the Jaccard similarity of their sets.
3. **Bands.** Cut the signature into 14 bands of 8. Two texts of similarity s share a whole band with probability
   1 − (1 − s⁸)¹⁴: 5 % at 0.5, 92 % at 0.8. These are FineWeb's numbers (Penedo et al. 2024).
4. **Clusters.** Rows that share a band belong together, and so do their neighbours' neighbours.

A dictionary of bands would take two kilobytes a row. We keep each band as one array of 64-bit numbers and sort it:
equal numbers become neighbours. That is 112 bytes a row, and 8 more for the exact hash.

The hash functions are h → a·mix(h) + b modulo 2³², those of datasketch 2, so that signatures can be compared with it.
"""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Sequence

import numpy as np

from cvlib.messages import Conversation

SHINGLE = 5  # characters
TURN = "\x1e"  # ends each turn of a conversation; `normal` removes it from people's own text
BANDS, PER_BAND = 14, 8


def normal(text: str) -> str:
    """The text as it is compared: full-width letters made plain, upper case lowered, white space gone.

    >>> normal("Ａ：　你好，\\nWorld")
    'a:你好,world'
    """
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def row_text(conversation: Conversation) -> str:
    """A conversation as it is compared: its turns' normal texts, each ended by `TURN`; a system text joins the first.

    >>> from cvlib.messages import Message
    >>> row_text([Message("user", "你 好"), Message("assistant", "Hi!")])
    '你好\\x1ehi!\\x1e'
    """
    return "".join(normal(turn.content) + (TURN if turn.role != "system" else "") for turn in conversation)


def fmix32(values: np.ndarray) -> np.ndarray:
    """MurmurHash3's finaliser on 32 bits (Appleby): every bit of the input moves about half the bits of the output."""
    values = (values ^ (values >> 16)) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> 13)) * np.uint32(0xC2B2AE35)
    return values ^ (values >> 16)


def fmix64(values: np.ndarray) -> np.ndarray:
    """The same on 64 bits."""
    values = (values ^ (values >> 33)) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> 33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> 33)


_NUMBERS = fmix32(np.arange(1, 2 * BANDS * PER_BAND + 1, dtype=np.uint32))
A, B = _NUMBERS[::2] | 1, _NUMBERS[1::2]  # an odd a makes h → a·h + b a permutation


def shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all shingles of all texts.

    What the assistant says counts as another alphabet: a translation and the same translation the other way round share
    every character and are no duplicates.

    Args:
        texts: normal texts, or rows as `row_text` gives them.

    Returns:
        (shingles,) uint32, text after text, and (texts,) how many each has: none if it is shorter than a shingle.

    >>> shingles(["abcdef", "abc"])[1].tolist()
    [2, 0]
    """
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    answer = np.cumsum(points == ord(TURN), dtype=np.uint32) % 2  # 1 from the end of a question to that of its answer
    points = points + answer * np.uint32(0x110000)  # beyond the last character of Unicode
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    rolling = np.zeros(max(0, len(points) - SHINGLE + 1), dtype=np.uint32)
    for place in range(SHINGLE):  # a polynomial in an odd number: one changed character always changes the hash
        rolling = rolling * np.uint32(0x01000193) + points[place : place + len(rolling)]
    ends = np.repeat(np.cumsum(lengths), lengths)[: len(rolling)]
    inside = np.arange(len(rolling)) + SHINGLE <= ends  # the others straddle two texts
    return rolling[inside], np.maximum(lengths - SHINGLE + 1, 0)


def signatures(hashes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The smallest value of each of the hash functions over each text's shingles.

    Args:
        hashes, counts: what `shingles` returns; every text has at least one.

    Returns:
        (112, texts) uint32.
    """
    mixed, starts = fmix32(hashes), np.cumsum(counts) - counts
    return np.stack([np.minimum.reduceat(mixed * a + b, starts) for a, b in zip(A, B, strict=True)])


def bands(signature: np.ndarray) -> np.ndarray:
    """Each band of eight values folded into one number: (112, texts) → (14, texts) uint64."""
    folded = np.zeros((BANDS, signature.shape[1]), dtype=np.uint64)
    for values in signature.reshape(BANDS, PER_BAND, -1).astype(np.uint64).swapaxes(0, 1):
        folded = fmix64(folded ^ values) + np.uint64(0x9E3779B97F4A7C15)
    return folded


def key(text: str) -> int:
    """64 bits of a normal text's BLAKE2 hash: equal texts, equal keys; at a million rows a chance hit is 1 in 10⁷."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Fingerprints:
    """What is remembered of the rows seen so far, to group them afterwards: 128 bytes a row.

    >>> seen = Fingerprints()
    >>> seen.add([normal("今天天气很好，我们去公园吧。"), normal("今天天气很好， 我们去公园吧。"), normal("好")])
    >>> [first.tolist() for first in seen.first()]
    [[0, 0, 2], [0, 0, 2]]
    """

    def __init__(self):
        self.keys = array("Q")  # of every row
        self.long = array("Q")  # numbers of the rows that have shingles
        self.chunks: list[np.ndarray] = []  # their bands, (14, some rows) each

    def add(self, texts: Sequence[str]) -> None:
        """Remember some more rows by their normal texts; a few hundred at a time are quickest."""
        hashes, counts = shingles(texts)
        self.long.extend(len(self.keys) + number for number in np.flatnonzero(counts).tolist())
        self.keys.extend(map(key, texts))
        if counts.any():
            self.chunks.append(bands(signatures(hashes, counts[counts > 0])))

    def first(self) -> tuple[np.ndarray, np.ndarray]:
        """For every row the number of the first row with the same text, and of the first row of its cluster.

        A row without shingles has no near duplicates. Clusters are found by passing the smallest number around: all
        rows with the same band take the smallest number among them, until a sweep over all bands changes nothing.
        """
        _, index, place = np.unique(np.frombuffer(self.keys, dtype=np.uint64), return_index=True, return_inverse=True)
        same = index[place]
        first, before, long = same.copy(), None, np.frombuffer(self.long, dtype=np.int64)
        while before is None or (first != before).any():
            before = first.copy()
            for number in range(BANDS if self.chunks else 0):
                band = np.concatenate([chunk[number] for chunk in self.chunks])
                order = np.argsort(band, kind="stable")
                band, rows = band[order], long[order]
                starts = np.flatnonzero(np.concatenate([[True], band[1:] != band[:-1]]))
                smallest = np.minimum.reduceat(first[rows], starts)
                first[rows] = np.repeat(smallest, np.diff(starts, append=len(rows)))
        return same, first
