"""Turns in, streamed replies out: the terminal chat.

The history is kept by whole turns. When it no longer fits into the model's context, less the room kept for the answer,
the oldest exchange goes and the reader is told; nothing is ever cut in the middle (trap 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cvlib import InputError, generation
from cvlib.batching import prompt_ids
from cvlib.messages import Conversation, Message
from cvlib.recipes import Decoding
from cvlib.templates import prompt

HELP = "/help this list · /reset forget everything · /exit leave (Ctrl-D) · Ctrl-C stops an answer"


@dataclass
class Chat:
    """A conversation with a model that remembers as many whole turns as fit its context."""

    model: object
    tokenizer: object
    template: str
    decoding: Decoding
    history: Conversation = field(default_factory=list)
    dropped: int = 0

    def reply(self, text: str):
        """Stream the answer to `text`. The turn joins the history when the answer ends or the caller stops."""
        question = Message("user", text)
        self.history, dropped = fit(self.history, question, self._tokens, self._room())
        self.dropped += dropped
        said: list[str] = []
        pieces = generation.stream(self.model, self.tokenizer, [*self.history, question], self.template, self.decoding)
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            if "".join(said).strip():
                self.history = [*self.history, question, Message("assistant", "".join(said))]

    def _tokens(self, conversation: Conversation) -> int:
        return len(prompt_ids(prompt(conversation, self.template, self.tokenizer.eos_token), self.tokenizer))

    def _room(self) -> int:
        return self.model.config.max_position_embeddings - self.decoding.max_new_tokens


def fit(
    history: Conversation, question: Message, count: Callable[[Conversation], int], room: int
) -> tuple[Conversation, int]:
    """The newest whole exchanges that fit into `room` tokens with the question, and how many were dropped.

    Raises:
        InputError: the question alone is too long.

    >>> speakers = ("user", "assistant", "user", "assistant")
    >>> told = [Message(role, text) for role, text in zip(speakers, ("aaaaaa", "bbbbbb", "c", "d"), strict=True)]
    >>> letters = lambda turns: sum(len(turn.content) for turn in turns)
    >>> kept, dropped = fit(told, Message("user", "e"), letters, room=4)
    >>> [turn.content for turn in kept], dropped
    (['c', 'd'], 1)
    """
    dropped = 0
    while (needed := count([*history, question])) > room:
        if not history:
            raise InputError(f"the message takes {needed} tokens and {room} are free; shorten it")
        history, dropped = history[2:], dropped + 1
    return history, dropped


def terminal(chat: Chat, write: Callable[[str], None], read: Callable[[str], str] = input) -> None:
    """Talk in the terminal until /exit or the end of the input; `write` shows a piece of text at once."""
    write(HELP + "\n")
    while True:
        try:
            text = read("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if text == "/exit":
            return
        if text.startswith("/"):
            write(command(chat, text) + "\n")
        elif text:
            _answer(chat, text, write)


def command(chat: Chat, text: str) -> str:
    """What a line beginning with a slash does and says."""
    if text == "/reset":
        chat.history, chat.dropped = [], 0
        return "forgotten"
    return HELP if text == "/help" else f"{text} is not a command; {HELP}"


def _answer(chat: Chat, text: str, write: Callable[[str], None]) -> None:
    before = chat.dropped
    pieces = chat.reply(text)
    try:
        for piece in pieces:
            write(piece)
    except KeyboardInterrupt:
        pieces.close()
        write(" [stopped]")
    except InputError as error:
        write(f"[{error}]")
    write("\n")
    if chat.dropped > before:
        write(f"[{chat.dropped - before} oldest exchanges no longer fit and were forgotten]\n")
