"""Pieces and the files that hold them: SentencePiece's protobuf, GPT-2's byte alphabet, corpora and safe output.

A SentencePiece `.model` is a protobuf message: fields one after the other, no index, no padding. `fields` reads any
such message in twenty lines, and that is all we need: a vocabulary grows by *inserting* the bytes of new pieces behind
the old ones, so whatever we do not understand in the file stays exactly as it was.
"""

from __future__ import annotations

import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cvlib import InputError

#: A run of Chinese characters: the block U+4E00–U+9FFF, which holds everything GB2312, GBK and Big5 call common.
HAN = re.compile("[\u4e00-\u9fff]+")

#: A run of text counts ten times a word of a word list, whose counts come from a far larger text than ours.
TEXT_WEIGHT = 10

#: What a piece of a SentencePiece file can be (`SentencePiece.Type` in its protobuf definition).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

#: GPT-2's alphabet: byte-level vocabularies spell each byte as one printable character, most of them as themselves.
CHARACTER_OF = {byte: chr(byte) for byte in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
CHARACTER_OF |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in CHARACTER_OF)}
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}


def to_byte_level(text: str) -> str:
    """Text in GPT-2's alphabet, one character a byte of its UTF-8.

    >>> to_byte_level("我 go")
    'æĪĳĠgo'
    """
    return "".join(CHARACTER_OF[byte] for byte in text.encode())


def from_byte_level(piece: str) -> str:
    """What a byte-level piece spells; bytes that are only a part of a character as ‹hex›.

    >>> from_byte_level("æĪĳ"), from_byte_level("æĪ"), from_byte_level("Ġgo")
    ('我', '‹e6 88›', ' go')
    """
    raw = bytes(BYTE_OF.get(character, 0x3F) for character in piece)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return f"‹{raw.hex(' ')}›"


def fields(message: bytes) -> Iterator[tuple[int, int | bytes, int]]:
    """The fields of a protobuf message: number, value, and the offset just behind the field.

    A field is a tag (its number × 8 + its wire type) and a value. Type 0 is a varint: seven bits a byte, lowest first,
    the top bit says "more follows". Type 2 is a length and that many bytes; types 1 and 5 are eight and four bytes.

    >>> list(fields(b"\\x0a\\x03abc" + b"\\x10\\x96\\x01"))      # field 1 holds "abc", field 2 the number 150
    [(1, b'abc', 5), (2, 150, 8)]
    """

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while message[at] >= 128:
            value, at, shift = value | (message[at] & 127) << shift, at + 1, shift + 7
        return value | message[at] << shift, at + 1

    at = 0
    while at < len(message):
        tag, at = varint(at)
        if tag & 7 == 0:
            value, at = varint(at)
        else:
            size, at = varint(at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise IndexError("the field is longer than its message")
        yield tag >> 3, value, at


@dataclass(frozen=True)
class Piece:
    """One row of a SentencePiece file: its text (a space is written ▁), its score and what it is."""

    text: str
    score: float = 0.0
    kind: int = NORMAL

    def to_bytes(self) -> bytes:
        """The row as protobuf, its type left unset as SentencePiece itself leaves it for normal pieces.

        >>> Piece("我", -1.0).to_bytes().hex(" ")
        '0a 0a 0a 03 e6 88 91 15 00 00 80 bf'
        """
        text = self.text.encode()
        if len(text) > 120:
            raise InputError(f"piece {self.text[:20]!r}… has {len(text)} bytes; leave out pieces of more than 120")
        body = bytes([0x0A, len(text)]) + text + b"\x15" + struct.pack("<f", self.score)
        return bytes([0x0A, len(body)]) + body


@dataclass(frozen=True)
class Model:
    """A SentencePiece file taken apart: `proto` is the whole file, `end` the offset just behind its last piece."""

    proto: bytes
    pieces: list[Piece]
    end: int
    algorithm: str

    @classmethod
    def read(cls, path: str | Path) -> Model:
        """Parse a `.model` file; `InputError` if it is missing or something else (a web page, a Git LFS pointer)."""
        proto, pieces, end, algorithm = read_bytes(path), [], 0, 1
        try:
            for number, value, behind in fields(proto):
                if number == 1:
                    row = {key: content for key, content, _ in fields(value)}
                    pieces.append(Piece(row[1].decode(), struct.unpack("<f", row[2])[0], row.get(3, NORMAL)))
                    end = behind
                elif number == 2:
                    algorithm = {key: content for key, content, _ in fields(value)}.get(3, 1)
        except (IndexError, KeyError, AttributeError, TypeError, UnicodeDecodeError, struct.error):
            pieces = []
        if not pieces:
            start = proto[:24].decode("ascii", "replace")
            raise InputError(f"{path}: not a SentencePiece model (it begins {start!r}); name a .model file")
        return cls(proto, pieces, end, {1: "unigram", 2: "bpe", 3: "word", 4: "char"}[algorithm])

    @classmethod
    def read_base(cls, path: str | Path) -> Model:
        """Parse a file that pieces are to be appended to; only in a BPE are scores a ranking, nothing else will do."""
        model = cls.read(path)
        if model.algorithm != "bpe":
            raise InputError(f"{path}: a {model.algorithm} model, whose scores are no ranking; the base must be a BPE")
        return model

    def lowest(self) -> float:
        """The lowest real score. Some bases park whitespace at −1e9, where float32 steps by 64 and new scores tie."""
        return min(piece.score for piece in self.pieces if piece.kind == NORMAL and piece.score > -(2**24))

    def with_pieces(self, new: Iterable[Piece]) -> bytes:
        """The file with `new` behind its own pieces and every other byte as it was."""
        return self.proto[: self.end] + b"".join(piece.to_bytes() for piece in new) + self.proto[self.end :]


def read_bytes(path: str | Path) -> bytes:
    """The content of a file, or one clear line why there is none."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a file that can be read") from None


def read_text(path: str | Path) -> str:
    """A UTF-8 text file. Chinese files from older Windows systems are often GBK, and the message says so."""
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        try:
            raw.decode("gb18030")
        except UnicodeDecodeError:
            raise InputError(
                f"{path}:{line}: not UTF-8 text (byte {raw[error.start]:#04x}); name a text file"
            ) from None
        raise InputError(f"{path}:{line}: GBK, not UTF-8; convert it: iconv -f GB18030 -t UTF-8 FILE > NEW") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty; name one with text in it")
    return text


def read_words(path: str | Path) -> Counter[str]:
    """A word list: a word, a tab or space and its count on each line; further columns are ignored."""
    words = Counter()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        word, _, rest = line.replace("\t", " ").partition(" ")
        count = rest.partition(" ")[0]
        if not count.isdecimal():
            raise InputError(f"{path}:{number}: {line[:40]!r} is not a word and its count; write WORD<tab>COUNT")
        words[word] += int(count)
    return words


def common_characters() -> list[str]:
    """The 3,755 first-level characters of GB2312 (1980), the common ones, in its order.

    >>> len(common_characters()), common_characters()[:3]
    (3755, ['啊', '阿', '埃'])
    """
    cells = (bytes([0xA0 + row, 0xA0 + cell]) for row in range(16, 56) for cell in range(1, 95))
    return [cell.decode("gb2312") for cell in cells if cell < b"\xd7\xfa"]


def chinese_runs(texts: Sequence[str | Path], words: Sequence[str | Path] = ()) -> Counter[str]:
    """Runs of Chinese characters in text files and word lists, with their weights.

    Raises:
        InputError: a file that cannot be read, is not UTF-8, or no Chinese anywhere.
    """
    runs = Counter(run for path in texts for run in HAN.findall(read_text(path)))
    runs = Counter({run: TEXT_WEIGHT * count for run, count in runs.items()})
    for path in words:
        runs.update({word: count for word, count in read_words(path).items() if HAN.fullmatch(word)})
    if not runs:
        names = ", ".join(map(str, [*texts, *words])) or "no file"
        raise InputError(f"{names}: no Chinese character to learn from; give Chinese text")
    return runs


@contextmanager
def written(out: str | Path) -> Iterator[Path]:
    """A path beside `out` to write to; renamed to `out` at the end, or removed when something went wrong."""
    out = Path(out)
    part, made = out.with_name(f".{out.name}.part"), not out.parent.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, out)
    except OSError as error:
        raise InputError(f"{out}: could not be written ({error.strerror}); choose another place") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
            if made:
                out.parent.rmdir()  # which succeeds only if it was left empty
