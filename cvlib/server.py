"""A GGUF file in, llama.cpp's own server out: OpenAI's interface on a port of this machine.

The server comes with the package `xllamacpp` and runs in threads of this process. Without a key it would answer every
program on the machine, and every web page open in a browser on it: so it never starts without one, and it listens on
loopback unless told otherwise.
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from cvlib import InputError

#: How `struct` calls the numbers of a GGUF file, by their code there. Two codes are no numbers: text, and a list.
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9


def launch(
    path: str | Path,
    key: str,
    host: str = "127.0.0.1",
    port: int = 0,
    context: int = 0,
    threads: int | None = None,
):
    """llama.cpp's server for a GGUF file, running until the last reference to what is returned goes.

    Args:
        key: what every request must show.
        port: 0 takes a free one; `listening_address` of what is returned says which.
        context: tokens, shared by all who ask at the same time; 0 is what the model was trained for.
        threads: of the processor; None leaves their number to llama.cpp.

    Raises:
        InputError: not a GGUF file, or llama.cpp cannot start: a port that is taken, too little memory.
    """
    import xllamacpp

    read_facts(path)
    refuse_address(host, port)
    options = xllamacpp.CommonParams()
    options.model.path, options.model_alias = str(path), {Path(path).stem}
    options.hostnames, options.port, options.api_keys = [host], port, [key]
    options.n_ctx, options.n_parallel, options.kv_unified = context, 4, True
    options.cache_ram_mib = 0  # else it keeps up to 8 GB of conversations in case somebody goes on with them
    options.warmup, options.verbosity = False, -1
    if threads:
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    try:
        return xllamacpp.Server(options)
    except RuntimeError:
        raise InputError(f"{path}: llama.cpp cannot load it; is it cut short, or memory too small?") from None


def refuse_address(host: str, port: int) -> None:
    """Refuse an address this machine cannot listen on: another program's port, or a host of somebody else."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, UnicodeError) as error:  # a host may be no name at all
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]  # Python repeats the address
        raise InputError(f"{host}:{port}: {reason}; choose another --port or --host") from None


@contextmanager
def connected(server, key: str) -> Iterator[Callable[..., dict]]:
    """A function that asks a running server, `ask("/tokenize", content="你好")`, all through one connection."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}

    def ask(route: str, **body) -> dict:
        line.request("POST", route, json.dumps(body), headers)
        return accepted(json.load(line.getresponse()))

    with closing(http.client.HTTPConnection(urlsplit(server.listening_address).netloc)) as line:
        yield ask


def accepted(reply: dict) -> dict:
    """llama.cpp's reply, unless it is a refusal.

    >>> accepted({"error": {"message": "Prompt contains invalid tokens"}})
    Traceback (most recent call last):
    cvlib.InputError: llama.cpp refuses: Prompt contains invalid tokens
    """
    if "error" in reply:
        raise InputError(f"llama.cpp refuses: {reply['error']['message']}")
    return reply


def is_gguf(path: str | Path) -> bool:
    """Whether there is a file that begins as GGUF files do, whatever its name ends in."""
    with suppress(OSError), open(path, "rb") as file:
        return file.read(4) == b"GGUF"
    return False


def read_facts(path: str | Path) -> dict:
    """The settings at the head of a GGUF file by name; its lists (pieces, merges) are passed over.

    `gguf.GGUFReader` makes an array of every piece and every merge, which takes seconds.
    """
    try:
        with open(path, "rb") as file:
            return dict(_facts(file))
    except (OSError, struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError) as error:
        damaged = "it is cut short or damaged" if isinstance(error, struct.error) else error
        reason = getattr(error, "strerror", None) or damaged
        raise InputError(f"{path}: no GGUF file to read ({reason}); write one with `cvlib export --to gguf`") from None


def _facts(file) -> Iterator[tuple[str, object]]:
    def number(kind: str):
        return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

    def text() -> str:
        return file.read(number("Q")).decode("utf-8")

    def value(kind: int):
        return text() if kind == TEXT else number(NUMBERS[kind])

    if file.read(4) != b"GGUF":
        raise OSError("it does not begin with GGUF")
    number("I"), number("Q")  # version, how many tensors
    for _ in range(number("Q")):
        name, kind = text(), number("I")
        if kind != LIST:
            yield name, value(kind)
            continue
        kind = number("I")
        for _ in range(number("Q")):
            value(kind)
