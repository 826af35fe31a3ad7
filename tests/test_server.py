"""The server: OpenAI's own client talks to it, nobody does without the key, and what cannot be served is one line."""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys

import openai
import pytest

from cvlib import InputError, export, loading, server

KEY = "a-key"
#: What the tiny random model is held to by a grammar: characters of one, two, three and four bytes.
SPELT = "Straße 北京，东北虎 🙂👍🏽 x"


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny, folder / "model")
    path = folder / "model" / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["model"]["merges"] = [["Ġ", "Ġ"]]  # llama.cpp insists on one
    state["model"]["vocab"]["ĠĠ"] = 259
    path.write_text(json.dumps(state), encoding="utf-8")
    config = json.loads((folder / "model" / "config.json").read_text()) | {"vocab_size": 260}
    from transformers import LlamaConfig, LlamaForCausalLM

    loading.quiet(LlamaForCausalLM(LlamaConfig.from_dict(config)).save_pretrained, folder / "model")
    tokenizer = loading.read_tokenizer(str(folder / "model"))
    tokenizer.chat_template = export.merging.chat_template("chatml", tokenizer.eos_token)
    tokenizer.save_pretrained(folder / "model")
    export.gguf(folder / "model", folder / "tiny.gguf")
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def running(file):
    return server.launch(file, KEY, threads=1)


def client(running, key=KEY):
    return openai.OpenAI(base_url=f"{running.listening_address}/v1", api_key=key, max_retries=0, timeout=60)


ASKED = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "你好 🙂"}],
    "max_tokens": 80,
    "extra_body": {"grammar": f'root ::= "{SPELT}"'},
}


def test_openais_client_gets_an_answer(running):
    reply = client(running).chat.completions.create(**ASKED)
    assert reply.choices[0].message.content == SPELT
    assert reply.usage.completion_tokens >= len(SPELT.encode())


def test_no_character_is_torn_on_its_way(running):
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client(running).chat.completions.create(**ASKED, stream=True)
        if chunk.choices
    ]
    assert "".join(pieces) == SPELT
    assert len(pieces) > 10


def test_a_client_that_leaves_does_not_keep_the_others_waiting(running):
    with client(running).chat.completions.create(**ASKED, stream=True) as stream:
        next(iter(stream))
    assert client(running).chat.completions.create(**ASKED).choices[0].message.content == SPELT


@pytest.mark.parametrize("key", ["", "another"])
def test_nobody_asks_without_the_key(running, key):
    with pytest.raises(openai.AuthenticationError):
        client(running, key or "none").models.list()
    assert [model.id for model in client(running).models.list()] == ["tiny"]


def test_it_listens_on_loopback_only(running):
    assert running.listening_address.startswith("http://127.0.0.1:")
    port = int(running.listening_address.rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", port), timeout=5):
        pass  # a server on 0.0.0.0 would answer here


def test_what_cannot_be_served(file, tmp_path, running):
    cut, words, other = tmp_path / "cut.gguf", tmp_path / "words.gguf", tmp_path / "endless.gguf"
    cut.write_bytes(file.read_bytes()[:-50_000])
    words.write_text("好" * 100, encoding="utf-8")
    other.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**40))
    taken = int(running.listening_address.rpartition(":")[2])
    for path, port, reason in (
        (tmp_path / "none.gguf", 0, "none.gguf: no GGUF file to read (No such file"),
        (tmp_path, 0, "no GGUF file to read (Is a directory"),
        (words, 0, "no GGUF file to read (it does not begin with GGUF)"),
        (other, 0, "no GGUF file to read ("),
        (cut, 0, "llama.cpp cannot load it; is it cut short, or memory too small?"),
        (file, taken, f"127.0.0.1:{taken}: Address already in use; choose another --port or --host"),
    ):
        with pytest.raises(InputError) as found:
            server.launch(path, KEY, port=port, threads=1)
        assert reason in str(found.value)
        assert "\n" not in str(found.value)
    with server.connected(running, KEY) as ask, pytest.raises(InputError, match=r"llama\.cpp refuses: .*context"):
        ask("/completion", prompt=[70] * 600)


# ---------------------------------------------------------------------------------------------------- the command line
def test_the_command_prints_its_key_once_and_stops_on_ctrl_c(file):
    command = [sys.executable, "-m", "cvlib", "serve", str(file), "--port", "0", "--threads", "1", "--json"]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        said = json.loads(run.stdout.readline())
        assert (said["model"], len(said["key"]) >= 32) == ("tiny", True)
        asked = openai.OpenAI(base_url=said["address"], api_key=said["key"], max_retries=0)
        assert asked.chat.completions.create(**ASKED).choices[0].message.content == SPELT
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert (out, err, run.returncode) == ("", "\ncvlib serve: stopped\n", 130)


def test_what_the_command_refuses(file, refused, tmp_path):
    refused(["serve", tmp_path / "none.gguf"], "none.gguf: no GGUF file to read", "cvlib export --to gguf")
    refused(["serve", file, "--port", "70000"], "'70000' is not a port")
    refused(["serve", file, "--api-key", ""], "--api-key is empty")
    refused(["serve", file, "--context", "0"], "'0' is not a whole number from 1")
    refused(["serve", file, "--host", "256.0.0.1", "--port", "0"], "256.0.0.1:0: ", "choose another --port or --host")
    refused(["serve", file, "--host", "a" * 70], "choose another --port or --host")
