"""cvlib: the small package behind the book *Teach a Llama Chinese*.

Every module holds one idea and imports only modules above it in the table of `tests/test_imports.py`.
Nothing heavy is imported here: `import cvlib` must stay instant.
"""

import logging
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
