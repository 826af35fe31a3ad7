"""Rows of any published shape in, conversations out.

A conversation is a list of `Message`s: an optional system message, then user and assistant in turn, the assistant last.
Every later module sees only this; which project wrote the file no longer matters. Keys tell the shapes apart:

| shape | keys |
|---|---|
| BELLE, Alpaca | `instruction`, `input`, `output` |
| Guanaco | the same, with earlier turns as `User:… Assistant:…` in `input` |
| Chinese-Vicuna chat | `input` and `output` as parallel lists |
| cMedQA2, legal questions | `question`, `answer` |
| ShareGPT | `conversations`: list of `from`, `value` |
| chat | `messages`: list of `role`, `content` |

Files are JSON lines or one JSON array, in UTF-8 (with or without a byte-order mark) or GB18030.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cvlib import InputError

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Message:
    """One turn: who speaks (`system`, `user` or `assistant`) and what.

    `entry` ties together rows that were made of one thing, such as a translation there and back: their first questions
    carry the same one, and the held-out split goes by it.
    """

    role: str
    content: str
    entry: str = field(default="", compare=False, repr=False)

    def row(self) -> dict[str, str]:
        """The turn as `from_row` reads it back in the shape "chat"."""
        return {"role": self.role, "content": self.content} | ({"entry": self.entry} if self.entry else {})


Conversation = list[Message]


def from_row(row: dict) -> Conversation:
    """A conversation from one row of any known shape.

    Raises:
        ValueError: keys of no known shape, a missing or empty text, or turns out of order.

    >>> from_row({"instruction": "翻译成英文", "input": "你好", "output": "Hello"})
    [Message(role='user', content='翻译成英文\\n你好'), Message(role='assistant', content='Hello')]
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object of keys and values; found {type(row).__name__}")
    for key, reader in READERS.items():
        if key in row:
            return _checked(reader(row))
    if "output" in row:
        raise ValueError('no key "instruction"; a row needs "instruction" and "output"')
    raise ValueError(f"keys {', '.join(map(repr, row)) or 'none'} match no known shape; see `cvlib.messages`")


def _instruction(row: dict) -> Conversation:
    if isinstance(row.get("input"), list):
        return _parallel(row)
    request, context, answer = (_text(row, key) for key in ("instruction", "input", "output"))
    earlier = _earlier_turns(context)
    if earlier:
        return [*earlier, Message("user", request), Message("assistant", answer)]
    joined = "\n".join(text for text in (request, context) if text.strip())
    return [Message("user", joined), Message("assistant", answer)]


def _earlier_turns(context: str) -> Conversation:
    """Guanaco's earlier turns, `User:…\\nAssistant:…`, as messages; nothing if the context is a plain passage."""
    parts = re.split(r"(?:^|\n)\s*(User|Assistant)\s*[:：]\s*", context)
    speakers, texts = parts[1::2], [text.strip() for text in parts[2::2]]
    if parts[0].strip() or not speakers or speakers != ["User", "Assistant"] * (len(speakers) // 2):
        return []
    return [Message(speaker.lower(), text) for speaker, text in zip(speakers, texts, strict=True)]


def _parallel(row: dict) -> Conversation:
    asked, answered = row.get("input"), row.get("output")
    if not isinstance(answered, list) or len(asked) != len(answered):
        raise ValueError('"input" and "output" must be lists of the same length')
    pairs = zip(asked, answered, strict=True)
    return [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def _question(row: dict) -> Conversation:
    return [Message("user", _text(row, "question")), Message("assistant", _text(row, "answer"))]


def _listed(key: str, role: str, text: str):
    def read(row: dict) -> Conversation:
        turns = row[key]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f'"{key}" must be a list of turns with "{role}" and "{text}"')
        unknown = [turn.get(role) for turn in turns if turn.get(role) not in list(ROLES)]
        if unknown:
            raise ValueError(f'"{role}" is {unknown[0]!r}; use one of {", ".join(ROLES)}')
        return [Message(ROLES[turn[role]], _text(turn, text), str(turn.get("entry") or "")) for turn in turns]

    return read


READERS = {
    "messages": _listed("messages", "role", "content"),
    "conversations": _listed("conversations", "from", "value"),
    "instruction": _instruction,
    "question": _question,
    "input": lambda row: _parallel(row) if isinstance(row["input"], list) else _instruction(row),
}


def _text(row: dict, key: str) -> str:
    if key not in row and key != "input":
        raise ValueError(f'no key "{key}"; found {", ".join(map(repr, row))}')
    value = row.get(key) or ""
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be text; found {type(value).__name__}')
    return value


def _checked(conversation: Conversation) -> Conversation:
    turns = conversation[1:] if conversation[:1] and conversation[0].role == "system" else conversation
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or [turn.role for turn in turns] != expected:
        raise ValueError("turns must go user, assistant, user, … and end with the assistant")
    for turn in conversation:
        if not isinstance(turn.content, str) or not turn.content.strip():
            raise ValueError(f"the {turn.role}'s text is empty")
        if re.search("[\ud800-\udfff]", turn.content):
            raise ValueError(f"the {turn.role}'s text holds half a character, such as \\ud83d")
    return [Message(turn.role, turn.content.strip(), turn.entry) for turn in conversation]


def scan(path: str | Path) -> Iterator[tuple[int, Conversation | InputError]]:
    """Every row of a file with its line number, or place in a JSON array: a conversation, or what is wrong with it."""
    path = Path(path)
    for number, text in _texts(path):
        try:
            if isinstance(text, UnicodeDecodeError):
                raise text
            yield number, from_row(json.loads(text) if isinstance(text, str) else text)
        except UnicodeDecodeError as error:
            yield number, InputError(f"{path}:{number}: {_undecodable(error)}; mend or remove this line")
        except json.JSONDecodeError as error:
            yield number, InputError(f"{path}:{number}: not valid JSON ({error.msg}); mend or remove this line")
        except RecursionError:
            yield number, InputError(f"{path}:{number}: brackets within brackets, too deep; mend or remove this line")
        except ValueError as error:
            yield number, InputError(f"{path}:{number}: {error}; mend or remove this row")


def read(path: str | Path) -> list[Conversation]:
    """All conversations of a file.

    Raises:
        InputError: no such file, an empty file, or the first row that cannot be used.
    """
    conversations = []
    for _, found in scan(path):
        if isinstance(found, InputError):
            raise found
        conversations.append(found)
    if not conversations:
        raise InputError(f"{path}: no rows in this file; give at least one JSON line")
    return conversations


def _texts(path: Path) -> Iterator[tuple[int, str | dict | UnicodeDecodeError]]:
    """Non-empty lines of a JSON-lines file, or the elements of a JSON array, numbered from 1; a line may be broken."""
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; name the files in it that hold rows")
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a .jsonl or .json file of rows")
    try:
        codec = encoding(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file that can be read") from None
    with path.open("rb") as stream:  # neither encoding uses the newline's byte in any other character
        array = next((line for line in stream if line.strip(_BLANK)), b"").lstrip(_BLANK).startswith(b"[")
        stream.seek(0)
        if array:
            yield from enumerate(_array(path, stream.read(), codec), 1)
            return
        for number, line in enumerate(stream, 1):
            if line.strip(_BLANK):
                try:
                    yield number, line.decode(codec)
                except UnicodeDecodeError as error:
                    yield number, error


_BLANK = codecs.BOM_UTF8 + b" \t\r\n"


def _array(path: Path, data: bytes, codec: str) -> list:
    try:
        return json.loads(data.decode(codec))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: {_undecodable(error)}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not a valid JSON array ({error.msg}); mend this line") from None


def _undecodable(error: UnicodeDecodeError) -> str:
    name = "UTF-8" if error.encoding.startswith("utf") else "GB18030"
    return f"byte {error.object[error.start]:#04x} does not belong in {name}"


def encoding(path: Path) -> str:
    """`utf-8-sig` or else `gb18030`: the first in which half the lines of the first megabyte, or more, are valid.

    Chinese in GB18030 is hardly ever valid UTF-8, the other way round it often is; a few broken lines change nothing.

    Raises:
        InputError: most lines beyond ASCII are neither.
    """
    with path.open("rb") as stream:
        lines = [line for line in stream.readlines(1 << 20) if not line.isascii()]
    for codec in ("utf-8-sig", "gb18030"):
        if 2 * sum(_valid(line, codec) for line in lines) >= len(lines):
            return codec
    raise InputError(f"{path}: neither UTF-8 nor GB18030; save the file as UTF-8")


def _valid(line: bytes, codec: str) -> bool:
    try:
        line.decode(codec)
    except UnicodeDecodeError:
        return False
    return True


def held_out(conversation: Conversation, share: float = 0.2) -> bool:
    """Whether a conversation belongs to the held-out split, decided by a hash of its first question, or of its `entry`.

    The split depends on the row and never on its position: adding, removing or shuffling rows moves no other row, and
    the same question, or two questions made of the same entry, cannot stand in both splits.

    >>> rows = [[Message("user", str(n)), Message("assistant", "ok")] for n in range(1000)]
    >>> sum(held_out(row) for row in rows)
    212
    """
    decides = next(turn.entry or turn.content for turn in conversation if turn.role == "user")
    return int.from_bytes(hashlib.sha256(decides.strip().encode()).digest()[:8], "big") < share * 2**64


def split(conversations: Iterable[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to train on, and conversations held out."""
    parts: tuple[list, list] = ([], [])
    for conversation in conversations:
        parts[held_out(conversation)].append(conversation)
    return parts
