"""A conversation in, an answer in pieces out, whichever library runs the model: transformers or llama.cpp.

Chat and web page know only `Engine`. Both engines make the prompt's tokens by the one renderer (trap 6), and what
leaves them goes through the same `spell` and `until`: no torn character, no half of a stop string.

llama.cpp runs as its own server inside this process (see `server`), behind a random key. We call it directly, not over
HTTP, send it *tokens*, not text, and ask for **one token at a time**. That costs little (what was computed stays in its
cache) and buys three things:

* the penalty falls on the answer only. llama.cpp has no such setting, it penalises the last n tokens whether asked or
  said; with n the length of the answer so far, those are exactly the answer's (trap 18);
* a character spread over three tokens arrives as three tokens. Its own stream leaves out the tokens of a character that
  is not complete yet;
* cancelling is not asking again.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from cvlib import InputError, generation, loading, server
from cvlib.batching import prompt_ids
from cvlib.messages import Conversation, Message
from cvlib.recipes import Decoding
from cvlib.templates import TEMPLATES, find, prompt

#: Where a GGUF file may hold a whole `tokenizer.json` (a key of the GGUF standard): `export` writes it.
TOKENIZER = "tokenizer.huggingface.json"

#: A longer context than this costs memory that few laptops have; ask for it by number.
LONGEST = 8192

#: What both tokenizers of a GGUF file, ours and llama.cpp's, must cut alike: digits, spaces, Chinese, emoji, code.
PROBE = "In 2024 I've paid 3.50  for\n\n\tx = 东北虎；请介绍一下北京。 naïve café 🎉👍🏽!"


class Engine(Protocol):
    """A model that answers, whichever library runs it."""

    tokenizer: object
    #: Name of the prompt template the model was trained in.
    template: str
    #: Longest prompt and answer together, in tokens.
    context: int

    def start(self, conversation: Conversation) -> list[int]:
        """Token ids of the prompt, those of training (trap 6)."""
        return prompt_ids(prompt(conversation, self.template, self.tokenizer.eos_token), self.tokenizer)

    def count(self, conversation: Conversation) -> int:
        """How many tokens of the context the prompt of this conversation takes."""
        return len(self.start(conversation))

    def stream(self, conversation: Conversation, decoding: Decoding, stop: Sequence[str] = ()) -> Iterator[str]:
        """The answer piece by piece, up to an end or a stop string; closing it cancels, the model stays usable."""
        ...


class Transformers(Engine):
    """A model and tokenizer as `loading.load` gives them, in 16, 8 or 4 bits."""

    def __init__(self, model, tokenizer, template: str):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.context = model.config.max_position_embeddings

    def stream(self, conversation: Conversation, decoding: Decoding, stop: Sequence[str] = ()) -> Iterator[str]:
        return generation.stream(self.model, self.tokenizer, conversation, self.template, decoding, stop)


class LlamaCpp(Engine):
    """A GGUF file, run by llama.cpp in this process until the last reference to this object goes.

    Args:
        path: a GGUF file, such as `cvlib export --to gguf` writes.
        template: a name in `templates`; None reads it off the file's own chat template.
        context: tokens of prompt and answer together; None is what the model was trained for, at most `LONGEST`.
        threads: of the processor; None leaves their number to llama.cpp.

    Raises:
        InputError: no GGUF file, or one whose tokenizer or template cannot be had exactly.
    """

    def __init__(
        self, path: str | Path, template: str | None = None, context: int | None = None, threads: int | None = None
    ):
        facts = server.read_facts(path)
        self.tokenizer = read_tokenizer(path, facts)
        self.template = recognised(self.tokenizer, path) if template is None else template
        self.context = context or min(facts[f"{facts['general.architecture']}.context_length"], LONGEST)
        find(self.template)
        self.key = secrets.token_urlsafe(24)
        self.server = server.launch(path, self.key, context=self.context, threads=threads)
        with server.connected(self.server, self.key) as ask:
            cut = ask("/tokenize", content=PROBE, add_special=True)["tokens"]
        if cut != self.tokenizer(PROBE).input_ids:
            raise InputError(f"{path}: its tokenizer cannot be rebuilt exactly; export the model with `cvlib export`")

    def stream(self, conversation: Conversation, decoding: Decoding, stop: Sequence[str] = ()) -> Iterator[str]:
        ends = generation.end_tokens(self.tokenizer, self.template)
        drawn = takewhile(lambda token: token not in ends, self.tokens(self.start(conversation), decoding))
        return generation.until(generation.spell(drawn, self.tokenizer), stop)

    def tokens(self, start: Sequence[int], decoding: Decoding) -> Iterator[int]:
        """Tokens of the answer to a prompt, each asked for behind all before it, until the context is full.

        The samplers are llama.cpp's own, in the order of `sampling.probabilities`; its draws are not torch's.
        """
        if len(start) >= self.context:
            raise InputError(f"a prompt of {len(start)} tokens, a context of {self.context}; shorten the prompt")
        settings = {
            "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
            "repeat_penalty": decoding.repetition_penalty,
            "temperature": decoding.temperature,
            "top_k": decoding.top_k,
            "top_p": decoding.top_p,
            "min_p": decoding.min_p,
            "n_predict": 1,
            "return_tokens": True,
            "verbose": True,  # else the answer is text only
        }
        draws, ids = random.Random(decoding.seed), list(start)
        spared = 0 if decoding.penalise == "all" else len(start)
        for _ in range(min(decoding.max_new_tokens, self.context - len(start))):
            choice = {"seed": draws.getrandbits(31), "repeat_last_n": len(ids) - spared}
            reply = server.accepted(self.server.handle_completions({"prompt": ids, **choice, **settings}))
            (token,) = reply["__verbose"]["tokens"]
            yield token
            ids.append(token)


def read_tokenizer(path: str | Path, facts: dict):
    """The tokenizer of a GGUF file: the one `export` has put into it whole, else what transformers can rebuild."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if TOKENIZER not in facts:
        source = {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": Path(path).name}
        smollm = facts.get("tokenizer.ggml.pre") == "smollm"
        return loading.mend_tokenizer(**source) if smollm else AutoTokenizer.from_pretrained(**source)
    rules = Tokenizer.from_str(facts[TOKENIZER])
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # theirs: ours
    numbers = {ours: facts.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in names.items()}
    marks = {f"{name}_token": rules.id_to_token(number) for name, number in numbers.items() if number is not None}
    return PreTrainedTokenizerFast(tokenizer_object=rules, chat_template=facts.get("tokenizer.chat_template"), **marks)


def recognised(tokenizer, path: str | Path) -> str:
    """The template of ours that writes what the tokenizer's own chat template writes, to the letter."""
    from jinja2 import TemplateError

    talk = [Message("user", "你好"), Message("assistant", "Hello."), Message("user", "1 + 1?")]
    rows = [turn.row() for turn in talk]
    with suppress(TemplateError, ValueError):  # one that is broken, or that refuses this talk, or none at all
        text = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
        for name in TEMPLATES:
            if text == "".join(segment.text for segment in prompt(talk, name, tokenizer.eos_token)):
                return name
    raise InputError(f"{path}: its chat template is none of {', '.join(TEMPLATES)}; name the one it was trained in")
