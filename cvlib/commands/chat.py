"""`cvlib chat`: a conversation with a model."""

from __future__ import annotations

import argparse
import sys

from cvlib.commands import command, say
from cvlib.commands.choosing import chosen, model_options, setting_option


def register(group) -> None:
    """Add this command to the command line."""
    talking = command(group, "chat", chat, "talk to a model in the terminal")
    model_options(talking)
    setting_option(talking, "decoding, such as temperature=0")


def chat(options: argparse.Namespace) -> None:
    """`cvlib chat`"""
    recipe, model, tokenizer = chosen(options, [f"decoding.{item}" for item in options.set])
    from cvlib.chat import Chat, terminal

    talk = Chat(model, tokenizer, recipe.template, recipe.decoding)
    stream = sys.stderr if options.json else sys.stdout  # the transcript is alone on standard output

    def write(text: str) -> None:
        print(text, end="", flush=True, file=stream)

    def ask(prompt: str) -> str:
        write(prompt)  # input() itself would write it to standard output
        return input()

    terminal(talk, write, ask if options.json else input)
    if options.json:
        say(options, [turn.row() for turn in talk.history], "")
