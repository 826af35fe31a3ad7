"""The command line's parts: a module for each subject, and here what all commands share.

Every command takes `--json`, refuses unknown options, and ends with one line that names value and remedy when its
input cannot be used. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """A parser that takes no shortened options and refuses in one line; `keys` are what its `--set` can change."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.keys: list[str] = []

    def parse_known_args(self, args=None, namespace=None):
        """Refuse what is left over here, where the command is known; argparse would leave it to the first parser."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"{left[0]} is unknown{self.meant(left[0])}")
        return found, left

    def meant(self, word: str) -> str:
        """The option of this command, or the key of its `--set`, that `word` resembles."""
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        known = {option.lstrip("-").replace("-", "_"): option for option in self._option_string_actions}
        known |= {key.rpartition(".")[2]: f"--set {key}=VALUE" for key in self.keys}
        near = difflib.get_close_matches(name, known, 1) if word.startswith("-") else []
        return f" (did you mean {known[near[0]]}?)" if near else ""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def command(group, name: str, run, about: str, epilog: str = "") -> Parser:
    """One command of a group of commands; `run` takes its options and returns the exit code, None for 0."""
    added = group.add_parser(
        name, help=about, description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    added.set_defaults(run=run, name=added.prog)
    added.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return added


def subcommands(group, name: str, about: str):
    """A command that is itself a group of commands, such as `cvlib vocab`."""
    return group.add_parser(name, help=about, description=about).add_subparsers(required=True, metavar="ACTION")


def setting_option(command: Parser, keys: dict[str, dataclasses.Field], about: str) -> None:
    """`--set KEY=VALUE`, as often as wanted, for keys as `recipes.keys` gives them."""
    command.keys = list(keys)
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=about)


def explained(keys: dict[str, dataclasses.Field]) -> str:
    """The keys of `--set` for a help page, a line each."""
    lines = [_line(name, item) for name, item in keys.items()]
    return "\n".join(["keys for --set, and what holds where the recipe is silent:", *lines])


def _line(name: str, item: dataclasses.Field) -> str:
    default = item.default_factory() if item.default is dataclasses.MISSING else item.default
    about = item.metadata["help"].replace("%", "%%")
    return f"  {name + '=' + str(default).replace(' ', ''):<42} {about}"


def natural(text: str) -> int:
    """A number of things given on the command line: 0, 1, 2, …"""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def positive(text: str) -> int:
    """A number of things of which there must be one: 1, 2, …"""
    if not natural(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def place(text: str) -> Path:
    """A file or folder to write, given on the command line: it needs a name of its own."""
    if Path(text).name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} has no name of its own; write one, such as runs/mine")
    return Path(text)


def say(options: argparse.Namespace, data, text: str) -> None:
    """Print `data` as JSON or `text`, as asked."""
    print(json.dumps(data, ensure_ascii=False) if options.json else text)
