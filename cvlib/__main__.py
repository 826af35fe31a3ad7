"""The command line: for people who have left the notebooks. `cvlib.commands` holds what each command does."""

from __future__ import annotations

import os
import sys

from cvlib import InputError, __version__
from cvlib.commands import Parser, chat, data, evaluate, export, machine, serve, train, vocab


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the return value is the exit code."""
    options = parser().parse_args(arguments)
    try:
        code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"{options.name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if not error.filename:
            raise
        print(f"{options.name}: {error.filename}: {error.strerror}; name another place", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{options.name}: stopped", file=sys.stderr)
        return 130


def parser() -> Parser:
    """All commands and their options."""
    top = Parser(prog="cvlib", description="The package behind the book Teach a Llama Chinese.")
    top.add_argument("--version", action="version", version=__version__)
    group = top.add_subparsers(required=True, metavar="COMMAND")
    for subject in (machine, vocab, data, train, evaluate, export, chat, serve):
        subject.register(group)
    return top


if __name__ == "__main__":
    sys.exit(main())
