"""The only prompt renderer: training, evaluation, chat and export all come through here.

A template turns a conversation into *segments*. Each segment is a piece of text and two facts about it: whether the
model is trained to write it, and whether it is the template's own wording or a person's. So

* what is learnt is decided here, turn by turn, and cannot be lost by a collator later (trap 1), and
* a person who types `<|im_end|>` has typed ten characters, not the end of a turn.

Every assistant turn is trained, each with its end token (trap 2). The same segments, without the last answer, are the
prompt of a chat, so training and serving cannot drift apart (trap 6).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cvlib import InputError
from cvlib.messages import Conversation, Message


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation.

    `trained`: the model learns to produce it. `control`: the template wrote it, so its special tokens count as such.
    """

    text: str
    trained: bool = False
    control: bool = False


@dataclass(frozen=True)
class Template:
    """How turns are wrapped: `{eos}` stands for the tokenizer's end token, which ends every assistant turn.

    `system` is the default system text; `open` and `close` give, for each role, what stands around its text; a model
    that writes one of the `marks` has ended its answer, whatever its tokenizer calls the end token (trap 17).
    """

    system: str
    open: dict[str, str]
    close: dict[str, str]
    marks: tuple[str, ...] = ()


TEMPLATES = {
    # SmolLM2's own wording. Its default system turn stays: the model was tuned with it.
    "chatml": Template(
        system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        open={role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")},
        close=dict.fromkeys(("system", "user", "assistant"), "{eos}\n"),
        marks=("<|im_end|>", "<|im_start|>"),
    ),
    # Stanford Alpaca's headings, for bases that were never tuned to chat.
    "alpaca": Template(
        system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        open={"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"},
        close={"system": "\n\n", "user": "\n\n", "assistant": "{eos}\n\n"},
    ),
}


def find(name: str) -> Template:
    """The template called `name`."""
    if name not in TEMPLATES:
        raise InputError(f"template {name!r} is unknown; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(conversation: Conversation, template: str, eos: str) -> list[Segment]:
    """Segments of a whole conversation, every assistant turn trained.

    Args:
        conversation: turns as `messages` reads them.
        template: a name in `TEMPLATES`.
        eos: the tokenizer's end token, `tokenizer.eos_token`.

    >>> for segment in render([Message("user", "你好"), Message("assistant", "你好！")], "alpaca", "</s>")[2:]:
    ...     print(segment)
    Segment(text='你好', trained=False, control=False)
    Segment(text='\\n\\n### Response:\\n', trained=False, control=True)
    Segment(text='你好！', trained=True, control=False)
    Segment(text='</s>', trained=True, control=True)
    Segment(text='\\n\\n', trained=False, control=True)
    """
    return _joined(_turns(conversation, find(template), eos))


def prompt(conversation: Conversation, template: str, eos: str) -> list[Segment]:
    """Segments up to the point where the model must answer; the conversation ends with the user.

    >>> [segment.text for segment in prompt([Message("user", "你好")], "chatml", "<|im_end|>")][3:]
    ['你好', '<|im_end|>\\n<|im_start|>assistant\\n']
    """
    if conversation[-1].role != "user":
        raise ValueError(f"a prompt ends with the user's turn; this one ends with {conversation[-1].role!r}")
    style = find(template)
    return _joined([*_turns(conversation, style, eos), Segment(style.open["assistant"], control=True)])


def _turns(conversation: Conversation, style: Template, eos: str) -> Iterator[Segment]:
    """Every turn in its wrapping, the default system turn first if there is none."""
    if conversation[0].role != "system":
        conversation = [Message("system", style.system), *conversation]
    for turn in conversation:
        answer = turn.role == "assistant"
        end, mark, rest = style.close[turn.role].partition("{eos}")
        yield Segment(style.open[turn.role], control=True)
        yield Segment(turn.content, trained=answer)
        yield Segment(end + (eos if mark else ""), trained=answer, control=True)
        yield Segment(rest, control=True)


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    """The same text with neighbouring control segments in one, so that it is tokenised as the template was meant."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if not segment.text:
            continue
        if last and last.control and segment.control and last.trained == segment.trained:
            merged[-1] = Segment(last.text + segment.text, segment.trained, control=True)
        else:
            merged.append(segment)
    return merged
