"""A chat remembers whole turns or none of a turn, and Ctrl-C stops an answer and not the program."""

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvlib import InputError, chat, generation
from cvlib.batching import prompt_ids
from cvlib.chat import Chat, command, fit, terminal
from cvlib.messages import Message
from cvlib.recipes import Decoding
from cvlib.templates import prompt


@pytest.fixture(autouse=True)
def keyboard():
    """Python's own answer to Ctrl-C, also where the tests run in the background and inherit an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Model:
    """As much of a model as a chat asks for."""

    class config:
        max_position_embeddings = 120


@pytest.fixture
def seen(monkeypatch):
    """Answers come from a script instead of a model; `seen` records the conversations it was asked with."""
    asked, script = [], []

    def stream(model, tokenizer, conversation, template, decoding):
        asked.append([turn.content for turn in conversation])
        for piece in script.pop(0) if script else ["回", "答"]:
            if callable(piece):
                piece()
            else:
                yield piece

    monkeypatch.setattr(generation, "stream", stream)
    asked.append(script)
    return asked


@pytest.fixture
def talker(tokenizer, seen):
    return Chat(Model, tokenizer, "chatml", Decoding(max_new_tokens=20))


def converse(talker, *lines):
    """What the terminal shows when the lines are typed; an exception among them is raised at the prompt."""
    shown, lines = [], iter(lines)

    def read(_):
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    terminal(talker, shown.append, read)
    return "".join(shown)


def test_a_reply_joins_the_history(talker, seen):
    assert list(talker.reply("你好")) == ["回", "答"]
    assert talker.history == [Message("user", "你好"), Message("assistant", "回答")]
    list(talker.reply("再见"))
    assert seen[1:] == [["你好"], ["你好", "回答", "再见"]]


def test_the_oldest_whole_exchanges_go(talker, tokenizer, seen):
    """Trap 4: with 100 tokens for the prompt, what is kept is whole turns, newest first, as many as fit."""
    said = [f"问题{n}：今天天气怎么样" for n in range(6)]
    for text in said:
        list(talker.reply(text))
    for number, asked in enumerate(seen[1:]):
        whole = [part for text in said[:number] for part in (text, "回答")] + [said[number]]
        assert asked == whole[len(whole) - len(asked) :]
        assert len(asked) % 2 == 1
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(seen[-1])]
    used = len(prompt_ids(prompt(turns, "chatml", tokenizer.eos_token), tokenizer))
    assert used <= 100  # context less the room for the answer
    assert talker.dropped == 6 - 1 - len(seen[-1]) // 2 > 0


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 9), st.integers(9, 60))
def test_fit_keeps_the_longest_tail_that_fits(lengths, question, room):
    lengths = lengths[: len(lengths) // 2 * 2]
    history = [Message(("user", "assistant")[i % 2], "x" * n) for i, n in enumerate(lengths)]
    count = lambda turns: sum(len(turn.content) for turn in turns)  # noqa: E731
    kept, dropped = fit(history, Message("user", "x" * question), count, room)
    assert kept == history[2 * dropped :]
    assert count(kept) + question <= room
    if dropped:
        assert count(history[2 * (dropped - 1) :]) + question > room


def test_a_message_too_long_is_refused_and_the_chat_goes_on(talker, seen):
    shown = converse(talker, "很" * 200, "你好")
    assert "[the message takes" in shown
    assert "shorten it]" in shown
    assert [turn.content for turn in talker.history] == ["你好", "回答"]
    with pytest.raises(InputError, match="100 are free"):
        list(talker.reply("很" * 200))


def test_the_reader_is_told_what_was_forgotten(talker):
    shown = converse(talker, *[f"问题{n}：今天天气怎么样" for n in range(6)])
    assert "[1 oldest exchanges no longer fit and were forgotten]" in shown


# the terminal


def test_ctrl_c_stops_the_answer_and_not_the_program(talker, seen):
    """A real SIGINT in the middle of an answer: what was said is kept, the next question is answered."""
    seen[0].append(["从", "前", lambda: signal.raise_signal(signal.SIGINT), "永不"])
    shown = converse(talker, "讲故事", "你好")
    assert "从前 [stopped]\n" in shown
    assert "永不" not in shown
    assert [turn.content for turn in talker.history] == ["讲故事", "从前", "你好", "回答"]


def test_ctrl_c_before_the_first_word_leaves_no_turn(talker, seen):
    seen[0].append([lambda: signal.raise_signal(signal.SIGINT)])
    shown = converse(talker, "讲故事", "你好")
    assert " [stopped]" in shown
    assert [turn.content for turn in talker.history] == ["你好", "回答"]


def test_ctrl_c_while_a_piece_is_shown(talker):
    """The signal arrives in the terminal's own code: the answer still ends at once."""

    def write(text):
        shown.append(text)
        if text == "回":
            raise KeyboardInterrupt

    shown, lines = [], iter(["你好", "/exit"])
    terminal(talker, write, lambda _: next(lines))
    assert shown[-2:] == [" [stopped]", "\n"]
    assert [turn.content for turn in talker.history] == ["你好", "回"]


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt(), "/exit", "  /exit "])
def test_ways_out(talker, end, seen):
    converse(talker, "你好", end, "不再问")
    assert len(talker.history) == 2


def test_an_empty_line_asks_nothing(talker, seen):
    converse(talker, "", "   ")
    assert seen[1:] == []


def test_commands(talker):
    shown = converse(talker, "你好", "/reset", "/help", "/quit")
    assert talker.history == []
    assert "forgotten" in shown
    assert shown.count(chat.HELP) == 3  # at the start, /help, and behind the unknown command
    assert "/quit is not a command" in command(talker, "/quit")


def test_an_empty_answer_leaves_no_turn(talker, seen):
    seen[0].append([""])
    converse(talker, "你好")
    assert talker.history == []


def test_with_a_real_model(model, tokenizer):
    talker = Chat(model, tokenizer, "chatml", Decoding(temperature=0, max_new_tokens=5))
    said = "".join(talker.reply("What is the capital of France?"))
    assert said
    assert talker.history[-1] == Message("assistant", said)
