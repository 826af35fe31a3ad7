"""`cvlib serve`: a GGUF file behind OpenAI's interface, for programs that speak it."""

from __future__ import annotations

import argparse
import secrets
import sys
import threading
from pathlib import Path

from cvlib.commands import command, positive, say

ABOUT = """\
llama.cpp's own server, in this process. Any program that speaks OpenAI's interface can use it:

  cvlib export smollm2-135m --to gguf --quant q8_0 -o smollm2.gguf
  cvlib serve smollm2.gguf --port 8080
  curl http://127.0.0.1:8080/v1/chat/completions -H "Authorization: Bearer KEY" \\
       -H "Content-Type: application/json" -d '{"messages": [{"role": "user", "content": "你好"}]}'

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="KEY")
  client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": "你好"}])

The key is printed once, when the server starts. Who has it can ask whatever they like, and a host other than 127.0.0.1
opens the port to your network without encryption. Without a temperature of its own a request gets that of the model, or
llama.cpp's. Stop with Ctrl-C.
"""


def register(group) -> None:
    """Add this command to the command line."""
    serving = command(group, "serve", serve, "a GGUF file behind OpenAI's interface, by llama.cpp", ABOUT)
    serving.add_argument("model", type=Path, metavar="MODEL.gguf", help="a file that `cvlib export --to gguf` wrote")
    serving.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine only)")
    serving.add_argument("--port", type=port, default=8080, help="default: 8080; 0 takes a free one")
    serving.add_argument("--api-key", metavar="KEY", help="what requests must show (default: a random one, printed)")
    serving.add_argument(
        "--context", type=positive, metavar="TOKENS", help="prompt and answer, of all who ask (default: the model's)"
    )
    serving.add_argument("--threads", type=positive, metavar="N", help="of the processor (default: its cores)")


def port(text: str) -> int:
    """A number of a port."""
    if not (text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; choose 1024 to 65535, or 0 for a free one")
    return int(text)


def serve(options: argparse.Namespace) -> None:
    """`cvlib serve`, until Ctrl-C."""
    from cvlib import InputError, server

    if options.api_key is not None and not options.api_key.strip():
        raise InputError("--api-key is empty; give a key, or leave the option out for a random one")
    key = options.api_key or secrets.token_urlsafe(24)
    running = server.launch(options.model, key, options.host, options.port, options.context or 0, options.threads)
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"{options.name}: {options.host} is open to your network, without encryption", file=sys.stderr)
    address = f"{running.listening_address}/v1"
    shown = "the one you gave" if options.api_key else key
    text = f"{address}   key: {shown}\nserving {options.model}; Ctrl-C stops"
    say(options, {"address": address, "model": options.model.stem, "key": key}, text)
    sys.stdout.flush()  # a program that waits for the key may read through a pipe
    threading.Event().wait()
