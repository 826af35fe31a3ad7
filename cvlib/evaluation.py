"""Model and held-out conversations in, numbers that can be compared out.

* **Bits per byte**: how many bits the model needs for each byte of the answers. It does not depend on how a vocabulary
  cuts the text, so models with different vocabularies compare. Only the answers' own text is scored.
* **Answer language**: the share of Chinese characters in what the model answers to Chinese questions.

`token_losses` is also the loss that `training` minimises: what is trained and what is measured are one function.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cvlib import InputError
from cvlib.batching import IGNORE_INDEX, Example, answers_only, encode, flatten, groups
from cvlib.messages import Conversation
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
        """95 % percentile bootstrap interval over conversations (Efron 1979)."""
        nll, size = torch.tensor(self.nll, dtype=torch.float64), torch.tensor(self.text_bytes, dtype=torch.float64)
        picks = torch.randint(len(nll), (draws, len(nll)), generator=torch.Generator().manual_seed(seed))
        values = nll[picks].sum(1) / math.log(2) / size[picks].sum(1)
        low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high


@torch.no_grad()
def score(model, tokenizer, conversations: Sequence[Conversation], template: str, max_tokens: int = 1024) -> Score:
    """Losses of the answers in `conversations`, in evaluation mode; `max_tokens` at once bounds the memory.

    Raises:
        InputError: nothing to score, or a conversation that does not fit the model's context.
    """
    from tqdm import tqdm

    examples = [_whole(row, tokenizer, template, model.config.max_position_embeddings) for row in conversations]
    if not examples:
        raise InputError("no conversations to score; give a file with rows in its held-out split")
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
    answers = [[turn.content for turn in row if turn.role == "assistant"] for row in conversations]
    return Score(nll, [sum(len(text.encode()) for text in texts) for texts in answers])


def _whole(conversation: Conversation, tokenizer, template: str, context: int) -> Example:
    """A conversation with only the answers' text labelled, or an error if any of it would not be scored."""
    example = encode(answers_only(render(conversation, template, tokenizer.eos_token)), tokenizer, context)
    if example is None or example.cut:
        start = conversation[0].content[:20]
        raise InputError(
            f"the conversation {start!r}… is longer than the model's context of {context} tokens; shorten it"
        )
    return example


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
