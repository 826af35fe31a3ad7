"""A model and an exam in, marks out: which of four options the model holds likeliest, by each way of asking.

"The model chose B" can mean six things, and they do not agree:

| scoring | the answer is the option whose … |
|---|---|
| `letter` | letter is the likeliest next token (what lm-eval computes) |
| `both-logits` | letter has the largest sum of logits as "A" and as " A" (the code of Chinese-LLaMA-Alpaca) |
| `both-probabilities` | letter has the largest sum of probabilities as "A" and as " A" (its paper) |
| `answer` | text is the likeliest continuation of the question, the options not shown |
| `answer-per-byte` | text is the likeliest per UTF-8 byte, so that long options are not punished |
| `generation` | letter comes first in what the model writes, without any draw; an answer without a letter is wrong |

The worked examples are the same for all questions of a subject. They are read once: their keys and values are kept and
copied for each batch, which changes no number. In bfloat16, though, two letters can have *equal* logits, and the
earlier one wins: score in float32 where you can.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from cvlib import InputError, intervals
from cvlib.batching import prompt_ids, token_ids
from cvlib.messages import Message
from cvlib.questions import LETTERS, Question, Subject
from cvlib.show import Table
from cvlib.templates import Segment, prompt

#: Scores of the four letters from their log-probabilities as "A" and as " A", (2, 4).
BY_LETTER = {
    "letter": lambda logs: logs[0],
    "both-logits": lambda logs: logs.sum(0),
    "both-probabilities": lambda logs: logs.logsumexp(0),
}
#: Scores of the four options from the log-likelihoods and the UTF-8 lengths of their texts, (4,) each.
BY_ANSWER = {"answer": lambda logs, sizes: logs, "answer-per-byte": lambda logs, sizes: logs / sizes}
SCORINGS = (*BY_LETTER, *BY_ANSWER, "generation")
CHANCE = 1 / len(LETTERS)
WRITTEN = 8  # tokens the model may write until its letter comes


@dataclass(frozen=True)
class Marks:
    """What a model chose in one subject: a letter a question, or nothing."""

    subject: Subject
    chosen: list[str]

    @property
    def right(self) -> list[bool]:
        pairs = zip(self.chosen, self.subject.questions, strict=True)
        return [letter == question.answer for letter, question in pairs]


def sit(
    model, tokenizer, subjects: Sequence[Subject], scoring: str = "letter", template: str = "", batch: int = 16
) -> list[Marks]:
    """Let a model sit an exam.

    Args:
        subjects: as `questions.read` gives them, with as many worked examples as are to be shown.
        scoring: one of `SCORINGS`.
        template: ask through this chat template, each worked example a turn of its own; "" asks in plain text.
        batch: prompts read at once.

    Raises:
        InputError: an unknown scoring, or a prompt longer than the model's context.
    """
    from tqdm import tqdm

    if scoring not in SCORINGS:
        raise InputError(f"scoring {scoring!r} is unknown; choose one of {', '.join(SCORINGS)}")
    training, marks = model.training, []
    model.eval()
    total = sum(len(subject.questions) for subject in subjects)
    with tqdm(total=total, desc="exam", unit="question", leave=False) as bar:
        for subject in subjects:
            chosen = []
            for letter in choices(model, tokenizer, subject, scoring, template, batch):
                chosen.append(letter)
                bar.update()
            marks.append(Marks(subject, chosen))
    model.train(training)
    return marks


def choices(model, tokenizer, subject: Subject, scoring: str, template: str, batch: int) -> Iterator[str]:
    """The letter chosen for each question; "" if what was written holds none."""
    asked = model, tokenizer, subject, template, batch
    if scoring in BY_LETTER:
        yield from (likeliest(BY_LETTER[scoring](logs)) for logs in letters(*asked))
    elif scoring in BY_ANSWER:
        pairs = zip(answers(*asked), map(sizes, subject.questions), strict=True)
        yield from (likeliest(BY_ANSWER[scoring](logs, own)) for logs, own in pairs)
    else:
        yield from map(first_letter, written(*asked))


def likeliest(scores: torch.Tensor) -> str:
    """The letter of the largest of four scores, the first one if several are equal."""
    return LETTERS[scores.argmax().item()]


def first_letter(text: str) -> str:
    """The first of A to D in a text, or nothing.

    >>> first_letter("答案是B，不是A。"), first_letter("我不知道。")
    ('B', '')
    """
    found = re.search(f"[{LETTERS}]", text)
    return found[0] if found else ""


def sizes(question: Question) -> torch.Tensor:
    """UTF-8 bytes of the four options: (4,)."""
    return torch.tensor([max(1, len(option.encode())) for option in question.options])


def letters(model, tokenizer, subject: Subject, template: str = "", batch: int = 16) -> Iterator[torch.Tensor]:
    """For each question the log-probabilities of the four letters, as "A" and as " A": (2, 4)."""
    places = letter_tokens(tokenizer)
    prompts = [prompt_ids(segments(subject, q, tokenizer, template), tokenizer) for q in subject.questions]
    for _, out, _ in read(model, prompts, prompts, batch):
        yield from out.logits[:, -1].float().log_softmax(-1).cpu()[:, places]  # (rows, 2, 4)


def letter_tokens(tokenizer) -> torch.Tensor:
    """Token ids of the four letters right behind a text, and behind a space: (2, 4)."""
    ids = [[tokenizer(f"：{space}{x}", add_special_tokens=False).input_ids[-1] for x in LETTERS] for space in ("", " ")]
    for row in ids:
        spelt = "".join(tokenizer.decode([token]).strip() for token in row)
        if spelt != LETTERS:
            raise InputError(f"this tokenizer spells the letters A to D as {spelt!r}; choose the scoring answer")
    return torch.tensor(ids)


def answers(model, tokenizer, subject: Subject, template: str = "", batch: int = 16) -> Iterator[torch.Tensor]:
    """For each question the log-likelihoods of its options' texts: (4,); an empty option cannot be the answer."""
    prompts = [segments(subject, q, tokenizer, template, listed=False) for q in subject.questions]
    starts = [prompt_ids(asked, tokenizer) for asked in prompts for _ in LETTERS]
    endings = []
    for asked, question in zip(prompts, subject.questions, strict=True):
        for option in question.options:
            *_, (_, ids) = token_ids([*asked, Segment(option)], tokenizer)
            endings.append(ids)
    rows = [start + ending for start, ending in zip(starts, endings, strict=True)]
    whole = len(LETTERS) * max(1, batch // len(LETTERS))  # the options of a question are read together
    for places, out, _ in read(model, starts, rows, whole, keep=1 + max(map(len, endings))):
        logs = []
        for ending, chances in zip(endings[places], out.logits.float().log_softmax(-1), strict=True):
            picked = chances[-len(ending) - 1 : -1].gather(1, torch.tensor([ending], device=chances.device).T)
            logs.append(picked.sum().item() if ending else -torch.inf)
        yield from torch.tensor(logs).view(-1, len(LETTERS))


def written(model, tokenizer, subject: Subject, template: str = "", batch: int = 16) -> Iterator[str]:
    """For each question what the model writes by itself, always the likeliest token, up to its end token."""
    prompts = [prompt_ids(segments(subject, q, tokenizer, template), tokenizer) for q in subject.questions]
    for _, out, mask in read(model, prompts, prompts, batch):
        steps = [out.logits[:, -1].argmax(-1, keepdim=True)]  # (rows, 1) each
        for _ in range(WRITTEN - 1):
            mask = torch.cat([mask, torch.ones_like(steps[-1])], dim=1)
            out = forward(model, steps[-1], mask, out.past_key_values)
            steps.append(out.logits[:, -1].argmax(-1, keepdim=True))
        for row in torch.cat(steps, dim=1).tolist():
            ended = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            yield tokenizer.decode(row[:ended], skip_special_tokens=True)


def segments(subject: Subject, question: Question, tokenizer, template: str = "", listed: bool = True) -> list[Segment]:
    """The prompt of a question behind its subject's heading and worked examples, in plain text or as a chat.

    (The published code leaves the heading out when it shows no examples; here it is always there.)
    """
    if not template:
        examples = "".join(example.block(solved=True, listed=listed) for example in subject.examples)
        return [Segment(subject.heading + examples + question.block(listed=listed))]
    turns = []
    for example in subject.examples:
        answer = example.answer if listed else example.right
        turns += [Message("user", example.block(listed=listed)), Message("assistant", answer)]
    turns.append(Message("user", question.block(listed=listed)))
    turns[0] = Message("user", subject.heading + turns[0].content)
    return prompt(turns, template, tokenizer.eos_token)


def read(model, prompts: Sequence[list[int]], rows: Sequence[list[int]], batch: int, keep: int = 1) -> Iterator:
    """What the model predicts at the last `keep` tokens of each row, batch by batch.

    The longest beginning that all prompts share is read once. It is found among *tokens*, so that no token is cut in
    two. Rows are padded on the left: they all end at the last column, where an answer goes on.

    Yields:
        The rows' places, the model's output, and the mask of all it has read.
    """
    longest, context = max(map(len, rows)), model.config.max_position_embeddings
    if longest > context:
        raise InputError(f"a prompt of {longest} tokens exceeds the context of {context}; ask with fewer --shots")
    shared = common(prompts)
    beginning = torch.tensor([rows[0][:shared]], device=model.device)
    cache = forward(model, beginning, torch.ones_like(beginning), None).past_key_values if shared else None
    for first in range(0, len(rows), batch):
        places = slice(first, first + batch)
        rest = [row[shared:] for row in rows[places]]
        pads = [max(map(len, rest)) - len(row) for row in rest]
        ids = [[0] * pad + row for pad, row in zip(pads, rest, strict=True)]
        mask = [[1] * shared + [0] * pad + [1] * len(row) for pad, row in zip(pads, rest, strict=True)]
        mask = torch.tensor(mask, device=model.device)
        own = copy.deepcopy(cache)  # the model writes into it
        if own:
            own.batch_repeat_interleave(len(rest))
        yield places, forward(model, torch.tensor(ids, device=model.device), mask, own, keep), mask


def common(prompts: Sequence[list[int]]) -> int:
    """How many first tokens all prompts share, less one if a prompt would have none left.

    >>> common([[1, 2, 3], [1, 2, 4, 5], [1, 2, 9]]), common([[1, 2], [1, 2, 3]])
    (2, 1)
    """
    first, last = min(prompts), max(prompts)  # by their tokens: what these two share, all do
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return min(len(list(same)), len(first) - 1)


@torch.no_grad()
def forward(model, ids: torch.Tensor, mask: torch.Tensor, cache, keep: int = 1):
    """One forward pass behind a cache; positions count what the mask lets through."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    known = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    return model(input_ids=ids, **known, use_cache=True, logits_to_keep=keep)


def report(marks: Sequence[Marks], scoring: str, shots: int) -> dict:
    """Marks by category and in all, ready for JSON: `report_table` draws it.

    `micro` weighs every question the same, with Wilson's 95 % interval; `macro` every subject. Each subject counts in
    its one category; "of these China specific" is a second look at subjects that were counted already.
    """
    kinds = dict.fromkeys(["STEM", "Humanities", "Social Science", "Other", *(m.subject.category for m in marks)])
    groups = {kind: [m for m in marks if m.subject.category == kind] for kind in kinds}
    groups |= {"all": list(marks), "of these China specific": [m for m in marks if m.subject.china]}
    rows = [_group(name, some) for name, some in groups.items() if some]
    subjects = [_group(m.subject.name, [m]) | {"zh": m.subject.zh, "category": m.subject.category} for m in marks]
    return {"scoring": scoring, "shots": shots, "chance": CHANCE, "groups": rows, "subjects": subjects}


def _group(name: str, marks: Sequence[Marks]) -> dict:
    right, asked = sum(sum(m.right) for m in marks), sum(len(m.right) for m in marks)
    low, high = intervals.proportion(right, asked)
    macro = sum(sum(m.right) / len(m.right) for m in marks) / len(marks)
    about = {"name": name, "subjects": len(marks), "questions": asked, "right": right}
    return about | {"micro": right / asked, "low": low, "high": high, "macro": macro}


def report_table(found: dict) -> Table:
    """The groups of a report, in percent."""
    rows = []
    for group in found["groups"]:
        interval = f"{group['micro']:.1%} [{group['low']:.1%}, {group['high']:.1%}]"
        rows.append([group["name"], group["subjects"], group["questions"], interval, f"{group['macro']:.1%}"])
    return Table(["category", "subjects", "questions", "right, by question [95 %]", "by subject"], rows)
