"""Answers in, what is wrong with how they are written out: loops, poor words, no end.

A small model's usual failure is not a wrong fact. It says the same again until the room is used up. Three numbers show
it, each for one answer, so that an interval over answers can be given:

* **longest loop**: units covered by the longest stretch that says one piece three times or more in a row;
* **distinct-n** (Li et al. 2016): different n-grams over all n-grams, 1 for an answer that repeats nothing;
* **never stopped**: the answer used all its tokens and did not write its end token.

They count *characters* of Chinese and *words* of other scripts, never tokens: a tokenizer's pieces would make the
numbers of two models incomparable. A repetition penalty mends all three and need not mend the model (trap 18):
`penalised_bits` prices what it does to the text a person wrote.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from cvlib import sampling
from cvlib.batching import prompt_ids
from cvlib.evaluation import Score, han_share, is_han
from cvlib.messages import Conversation
from cvlib.recipes import Decoding
from cvlib.templates import prompt

TIMES = 3  # a piece said so often in a row is a loop


def units(text: str) -> list[str]:
    """Chinese characters, words and numbers of other scripts, and punctuation marks, in order.

    >>> units("我爱 New York，99次")
    ['我', '爱', 'New', 'York', '，', '99', '次']
    """
    spaced = "".join(f" {character} " if is_han(character) else character for character in text)
    return re.findall(r"\w+|[^\w\s]", spaced)


def distinct(text: str, n: int = 2) -> float:
    """Different n-grams of units over all of them; 1 if the text is too short to repeat one.

    >>> distinct("好的好的好的")             # 好的, 的好, and each again
    0.4
    """
    parts = units(text)
    grams = list(zip(*(parts[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_loop(text: str) -> int:
    """Units in the longest stretch in which one piece follows itself, `TIMES` times or more; 0 without any.

    >>> longest_loop("我很高兴。我很高兴。我很高兴。再见"), longest_loop("好好学习，好好学习")
    (15, 0)
    """
    parts, longest = units(text), 0
    for period in range(1, len(parts) // TIMES + 1):
        run = 0  # units in a row that equal the unit one period before
        for here, there in zip(parts[period:], parts, strict=False):
            run = run + 1 if here == there else 0
            if run >= (TIMES - 1) * period:
                longest = max(longest, run + period)
    return longest


def describe(answer: str, stopped: bool) -> dict:
    """The three numbers of one answer, with its length in units."""
    numbers = {"units": len(units(answer)), "loop": longest_loop(answer), "distinct_2": distinct(answer)}
    return numbers | {"never_stopped": not stopped}


def summary(answers: Sequence[tuple[str, bool]]) -> dict:
    """Means over answers as `generation.ended` gives them, and the share of their letters that are Chinese."""
    numbers = [describe(text, stopped) for text, stopped in answers]
    means = {key: sum(one[key] for one in numbers) / len(numbers) for key in numbers[0]}
    return {"answers": len(numbers), "han_share": han_share([text for text, _ in answers])} | means


@torch.no_grad()
def penalised_bits(
    model, tokenizer, conversations: Sequence[Conversation], template: str, decodings: Sequence[Decoding]
) -> list[Score]:
    """Bits per byte of the last answers under the model *as it decodes*, one score for each way of decoding.

    A person's answer repeats characters as every text does. The penalty makes each repeat less likely, so it costs
    bits, and more with each step of the penalty: what it hides in a transcript it shows here. Temperature is 1 and
    nothing is cut off, or the text might have no probability at all.
    """
    from tqdm import tqdm

    model.eval()
    plain = [replace(decoding, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) for decoding in decodings]
    nll: list[list[float]] = [[] for _ in decodings]
    for row in tqdm(conversations, desc="scoring", unit="row", leave=False):
        start = prompt_ids(prompt(row[:-1], template, tokenizer.eos_token), tokenizer)
        answer = tokenizer(row[-1].content, add_special_tokens=False, split_special_tokens=True).input_ids
        ids = torch.tensor([start + answer], device=model.device)
        logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1].cpu()  # (answer, vocabulary)
        for nats, decoding in zip(nll, plain, strict=True):
            before = start if decoding.penalise == "all" else []
            said = [[*before, *answer[:place]] for place in range(len(answer))]
            chances = sampling.probabilities(logits, said, decoding)
            nats.append(-chances.gather(1, torch.tensor([answer]).T).double().log().sum().item())
    sizes = [len(row[-1].content.encode()) for row in conversations]
    return [Score(nats, sizes) for nats in nll]
