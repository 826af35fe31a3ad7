"""Turns in, streamed replies out: what a chat remembers, and the terminal around it.

The history is kept by whole exchanges. When it no longer fits into the model's context, less the room kept for the
answer, the model is shown the newest exchanges that do, and the reader is told; nothing is ever cut in the middle
(trap 4). The system prompt always stays.

A command of the terminal is a generator like a reply: it yields what is to be shown. So one loop shows both, stops both
on Ctrl-C, and says in one line what went wrong with either.
"""

from __future__ import annotations

import dataclasses
import json
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from cvlib import InputError, messages, recipes
from cvlib.engines import Engine
from cvlib.messages import Conversation, Message
from cvlib.recipes import Decoding


@dataclass
class Chat:
    """A conversation with a model.

    `history` holds every exchange, question and answer in turn; `forgotten` is how many of the oldest the model was not
    shown with the last question. An empty `system` leaves the template's own.
    """

    engine: Engine
    decoding: Decoding
    system: str = ""
    history: Conversation = field(default_factory=list)
    forgotten: int = 0

    def reply(self, text: str) -> Iterator[str]:
        """Stream the answer to `text`. The exchange joins the history when the answer ends or the caller stops.

        Both are kept without space around them, as `messages` reads training's rows (trap 6).
        """
        question = Message("user", readable(text.strip()))
        room = self.engine.context - self.decoding.max_new_tokens
        count = lambda turns: self.engine.count(self.led(turns))  # noqa: E731
        kept, self.forgotten = fit(self.history, question, count, room)
        said = ""
        try:
            for piece in self.engine.stream(self.led([*kept, question]), self.decoding):
                said += piece
                yield piece
        finally:
            if said.strip():
                self.history = [*self.history, question, Message("assistant", said.strip())]

    def retry(self) -> Iterator[str]:
        """Answer the last question again, with the next seed; the old answer stays if no new one comes."""
        before, question = self.history, self.undo()
        try:
            self.decoding = dataclasses.replace(self.decoding, seed=self.decoding.seed + 1)
            yield from self.reply(question)
        finally:
            if len(self.history) < len(before):
                self.history = before

    def undo(self) -> str:
        """Take the last exchange back; returns its question."""
        if not self.history:
            raise InputError("nothing was said yet; ask something first")
        *self.history, question, _ = self.history
        return question.content

    def led(self, turns: Conversation) -> Conversation:
        """The turns behind the system prompt, if there is one."""
        return [Message("system", self.system), *turns] if self.system else turns

    def row(self) -> dict:
        """The whole conversation as a row that `messages.read`, and so `/load` and training, can read."""
        return {"messages": [turn.row() for turn in self.led(self.history)]}


def fit(
    history: Conversation, question: Message, count: Callable[[Conversation], int], room: int
) -> tuple[Conversation, int]:
    """The newest whole exchanges that fit into `room` tokens with the question, and how many do not.

    Raises:
        InputError: the question alone is too long.

    >>> speakers = ("user", "assistant", "user", "assistant")
    >>> told = [Message(role, text) for role, text in zip(speakers, ("aaaaaa", "bbbbbb", "c", "d"), strict=True)]
    >>> letters = lambda turns: sum(len(turn.content) for turn in turns)
    >>> kept, forgotten = fit(told, Message("user", "e"), letters, room=4)
    >>> [turn.content for turn in kept], forgotten
    (['c', 'd'], 1)
    """
    choices = range(len(history) // 2 + 1)  # forget none, one, two, …: the first that fits, by halving
    forgotten = bisect_left(choices, True, key=lambda n: count([*history[2 * n :], question]) <= room)
    if forgotten not in choices:
        needed, free = count([question]), max(0, room)
        raise InputError(f"the message takes {needed} tokens and {free} are free; shorten it or lower max_new_tokens")
    return history[2 * forgotten :], forgotten


def readable(text: str) -> str:
    """The text itself, if it is text: bytes that were not UTF-8 arrive as lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"character {error.start + 1} is not UTF-8; set the terminal or the file to UTF-8") from None
    return text


# the terminal


def terminal(chat: Chat, write: Callable[[str], None], read: Callable[[str], str] = input) -> None:
    """Talk in the terminal until /exit or the end of the input; `write` shows a piece of text at once."""
    write(HELP + "\n")
    while True:
        try:
            line = read("\n> ").strip()
            if line in ("/exit", "/quit"):
                return
            if line:
                show(chat, command(chat, line) if line.startswith("/") else chat.reply(line), write)
        except KeyboardInterrupt:
            write("\n[/exit or Ctrl-D leaves]\n")
        except EOFError:
            write("\n")
            return


def show(chat: Chat, pieces: Iterator[str], write: Callable[[str], None]) -> None:
    """Show an answer as it comes, until it ends, fails or is stopped; then what the model no longer remembers."""
    before, shown = chat.forgotten, False
    try:
        with closing(pieces):
            for piece in pieces:
                write(piece)
                shown = True
        write("\n" if shown else "[the model said nothing]\n")
    except KeyboardInterrupt:
        write(" [stopped]\n")
    except InputError as error:
        write(f"[{error}]\n")
    if chat.forgotten > before:
        write(f"[no longer in memory: the oldest {chat.forgotten} of {len(chat.history) // 2} exchanges]\n")


def command(chat: Chat, line: str) -> Iterator[str]:
    """What a line beginning with a slash does and says."""
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        raise InputError(f"{name[:40]} is not a command; /help lists them")
    yield from COMMANDS[name][2](chat, argument.strip())


def _help(chat: Chat, _: str) -> Iterator[str]:
    yield HELP


def _reset(chat: Chat, _: str) -> Iterator[str]:
    chat.history, chat.forgotten = [], 0
    yield "forgotten"


def _undo(chat: Chat, _: str) -> Iterator[str]:
    chat.undo()
    yield f"taken back; exchanges left: {len(chat.history) // 2}"


def _retry(chat: Chat, _: str) -> Iterator[str]:
    yield from chat.retry()


def _system(chat: Chat, text: str) -> Iterator[str]:
    chat.system = readable(text)
    yield f"system prompt: {text or 'that of the template'}"


def _set(chat: Chat, pair: str) -> Iterator[str]:
    if pair:
        chat.decoding = recipes.override(chat.decoding, [pair])
    yield " ".join(f"{key}={value}" for key, value in dataclasses.asdict(chat.decoding).items())


def _save(chat: Chat, name: str) -> Iterator[str]:
    path = _path(name)
    part = path.with_name(f".{path.name}.part")
    if path.exists():
        raise InputError(f"{path}: exists already; name another file")
    if not chat.history:
        raise InputError("nothing was said yet; ask something first")
    try:
        part.write_text(json.dumps(chat.row(), ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a file that can be written") from None
    yield f"saved to {path}"


def _load(chat: Chat, name: str) -> Iterator[str]:
    path = _path(name)
    rows = messages.read(path)
    if len(rows) != 1:
        raise InputError(f"{path}: {len(rows)} conversations in this file; name one that /save wrote")
    (turns,) = rows
    chat.system = turns[0].content if turns[0].role == "system" else ""
    chat.history, chat.forgotten = turns[bool(chat.system) :], 0
    yield f"loaded {len(chat.history) // 2} exchanges from {path}"
    if chat.history:
        yield "; the last one:\n> " + "\n".join(turn.content for turn in chat.history[-2:])


def _path(name: str) -> Path:
    if not name:
        raise InputError("which file? for example talk.jsonl")
    return Path(readable(name)).expanduser()


#: Each command: its argument, what it does in words, and how.
COMMANDS = {
    "/help": ("", "this list", _help),
    "/reset": ("", "forget the conversation", _reset),
    "/undo": ("", "take the last exchange back", _undo),
    "/retry": ("", "answer the last question again, with the next seed", _retry),
    "/system": ("[TEXT]", "what the model is told before everything else", _system),
    "/set": ("[KEY=VALUE]", "decoding, such as temperature=0.7; alone, shows all", _set),
    "/save": ("FILE", "write the conversation as a row of JSON", _save),
    "/load": ("FILE", "go on with a saved conversation", _load),
}
HELP = "\n".join(
    [f"{f'{name} {argument}':<18} {about}" for name, (argument, about, _) in COMMANDS.items()]
    + ["/exit              leave (Ctrl-D); Ctrl-C stops an answer"]
)
