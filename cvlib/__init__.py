"""cvlib: the small package behind the book *Teach a Llama Chinese*.

Every module holds one idea and imports only modules above it in the table of `tests/test_imports.py`.
Nothing heavy is imported here: `import cvlib` must stay instant.
"""

import difflib
import logging
from collections.abc import Iterable
from pathlib import Path

# Without a GPU bitsandbytes reports, when it is imported, that an optional package is missing; that is no news here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"

#: The repository this package was installed from (editable): notebooks change into it, recipes name data inside it.
ROOT = Path(__file__).resolve().parent.parent


class InputError(ValueError):
    """The reader's input cannot be used. The message is one line: where, what was found, what to do instead.

    The command line prints it and exits with code 2; everything else is a bug and keeps its traceback.
    """


def choose(word: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name: up to three known ones that it resembles, or else all of them.

    >>> choose("smollm2-135", ["smollm2-135m", "minilm"])
    "did you mean 'smollm2-135m'?"
    >>> choose("gpt", ["smollm2-135m", "minilm"])
    'choose one of smollm2-135m, minilm'
    """
    known = list(known)
    near = [repr(name) for name in difflib.get_close_matches(word, known)]
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
