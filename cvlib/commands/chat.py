"""`cvlib chat`: a conversation with a model, in the terminal or in a browser."""

from __future__ import annotations

import argparse
import io
import sys

from cvlib import InputError, recipes
from cvlib.commands import command, explained, say, setting_option
from cvlib.commands.choosing import engine, model_options, recipe_of

EXAMPLES = """\
/help lists the commands of the chat: undo, retry, save, load and others.

examples:
  cvlib chat --adapter runs/mine
  cvlib chat --adapter runs/mine --web
  cvlib chat runs/mine.gguf --set temperature=0 --system "Answer in Chinese."
"""


def register(group) -> None:
    """Add this command to the command line."""
    keys = recipes.keys(recipes.Decoding)
    about = "talk to a model, or to a GGUF file, in the terminal or in a browser"
    talking = command(group, "chat", chat, about, f"{explained(keys)}\n\n{EXAMPLES}")
    model_options(talking)
    talking.add_argument("--system", default="", metavar="TEXT", help="what the model is told before everything else")
    talking.add_argument("--web", action="store_true", help="a chat page, for browsers on this machine only")
    setting_option(talking, keys, "decoding, such as temperature=0")


def chat(options: argparse.Namespace) -> None:
    """`cvlib chat`"""
    if options.web and options.json:
        raise InputError("--web and --json do not go together; the page has a button for the transcript")
    recipe = recipe_of(options)
    decoding = recipes.override(recipe.decoding, options.set)
    answering = engine(options, recipe)
    if options.web:
        from cvlib import web

        web.serve(web.columns(answering, options.adapter), decoding, options.system)
        return
    from cvlib.chat import Chat, terminal

    talk = Chat(answering, decoding, options.system.strip())
    stream = sys.stderr if options.json else sys.stdout  # the transcript is alone on standard output
    for each, errors in ((sys.stdin, "surrogateescape"), (stream, "replace")):
        if isinstance(each, io.TextIOWrapper):
            each.reconfigure(errors=errors)  # a broken byte is said, not a traceback

    def write(text: str) -> None:
        print(text, end="", flush=True, file=stream)

    def ask(prompt: str) -> str:
        write(prompt)  # input() itself would write it to standard output
        return input()

    if sys.stdin.isatty():
        edit_lines()
    terminal(talk, write, ask if options.json else input)
    if options.json:
        say(options, talk.row(), "")


def edit_lines() -> None:
    """Arrow keys and earlier lines at the prompt, and pastes of several lines as one; not on every system."""
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
