"""Prompt in, text out, piece by piece.

One loop serves everything: a chat streams one prompt, an evaluation answers many at once. The loop is the method; the
three functions around it are its parts: `probabilities` reshapes what the model predicts, `tokens` draws from it with
a key-value cache, `spell` turns tokens into text without ever showing half a character (a Chinese character is three
bytes and may be three tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cvlib.batching import prompt_ids
from cvlib.messages import Conversation
from cvlib.recipes import Decoding
from cvlib.templates import prompt


def probabilities(logits: torch.Tensor, answers: Sequence[Sequence[int]], decoding: Decoding) -> torch.Tensor:
    """Next-token probabilities after repetition penalty, temperature, top-k and top-p, in this order.

    Args:
        logits: (rows, vocabulary) as the model gives them.
        answers: tokens each row has written so far. Only these are penalised, never the prompt: a penalty on the
            prompt forbids an answer to repeat the question's own words (trap 18).

    Returns:
        (rows, vocabulary), each row summing to 1.

    >>> probabilities(torch.tensor([[2.0, 1.0, 0.0]]), [[]], Decoding(temperature=0)).tolist()
    [[1.0, 0.0, 0.0]]
    """
    logits = logits.float().clone()
    for row, answer in enumerate(answers):  # Keskar et al. 2019, CTRL, section 4.1
        seen = torch.tensor(sorted(set(answer)), dtype=torch.long, device=logits.device)
        kept = logits[row, seen]
        penalty = decoding.repetition_penalty
        logits[row, seen] = torch.where(kept > 0, kept / penalty, kept * penalty)
    if decoding.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits /= decoding.temperature
    if 0 < decoding.top_k < logits.shape[-1]:
        smallest = logits.topk(decoding.top_k).values[:, -1:]
        logits[logits < smallest] = -torch.inf
    if decoding.top_p < 1:  # Holtzman et al. 2020: the smallest set of tokens that holds top_p
        ordered, order = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= decoding.top_p
        logits[beyond.scatter(-1, order, beyond)] = -torch.inf
    return logits.softmax(-1)


@torch.no_grad()
def tokens(model, prompts: Sequence[Sequence[int]], decoding: Decoding) -> Iterator[list[int]]:
    """One new token for every prompt at each step, until `max_new_tokens`.

    Prompts of unequal length are padded on the left, so that all of them end where the answer begins.
    """
    model.eval()
    device, longest = model.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
    draws = torch.Generator().manual_seed(decoding.seed)
    answers: list[list[int]] = [[] for _ in prompts]
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
        chances = probabilities(out.logits[:, -1].cpu(), answers, decoding)
        ids = torch.multinomial(chances, 1, generator=draws).to(device)  # (rows, 1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
        drawn = ids[:, 0].tolist()
        for answer, token in zip(answers, drawn, strict=True):
            answer.append(token)
        yield drawn


def spell(stream: Iterator[int], tokenizer) -> Iterator[str]:
    """Text of a stream of tokens; a character is shown once all its bytes are there.

    A piece is decoded together with the one before it: SentencePiece drops the space in front of a text.
    """
    before: list[int] = []
    waiting: list[int] = []
    for token in stream:
        waiting.append(token)
        text = _after(before, waiting, tokenizer)
        if text and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text
            before, waiting = waiting, []
    if waiting:
        yield _after(before, waiting, tokenizer)


def _after(before: list[int], waiting: list[int], tokenizer) -> str:
    known = tokenizer.decode(before, skip_special_tokens=True)
    return tokenizer.decode(before + waiting, skip_special_tokens=True)[len(known) :]


def stream(model, tokenizer, conversation: Conversation, template: str, decoding: Decoding) -> Iterator[str]:
    """The answer to the last turn of a conversation, piece by piece, up to the model's end token."""
    start = prompt_ids(prompt(conversation, template, tokenizer.eos_token), tokenizer)
    drawn = (token for (token,) in tokens(model, [start], decoding))
    yield from spell(_until(drawn, tokenizer.eos_token_id), tokenizer)


def _until(drawn: Iterator[int], end: int) -> Iterator[int]:
    for token in drawn:
        if token == end:
            return
        yield token


def answers(
    model, tokenizer, conversations: Sequence[Conversation], template: str, decoding: Decoding, batch: int = 16
) -> list[str]:
    """Answers to many conversations, `batch` at a time, each up to its end token."""
    from tqdm import tqdm

    starts = [prompt_ids(prompt(c, template, tokenizer.eos_token), tokenizer) for c in conversations]
    texts = []
    for first in tqdm(range(0, len(starts), batch), desc="answering", unit="batch", leave=False):
        texts += _batch(model, tokenizer, starts[first : first + batch], decoding)
    return texts


def _batch(model, tokenizer, starts: list[list[int]], decoding: Decoding) -> list[str]:
    written: list[list[int]] = [[] for _ in starts]
    done: set[int] = set()
    for step in tokens(model, starts, decoding):
        for row, token in enumerate(step):
            if row not in done:
                if token == tokenizer.eos_token_id:
                    done.add(row)
                else:
                    written[row].append(token)
        if len(done) == len(starts):
            break
    return [tokenizer.decode(row, skip_special_tokens=True) for row in written]
