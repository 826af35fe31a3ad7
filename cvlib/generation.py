"""Prompt in, text out, piece by piece.

One loop serves everything: a chat streams one prompt, an evaluation answers many at once. `tokens` is the loop: it
draws from what the model predicts, with a key-value cache (`sampling` reshapes the prediction). Three functions stand
between it and the reader:

* `end_tokens`: what ends an answer, also where a tokenizer is wrong about its own end token (trap 17);
* `spell` turns tokens into text without ever showing half a character: a Chinese character is three bytes and may be
  three tokens;
* `until` ends the text at a stop string that may begin in one piece and end in another (trap 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

import torch

from cvlib.batching import prompt_ids
from cvlib.messages import Conversation
from cvlib.recipes import Decoding
from cvlib.sampling import probabilities
from cvlib.templates import find, prompt

#: Prompts are padded to a multiple of this many tokens: on a CPU PyTorch keeps compiled code for every length it has
#: met, and a chat meets a new one at every turn.
LENGTHS = 32

#: What a decoder writes where bytes are no character: not one, or not yet.
TORN = "\N{REPLACEMENT CHARACTER}"


@torch.no_grad()
def tokens(model, prompts: Sequence[Sequence[int]], decoding: Decoding) -> Iterator[list[int]]:
    """One new token for every prompt at each step, until `max_new_tokens`.

    Prompts are padded on the left to one length, so that all of them end where the answer begins. Only the answer
    is penalised for repeating itself, unless `decoding.penalise` is "all": a penalty on the prompt's tokens forbids
    an answer to use the question's own words (trap 18).
    """
    model.eval()
    device, longest = model.device, -(-max(map(len, prompts)) // LENGTHS) * LENGTHS
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
    draws = torch.Generator().manual_seed(decoding.seed)
    said = [list(row) if decoding.penalise == "all" else [] for row in prompts]
    cache = None
    for _ in range(decoding.max_new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        chances = probabilities(out.logits[:, -1].cpu(), said, decoding)
        ids = torch.multinomial(chances, 1, generator=draws).to(device)  # (rows, 1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
        drawn = ids[:, 0].tolist()
        for row, token in zip(said, drawn, strict=True):
            row.append(token)
        yield drawn


def spell(stream: Iterator[int], tokenizer) -> Iterator[str]:
    """Text of a stream of tokens; a character is shown once all its bytes are there.

    A piece is decoded together with the one before it: SentencePiece drops the space in front of a text. When the
    stream ends inside a character, the half of it is left out.
    """
    before: list[int] = []
    waiting: list[int] = []
    for token in stream:
        waiting.append(token)
        text = _after(before, waiting, tokenizer)
        if text and not text.endswith(TORN):
            yield text
            before, waiting = waiting, []
    if rest := _after(before, waiting, tokenizer).rstrip(TORN):
        yield rest


def _after(before: list[int], waiting: list[int], tokenizer) -> str:
    known = tokenizer.decode(before, skip_special_tokens=True)
    return tokenizer.decode(before + waiting, skip_special_tokens=True)[len(known) :]


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """A text's pieces up to the first stop string that is complete; no part of that string is ever shown.

    A piece is held back as long as it may be the beginning of a stop string. Comparing *tokens* instead would miss
    most of them: the newline in front of `User:` is one token here and a part of another there (trap 5).

    >>> list(until(["Paris.", "\\n", "Us", "er", ":", " and"], ["\\nUser:"]))
    ['Paris.']
    >>> list(until(["Paris.", "\\n", "Us", "ually"], ["\\nUser:"]))
    ['Paris.', '\\nUsually']
    """
    held = ""
    for piece in pieces:
        held += piece
        if ends := [(held.find(text) + len(text), held.find(text)) for text in stop if text in held]:
            held = held[: min(ends)[1]]
            break
        ready = len(held) - _begun(held, stop)
        if ready:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held


def _begun(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of `text` with which a stop string may have begun."""
    longest = min(len(text), max(map(len, stop), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in stop)), 0)


def end_tokens(tokenizer, template: str) -> set[int]:
    """Tokens that end an answer: the tokenizer's own end token, and the marks of the template's turns.

    Base models are published whose tokenizers name another end token than the one their chats were written with; a
    loop that trusts the tokenizer alone then never stops (trap 17).
    """
    known = tokenizer.get_added_vocab()
    return {tokenizer.eos_token_id, *(known[mark] for mark in find(template).marks if mark in known)}


def stream(
    model, tokenizer, conversation: Conversation, template: str, decoding: Decoding, stop: Sequence[str] = ()
) -> Iterator[str]:
    """The answer to the last turn of a conversation, piece by piece, up to an end token or a stop string.

    Close the generator to cancel: it holds nothing but its own cache, so the model can answer again at once.
    """
    start = prompt_ids(prompt(conversation, template, tokenizer.eos_token), tokenizer)
    ends = end_tokens(tokenizer, template)
    drawn = (token for (token,) in tokens(model, [start], decoding))
    yield from until(spell(takewhile(lambda token: token not in ends, drawn), tokenizer), stop)


def answers(
    model, tokenizer, conversations: Sequence[Conversation], template: str, decoding: Decoding, batch: int = 16
) -> list[str]:
    """Answers to many conversations, `batch` at a time, each up to its end token."""
    return [text for text, _ in ended(model, tokenizer, conversations, template, decoding, batch)]


def ended(
    model, tokenizer, conversations: Sequence[Conversation], template: str, decoding: Decoding, batch: int = 16
) -> list[tuple[str, bool]]:
    """The same answers, each with whether it came to its end token before its room was used up."""
    from tqdm import tqdm

    starts = [prompt_ids(prompt(c, template, tokenizer.eos_token), tokenizer) for c in conversations]
    ends = end_tokens(tokenizer, template)
    found = []
    for first in tqdm(range(0, len(starts), batch), desc="answering", unit="batch", leave=False):
        found += _batch(model, tokenizer, starts[first : first + batch], ends, decoding)
    return found


def _batch(model, tokenizer, starts: list[list[int]], ends: set[int], decoding: Decoding) -> list[tuple[str, bool]]:
    written: list[list[int]] = [[] for _ in starts]
    done: set[int] = set()
    for step in tokens(model, starts, decoding):
        for row, token in enumerate(step):
            if row not in done:
                if token in ends:
                    done.add(row)
                else:
                    written[row].append(token)
        if len(done) == len(starts):
            break
    return [("".join(spell(iter(row), tokenizer)), place in done) for place, row in enumerate(written)]
