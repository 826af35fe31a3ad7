"""Segments in, tensors out: tokens, labels, and batches without padding.

A few rules decide what a model learns, and each is one function here.

* `encode`: labels are the tokens of trained segments and `IGNORE_INDEX` everywhere else. A conversation that is too
  long is cut at its end; a cut answer loses its end token too, so that nothing teaches the model to stop early, and a
  conversation left without any label is dropped (trap 3).
* `blocks`: plain text is learnt whole, every token of it, in blocks of one length.
* `flatten`: conversations of one batch are laid end to end in a single row, and `position_ids` start again at 0
  for each. Nothing is padded (trap 20). transformers keeps the conversations apart when `position_ids` restart, no
  attention mask is given and no cache is used; `attention` does it without computing what a mask throws away.
* `groups`: batches for evaluation are filled up to a number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from cvlib.templates import Segment

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Example:
    """One conversation as token ids and labels of equal length; `cut` if its end did not fit."""

    input_ids: list[int]
    labels: list[int]
    cut: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


def token_ids(segments: Iterable[Segment], tokenizer) -> Iterator[tuple[Segment, list[int]]]:
    """Each segment with its tokens; special tokens are recognised in the template's own text only.

    LLaMA's tokenizer begins every text it is given with a space of its own. Only the first segment is the beginning of
    a text: the others are tokenised behind a newline, which is taken off again (traps 5 and 6).
    """
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    for place, segment in enumerate(segments):
        lead = "\n" if place and len(newline) > 1 else ""
        options = {"add_special_tokens": False, "split_special_tokens": not segment.control}
        ids = tokenizer(lead + segment.text, **options).input_ids
        yield segment, ids[len(newline) :] if lead else ids


def prompt_ids(segments: Iterable[Segment], tokenizer) -> list[int]:
    """Token ids of a prompt, begun as the tokenizer begins every text (LLaMA's `<s>`, nothing for SmolLM2)."""
    return tokenizer("").input_ids + [token for _, ids in token_ids(segments, tokenizer) for token in ids]


def encode(segments: Sequence[Segment], tokenizer, max_length: int) -> Example | None:
    """Tokens and labels of a conversation, at most `max_length` of them; None if no trained token fits."""
    input_ids = tokenizer("").input_ids
    labels = [IGNORE_INDEX] * len(input_ids)
    for segment, ids in token_ids(segments, tokenizer):
        input_ids += ids
        labels += ids if segment.trained else [IGNORE_INDEX] * len(ids)
    cut = len(input_ids) > max_length
    input_ids, labels = input_ids[:max_length], labels[:max_length]
    if all(label == IGNORE_INDEX for label in labels[1:]):  # the first token is never predicted
        return None
    return Example(input_ids, labels, cut)


def document_marks(tokenizer) -> tuple[list[int], int]:
    """What stands before a document and what ends it: LLaMA's `<s>` and `</s>`, `<|endoftext|>` for both in SmolLM2."""
    known, both = tokenizer.get_vocab(), "<|endoftext|>"
    first = next(mark for mark in (both, tokenizer.bos_token, tokenizer.eos_token) if mark in known)
    return tokenizer("").input_ids or [known[first]], known[both if both in known else tokenizer.eos_token]


def blocks(documents: Sequence[str], tokenizer, max_length: int) -> list[Example]:
    """Plain text as examples of `max_length` tokens: documents end to end, and every one of their tokens is learnt.

    A document may be cut by the end of a block; the rest of it begins the next one, behind the same mark that stands
    before a document, so that its first token is predicted, too.
    """
    start, end = document_marks(tokenizer)
    ids = tokenizer(list(documents), add_special_tokens=False, split_special_tokens=True).input_ids if documents else []
    stream = [token for document in ids for token in (*document, end)]
    room, ignored = max_length - len(start), [IGNORE_INDEX] * len(start)
    parts = (stream[at : at + room] for at in range(0, len(stream), room))
    return [Example(start + part, ignored + part) for part in parts]


def answers_only(segments: Iterable[Segment]) -> list[Segment]:
    """The same segments with only the answers' own text marked, not their end tokens: what bits per byte scores."""
    return [replace(segment, trained=segment.trained and not segment.control) for segment in segments]


def flatten(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Conversations end to end in one row: `input_ids`, `labels`, `position_ids`, each (1, total tokens).

    >>> flatten([Example([5, 6, 7], [-100, 6, 7]), Example([8, 9], [-100, 9])])["position_ids"]
    tensor([[0, 1, 2, 0, 1]])
    """
    rows = {
        "input_ids": [token for example in examples for token in example.input_ids],
        # the first token of a conversation must not be predicted from the last one of its neighbour
        "labels": [label for example in examples for label in [IGNORE_INDEX, *example.labels[1:]]],
        "position_ids": [position for example in examples for position in range(len(example))],
    }
    return {name: torch.tensor([row]) for name, row in rows.items()}


def pad(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Conversations under each other, padded on the right, each tensor (rows, longest).

    >>> pad([Example([5, 6, 7], [-100, 6, 7]), Example([8, 9], [-100, 9])], pad_id=0)["labels"]
    tensor([[-100,    6,    7],
            [-100,    9, -100]])
    """
    longest = max(map(len, examples))

    def filled(rows: Iterable[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    return {
        "input_ids": filled((example.input_ids for example in examples), pad_id),
        "labels": filled((example.labels for example in examples), IGNORE_INDEX),
        "attention_mask": filled(([1] * len(example) for example in examples), 0),
    }


def groups(examples: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    """Places of the examples in groups of at most `max_tokens` tokens; a longer example is a group of its own.

    >>> list(groups([Example([1] * n, [1] * n) for n in (3, 2, 4, 9)], max_tokens=5))
    [[0, 1], [2], [3]]
    """
    group: list[int] = []
    tokens = 0
    for index, example in enumerate(examples):
        if group and tokens + len(example) > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += len(example)
    if group:
        yield group
