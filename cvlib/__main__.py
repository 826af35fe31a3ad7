"""The command line: for people who have left the notebooks. `cvlib.commands` holds what each command does."""

from __future__ import annotations

import errno
import os
import sys
from argparse import RawDescriptionHelpFormatter

from cvlib import InputError, __version__
from cvlib.commands import Parser, chat, data, evaluate, export, machine, serve, train, vocab

#: What helps against a failure of the file system; anything else is a matter of the place.
REMEDIES = {errno.ENOENT: "check the name", errno.ENOSPC: "make room", errno.EDQUOT: "make room"}

FIRST = """\
a first walk:
  cvlib doctor
  cvlib chat                                  an English model, asked in Chinese
  cvlib train smollm2-cpu -o runs/mine        it learns
  cvlib chat --adapter runs/mine              ask again

Every command explains itself: cvlib train --help
"""


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
        remedy = REMEDIES.get(error.errno, "name another place")
        print(f"{options.name}: {error.filename}: {error.strerror}; {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{options.name}: stopped", file=sys.stderr)
        return 130


def parser() -> Parser:
    """All commands and their options."""
    about = "The package behind the book Teach a Llama Chinese."
    top = Parser(prog="cvlib", description=about, epilog=FIRST, formatter_class=RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=__version__)
    group = top.add_subparsers(required=True, metavar="COMMAND")
    for subject in (machine, vocab, data, train, evaluate, export, chat, serve):
        subject.register(group)
    return top


if __name__ == "__main__":
    sys.exit(main())
