"""Model and held-out conversations in, numbers that can be compared out.

* **Bits per byte**: how many bits the model needs for each byte of the answers. It does not depend on how a vocabulary
  cuts the text, so models with different vocabularies compare. Only the answers' own text is scored; of plain text
  every token is.
* **Forgetting**: bits per byte after less before, on the same rows and paired, for each held-out set.
* **Answer language**: the share of Chinese characters in what the model answers to Chinese questions.

`token_losses` is also the loss that `training` minimises: what is trained and what is measured are one function.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cvlib import InputError, intervals
from cvlib.attention import starts
from cvlib.batching import IGNORE_INDEX, Example, answers_only, document_marks, encode, flatten, groups
from cvlib.messages import Conversation
from cvlib.show import Table
from cvlib.templates import render


def token_losses(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Negative log-likelihood of every labelled token of a flattened batch, in nats: (n,).

    The head runs only at positions whose next token has a label: on a vocabulary of 49,152, float32 logits of the
    unlabelled ones would be the largest tensor of the whole step.
    """
    targets = batch["labels"][0, 1:]
    at = (targets != IGNORE_INDEX).nonzero().flatten()
    out = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        conversations=starts(batch["position_ids"]),
        use_cache=False,  # with a cache, transformers would let conversations see each other
        logits_to_keep=at,
    )
    return torch.nn.functional.cross_entropy(out.logits[0].float(), targets[at], reduction="none")


def bits_per_byte(nll: torch.Tensor, text_bytes: int) -> float:
    """Compression of the scored text: total negative log-likelihood in bits over its UTF-8 length.

    Unlike perplexity per token it does not depend on the tokenizer, so models with different
    vocabularies can be compared (Gao et al. 2020, The Pile).

    Args:
        nll: (n,) natural-log losses of the scored tokens, in nats; prompt tokens left out.
        text_bytes: UTF-8 bytes of exactly the text those tokens spell.

    Raises:
        ValueError: no bytes, or a loss that is not finite.

    >>> bits_per_byte(torch.full((4,), math.log(2), dtype=torch.float64), text_bytes=2)   # 4 bits over 2 bytes
    2.0
    """
    if text_bytes <= 0:
        raise ValueError(f"text_bytes is {text_bytes}; score at least one byte of text")
    if not torch.isfinite(nll).all():
        raise ValueError(
            f"{(~nll.isfinite()).sum()} of {len(nll)} losses are not finite; the model or its input is broken"
        )
    return nll.double().sum().item() / math.log(2) / text_bytes


@dataclass(frozen=True)
class Score:
    """Bits per byte of a set of conversations, with what is needed for an interval.

    `nll` holds the total nats and `text_bytes` the UTF-8 bytes of each conversation's answers.
    """

    nll: list[float]
    text_bytes: list[int]

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(torch.tensor(self.nll, dtype=torch.float64), sum(self.text_bytes))

    def interval(self, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval over rows."""
        return intervals.ratio([nats / math.log(2) for nats in self.nll], self.text_bytes, draws, seed)


def score(model, tokenizer, conversations: Sequence[Conversation], template: str, max_tokens: int = 1024) -> Score:
    """Losses of the answers in `conversations`, in evaluation mode; `max_tokens` at once bounds the memory.

    Raises:
        InputError: nothing to score, or a conversation that does not fit the model's context.
    """
    examples = [_whole(row, tokenizer, template, model.config.max_position_embeddings) for row in conversations]
    answers = [[turn.content for turn in row if turn.role == "assistant"] for row in conversations]
    return _scored(model, examples, [sum(len(text.encode()) for text in texts) for texts in answers], max_tokens)


def score_text(model, tokenizer, passages: Sequence[str], max_tokens: int = 1024) -> Score:
    """Losses of plain text, every token of it: each passage stands behind a start token, as a document of its own.

    Raises:
        InputError: nothing to score, or a passage that does not fit the model's context.
    """
    start, context = document_marks(tokenizer)[0], model.config.max_position_embeddings
    examples = []
    for passage in passages:
        ids = tokenizer(passage, add_special_tokens=False, split_special_tokens=True).input_ids
        if len(start) + len(ids) > context:
            raise InputError(f"the passage {passage[:20]!r}… is longer than the context of {context} tokens; cut it")
        examples.append(Example(start + ids, [IGNORE_INDEX] * len(start) + ids))
    return _scored(model, examples, [len(passage.encode()) for passage in passages], max_tokens)


def passages(text: str, characters: int = 400) -> list[str]:
    """A text cut into whole lines of together at most so many characters; a longer line is cut.

    The cut does not ask the tokenizer, so models of any vocabulary score the same passages and can be paired.

    >>> passages("北京\\n上海\\n天津", characters=6)
    ['北京\\n上海\\n', '天津']
    """
    found = [""]
    for line in text.splitlines(keepends=True):
        for part in (line[at : at + characters] for at in range(0, len(line), characters)):
            if len(found[-1]) + len(part) > characters:
                found.append("")
            found[-1] += part
    return [passage for passage in found if passage.strip()]


@torch.no_grad()
def _scored(model, examples: Sequence[Example], text_bytes: list[int], max_tokens: int) -> Score:
    from tqdm import tqdm

    if not examples:
        raise InputError("nothing to score; give a text, or a file with rows in its held-out split")
    training = model.training
    model.eval()
    nll = [0.0] * len(examples)
    for group in tqdm(list(groups(examples, max_tokens)), desc="scoring", unit="batch", leave=False):
        batch = {name: tensor.to(model.device) for name, tensor in flatten([examples[i] for i in group]).items()}
        losses = iter(token_losses(model, batch).double().tolist())
        for index in group:
            labelled = sum(label != IGNORE_INDEX for label in examples[index].labels[1:])
            nll[index] = sum(next(losses) for _ in range(labelled))
    model.train(training)
    return Score(nll, text_bytes)


def _whole(conversation: Conversation, tokenizer, template: str, context: int) -> Example:
    """A conversation with only the answers' text labelled, or an error if any of it would not be scored."""
    example = encode(answers_only(render(conversation, template, tokenizer.eos_token)), tokenizer, context)
    if example is None or example.cut:
        start = conversation[0].content[:20]
        raise InputError(
            f"the conversation {start!r}… is longer than the model's context of {context} tokens; shorten it"
        )
    return example


def change(before: Score, after: Score) -> intervals.Difference:
    """Bits per byte after − before on the same rows, paired: above 0 is forgetting, below 0 is learning."""
    if before.text_bytes != after.text_bytes:
        raise ValueError("the two scores are not of the same rows; score one held-out set with both models")
    bits = ([nats / math.log(2) for nats in one.nll] for one in (before, after))
    return intervals.difference(*bits, before.text_bytes)


def forgetting(before: dict[str, Score], after: dict[str, Score]) -> list[dict]:
    """For each held-out set: bits per byte before and after, their difference with its paired interval, and the test.

    The rows are plain data, ready for JSON; `forgetting_table` draws them.
    """
    if list(before) != list(after):
        raise ValueError(f"sets before: {', '.join(before)}; after: {', '.join(after)}; score the same sets")
    rows = []
    for name, old in before.items():
        scores = {"before": old.bits_per_byte, "after": after[name].bits_per_byte}
        found = change(old, after[name])
        changed = {"difference": found.value, "low": found.low, "high": found.high, "p": found.p}
        rows.append({"set": name, "rows": len(old.nll), **scores, **changed})
    return rows


def forgetting_table(rows: Sequence[dict]) -> Table:
    """The rows of `forgetting` as a table, in bits per byte."""

    def line(row: dict) -> list:
        change = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        return [row["set"], row["rows"], f"{row['before']:.3f}", f"{row['after']:.3f}", change, f"{row['p']:.4f}"]

    columns = ["set", "rows", "bits per byte before", "after", "after − before [95 %]", "p"]
    return Table(columns, [line(row) for row in rows])


def is_han(character: str) -> bool:
    """Whether a character is a Chinese ideograph, by its Unicode name.

    >>> [is_han(character) for character in "京あA，"]
    [True, False, False, False]
    """
    return unicodedata.name(character, "").startswith("CJK UNIFIED IDEOGRAPH")


def han_share(texts: Sequence[str]) -> float:
    """Chinese characters among all letters of the texts; digits, spaces and punctuation do not count.

    >>> han_share(["北京 is big"])     # 2 of 7 letters
    0.2857142857142857
    """
    letters = [character for text in texts for character in text if character.isalpha()]
    return sum(map(is_han, letters)) / len(letters) if letters else 0.0
