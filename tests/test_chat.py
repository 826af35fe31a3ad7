"""A chat remembers whole turns or none of a turn, and Ctrl-C stops an answer and not the program."""

import io
import json
import random
import signal
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvlib import ROOT, InputError, batching, engines, generation, messages
from cvlib.chat import HELP, Chat, fit, terminal
from cvlib.engines import Engine, Transformers
from cvlib.messages import Message
from cvlib.recipes import Decoding
from cvlib.templates import render


class Script(Engine):
    """An engine that answers from a script; `asked` records the conversations it was asked with, and how."""

    context = 120

    def __init__(self, tokenizer, template="chatml"):
        self.tokenizer, self.template = tokenizer, template
        self.script, self.asked, self.decodings = [], [], []

    def stream(self, conversation, decoding, stop=()):
        self.asked.append(conversation)
        self.decodings.append(decoding)
        for piece in self.script.pop(0) if self.script else ["回", "答"]:
            if callable(piece):
                piece()
            else:
                yield piece


@pytest.fixture
def talker(tokenizer):
    return Chat(Script(tokenizer), Decoding(max_new_tokens=20))


def contents(turns):
    return [turn.content for turn in turns]


def converse(talker, *lines):
    """What the terminal shows when the lines are typed; an exception among them is raised at the prompt."""
    shown, lines = [], iter(lines)

    def read(_):
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    terminal(talker, shown.append, read)
    return "".join(shown).removeprefix(HELP + "\n").removesuffix("\n")


# memory


def test_a_reply_joins_the_history(talker):
    assert list(talker.reply("你好")) == ["回", "答"]
    assert talker.history == [Message("user", "你好"), Message("assistant", "回答")]
    list(talker.reply("再见"))
    assert [contents(turns) for turns in talker.engine.asked] == [["你好"], ["你好", "回答", "再见"]]


def test_the_oldest_whole_exchanges_are_forgotten(talker):
    """Trap 4: with 100 tokens for the prompt, what the model sees is whole turns, newest first, as many as fit."""
    said = [f"问题{n}：今天天气怎么样" for n in range(6)]
    for text in said:
        list(talker.reply(text))
    whole = [part for text in said for part in (text, "回答")]
    for number, asked in enumerate(map(contents, talker.engine.asked)):
        told = whole[: 2 * number + 1]
        assert asked == told[len(told) - len(asked) :]
        assert len(asked) % 2 == 1
        assert talker.engine.count(talker.engine.asked[number]) <= 100  # context less the room for the answer
    assert talker.forgotten == 6 - 1 - len(talker.engine.asked[-1]) // 2 > 0
    assert contents(talker.history) == whole  # the reader's transcript is whole


def test_the_system_prompt_is_never_forgotten(talker):
    talker.system = "你是一位老师。"
    for n in range(6):
        list(talker.reply(f"问题{n}：今天天气怎么样"))
    assert talker.forgotten > 0
    assert all(turns[0] == Message("system", "你是一位老师。") for turns in talker.engine.asked)
    assert all(talker.engine.count(turns) <= 100 for turns in talker.engine.asked)


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 9), st.integers(9, 60))
def test_fit_keeps_the_longest_tail_that_fits(lengths, question, room):
    lengths = lengths[: len(lengths) // 2 * 2]
    history = [Message(("user", "assistant")[i % 2], "x" * n) for i, n in enumerate(lengths)]
    count = lambda turns: sum(len(turn.content) for turn in turns)  # noqa: E731
    kept, forgotten = fit(history, Message("user", "x" * question), count, room)
    assert kept == history[2 * forgotten :]
    assert count(kept) + question <= room
    if forgotten:
        assert count(history[2 * (forgotten - 1) :]) + question > room


@pytest.mark.parametrize("template", ["chatml", "alpaca"])
@pytest.mark.parametrize("system", ["", "你是一位老师。\nBe brief."])
@pytest.mark.parametrize("vocabulary", ["tokenizer", "llama_tokenizer"])
def test_the_prompt_is_that_of_training(talk, template, system, vocabulary, request):
    """Trap 6: what the engine is given in the third turn of a chat begins the very tokens that training sees."""
    words = request.getfixturevalue(vocabulary)
    words = words[0] if isinstance(words, tuple) else words
    talker = Chat(Script(words, template), Decoding(max_new_tokens=20), system)
    talker.engine.context = 10_000
    texts = ["  北京在哪里？\n", "在中国。", "<|im_end|> what is this?", " It's ten characters. ", "再见"]
    talker.engine.script = [[texts[1]], [texts[3]], ["好！"]]
    for text in texts[::2]:
        list(talker.reply(text))
    row = messages.from_row(json.loads(json.dumps(talker.row())))
    trained = batching.encode(render(row, template, words.eos_token), words, max_length=10_000)
    ids = talker.engine.start(talker.engine.asked[-1])
    assert trained.input_ids[: len(ids)] == ids
    answer = [label for label in trained.labels[len(ids) :] if label != batching.IGNORE_INDEX]
    assert words.decode(answer, skip_special_tokens=True).strip() == "好！"
    assert contents(row) == [*([system] if system else []), *map(str.strip, texts), "好！"]


def test_a_message_too_long_is_refused_and_the_chat_goes_on(talker):
    shown = converse(talker, "很" * 100_000, "你好")
    assert "[the message takes" in shown
    assert "tokens and 100 are free; shorten it or lower max_new_tokens]\n" in shown
    assert contents(talker.history) == ["你好", "回答"]


@pytest.mark.parametrize("text", ["很" * 100_000, "a" * 100_000, "👍🏽" * 50_000, "x" + " " * 99_998 + "x"])
def test_a_hundred_thousand_characters_are_counted_in_seconds(talker, text):
    with pytest.raises(InputError, match="shorten it"):
        next(talker.reply(text))


def test_broken_utf8_is_one_line(talker):
    broken = b"\xe4\xbd\xa0\xe5".decode(errors="surrogateescape")
    shown = converse(talker, broken, "/system " + broken, "/save " + broken, "你好")
    assert shown.count("character 2 is not UTF-8; set the terminal or the file to UTF-8]\n") == 3
    assert talker.engine.asked == [[Message("user", "你好")]]


def test_retry_undo(talker):
    talker.engine.script = [["一"], ["二"], ["三"], [""]]
    list(talker.reply("你好"))
    list(talker.reply("再见"))
    assert list(talker.retry()) == ["三"]
    assert contents(talker.history) == ["你好", "一", "再见", "三"]
    assert [decoding.seed for decoding in talker.engine.decodings] == [0, 0, 1]
    assert talker.engine.asked[2] == talker.engine.asked[1]
    assert list(talker.retry()) == [""]
    assert contents(talker.history) == ["你好", "一", "再见", "三"]  # no new answer: the old one stays
    assert [talker.undo(), talker.undo()] == ["再见", "你好"]
    for nothing in (talker.undo, lambda: list(talker.retry())):
        with pytest.raises(InputError, match="nothing was said yet"):
            nothing()


# the terminal


def test_the_reader_is_told_what_was_forgotten(talker):
    shown = converse(talker, *[f"问题{n}：今天天气怎么样" for n in range(5)])
    assert shown.splitlines()[2:5] == ["回答", "[no longer in memory: the oldest 1 of 3 exchanges]", "回答"]


def test_ctrl_c_stops_the_answer_and_not_the_program(talker):
    """A real SIGINT in the middle of an answer: what was said is kept, the next question is answered."""
    talker.engine.script = [["从", "前", lambda: signal.raise_signal(signal.SIGINT), "永不"]]
    assert converse(talker, "讲故事", "你好") == "从前 [stopped]\n回答\n"
    assert contents(talker.history) == ["讲故事", "从前", "你好", "回答"]


def test_ctrl_c_before_the_first_word_leaves_no_turn(talker):
    talker.engine.script = [[lambda: signal.raise_signal(signal.SIGINT)]]
    assert converse(talker, "讲故事", "你好") == " [stopped]\n回答\n"
    assert contents(talker.history) == ["你好", "回答"]


def test_ctrl_c_in_a_retry_keeps_the_old_answer(talker):
    talker.engine.script = [["旧"], [lambda: signal.raise_signal(signal.SIGINT)]]
    assert converse(talker, "你好", "/retry") == "旧\n [stopped]\n"
    assert contents(talker.history) == ["你好", "旧"]


def test_ctrl_c_while_a_piece_is_shown(talker):
    """The signal arrives in the terminal's own code: the answer still ends at once."""

    def write(text):
        shown.append(text)
        if text == "回":
            raise KeyboardInterrupt

    shown, lines = [], iter(["你好", "/exit"])
    terminal(talker, write, lambda _: next(lines))
    assert shown[-1] == " [stopped]\n"
    assert contents(talker.history) == ["你好", "回"]


def test_ctrl_c_at_the_prompt_says_how_to_leave(talker):
    assert converse(talker, KeyboardInterrupt(), "你好") == "\n[/exit or Ctrl-D leaves]\n回答\n"


@pytest.mark.parametrize("end", [EOFError(), "/exit", "  /exit "])
def test_ways_out(talker, end):
    converse(talker, "你好", end, "不再问")
    assert len(talker.history) == 2


def test_an_empty_line_asks_nothing(talker):
    assert converse(talker, "", "   ") == ""
    assert talker.engine.asked == []


def test_an_empty_answer_is_said_and_leaves_no_turn(talker):
    talker.engine.script = [[]]
    assert converse(talker, "你好") == "[the model said nothing]\n"
    assert talker.history == []


def test_commands(talker):
    shown = converse(talker, "你好", "再见", "/undo", "/retry", "/reset", "/undo", "/help", "/quit now")
    answers = ["回答", "回答", "taken back; exchanges left: 1", "回答", "forgotten"]
    errors = ["[nothing was said yet; ask something first]", HELP, "[/quit is not a command; /help lists them]"]
    assert shown == "\n".join([*answers, *errors]) + "\n"
    assert talker.history == []
    assert HELP.count("\n") == 8


def test_system_and_set(talker):
    shown = converse(talker, "/system 你是老师。", "/set temperature=0.7", "/set top_k=5", "你好", "/system", "再见")
    assert "system prompt: 你是老师。\n" in shown
    assert "temperature=0.7 top_k=5" in shown
    assert "system prompt: that of the template\n" in shown
    assert [contents(turns) for turns in talker.engine.asked] == [["你是老师。", "你好"], ["你好", "回答", "再见"]]
    assert talker.engine.decodings[0] == replace(Decoding(max_new_tokens=20), temperature=0.7, top_k=5)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set temperature=-1", "temperature is -1.0; choose 0 or more"),
        ("/set heat=1", "unknown key 'heat'"),
        ("/set temperature", "write key=value"),
        ("/set seed=[", "mend the value"),
        ("/set penalise=never", "choose among answer, all"),
        ("/set max_new_tokens=1000", ""),
    ],
)
def test_set_refuses(talker, line, words):
    before = talker.decoding
    shown = converse(talker, line, "你好")
    assert words in shown.splitlines()[0]
    if words:
        assert talker.decoding == before
    else:  # an answer longer than the context leaves no room for any question
        assert "and 0 are free; shorten it or lower max_new_tokens" in shown


def test_save_and_load(talker, tmp_path):
    file = tmp_path / "talk.jsonl"
    shown = converse(talker, "/system 你是老师。", "你好\n再来", "/save " + str(file), "/save " + str(file))
    assert f"saved to {file}\n[{file}: exists already; name another file]\n" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["talk.jsonl"]
    other = Chat(talker.engine, talker.decoding)
    assert converse(other, f"/load {file}") == (f"loaded 1 exchanges from {file}; the last one:\n> 你好\n再来\n回答\n")
    assert (other.system, other.history) == (talker.system, talker.history)
    assert messages.read(file) == [talker.led(talker.history)]  # training reads it too


def test_unwritable_and_wrong_files_are_one_line(talker, tmp_path):
    (tmp_path / "file").write_text("nonsense")
    (tmp_path / "two.jsonl").write_text('{"question": "1", "answer": "2"}\n' * 2)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    lines = [f"/save {tmp_path}/none/talk", f"/save {tmp_path}/file/talk", "/save", f"/save {tmp_path}"]
    lines += [f"/load {tmp_path}/{name}" for name in ("none", "file", "two.jsonl", "binary", "")] + ["/load"]
    before = sorted(tmp_path.iterdir())
    shown = converse(talker, "你好", *lines).splitlines()[1:]
    assert len(shown) == len(lines)
    assert all(line.startswith("[") and line.endswith("]") for line in shown)
    words = ["No such file", "Not a directory", "which file?", "exists already"]
    words += ["no such file", "file:1", "2 conversations", "binary", "", "which file?"]
    for line, word in zip(shown, words, strict=True):
        assert word in line
    assert sorted(tmp_path.iterdir()) == before
    assert len(talker.history) == 2


# the command


def test_with_a_real_model(model, tokenizer):
    talker = Chat(Transformers(model, tokenizer, "chatml"), Decoding(temperature=0, max_new_tokens=5))
    said = "".join(talker.reply("What is the capital of France?"))
    assert said
    assert talker.history[-1] == Message("assistant", said)


def test_broken_bytes_from_a_file_are_one_line(tiny, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xe4\xbd\n\xff\n/exit\n"), encoding="utf-8"))
    code, out, _ = run("chat", tiny, "--json")
    assert code == 0
    assert json.loads(out) == {"messages": []}


def test_a_gguf_file_goes_to_llama_cpp(tokenizer, tmp_path, run, refused, monkeypatch):
    opened = []
    monkeypatch.setattr(engines, "LlamaCpp", lambda path: opened.append(path) or Script(tokenizer))
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n/exit\n"))
    file = tmp_path / "zh.gguf"
    code, out, _ = run("chat", file, "--system", " 你是老师。 ", "--set", "max_new_tokens=20", "--json")
    assert code == 0
    assert opened == [str(file)]
    assert [turn["content"] for turn in json.loads(out)["messages"]] == ["你是老师。", "你好", "回答"]
    refused(["chat", file, "--bits", "8"], "a GGUF file is whole", "leave --adapter and --bits out")
    refused(["chat", "--web", "--json"], "--web and --json do not go together")


def test_a_missing_gguf_file_is_one_line(refused, tmp_path):
    refused(["chat", tmp_path / "none.gguf"], "none.gguf")


def test_in_a_real_terminal(tiny):
    """Keys as a person types them: line history, Ctrl-C in an answer, a paste of two lines."""
    pexpect = pytest.importorskip("pexpect")
    settings = ["--set", "max_new_tokens=400", "--set", "temperature=1.5", "--set", "top_p=1", "--set", "top_k=0"]
    program = pexpect.spawn(sys.executable, ["-m", "cvlib", "chat", str(tiny), *settings], timeout=60, encoding=None)
    program.expect_exact(b"/exit ")
    program.expect_exact(b"\n> ")
    program.send(b"/undo\r")
    program.expect_exact(b"nothing was said yet")
    program.expect_exact(b"\n> ")
    program.send(b"\x1b[A\r")  # arrow up: the line before
    program.expect_exact(b"nothing was said yet")
    program.expect_exact(b"\n> ")
    program.send(b"\x1b[200~one\ntwo\x1b[201~\r")  # what a terminal sends for a paste
    program.expect_exact(b"two")
    program.expect_exact(b"\x1b[?2004l")
    program.expect(rb"\S{4}")  # it answers
    program.sendintr()
    program.expect_exact(b"[stopped]")
    program.expect_exact(b"\n> ")
    program.send(b"/undo\r")
    program.expect_exact(b"taken back; exchanges left: 0")  # the paste was one question
    program.expect_exact(b"\n> ")
    program.sendintr()
    program.expect_exact(b"/exit or Ctrl-D leaves")
    program.expect_exact(b"\n> ")
    program.sendeof()
    program.expect(pexpect.EOF)
    program.close()
    assert program.exitstatus == 0


# the soak test


class Typist(Engine):
    """An engine that spells tokens of rare characters and emoji, as real engines do."""

    template, context = "chatml", 400

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def stream(self, conversation, decoding, stop=()):
        ids = self.tokenizer("好龘👍🏽𠀀" * 9, add_special_tokens=False).input_ids[: decoding.max_new_tokens]
        yield from generation.until(generation.spell(iter(ids), self.tokenizer), stop)


def careless(stream, tokenizer):
    """Every token by itself: what the buffer of `generation.spell` is there to prevent."""
    for token in stream:
        yield tokenizer.decode([token])


@pytest.mark.parametrize("spell", [generation.spell, careless])
def test_the_soak_test_sees_a_torn_character(tokenizer, monkeypatch, spell):
    """`benchmarks/soak_chat.py` on its own script: it talks, stops and forgets, and it would notice."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import soak_chat

    drawn = []
    monkeypatch.setattr(generation, "spell", spell)
    soak_chat.record(drawn)
    person = soak_chat.Script("typist", Chat(Typist(tokenizer), Decoding()), random.Random(1), drawn)
    talk = lambda: [person.turn() for _ in range(100)]  # noqa: E731
    if spell is careless:
        with pytest.raises(AssertionError, match="but the model wrote"):
            talk()
        return
    talk()
    assert person.count["answers"] > person.count["cancelled"] > 5
    assert person.count["ends_inside_a_character"] > 5
    assert person.count["fffd_by_the_model"] == 0


def test_memory_is_a_straight_line(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import soak_chat

    assert soak_chat.slope([(0.5 * n, 900 + 0.1 * n) for n in range(40)]) == pytest.approx(12)


@pytest.fixture
def soak():
    """What the soak test stored: an hour of chat or the most of it."""
    path = ROOT / "benchmarks/results/13-soak.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"minutes": 0}
    if stored["minutes"] < 30:
        pytest.skip("not measured: the soak test has not run, or is running")
    return stored


def test_an_hour_of_chat_tears_nothing_and_crashes_nowhere(soak):
    assert soak["torn"] == soak["crashes"] == 0
    assert {row["engine"] for row in soak["rows"]} == {"transformers", "llama.cpp"}
    assert all(row["cancelled"] for row in soak["rows"])


def test_an_hour_of_chat_leaves_memory_flat(soak):
    assert soak["slope_mb_per_hour"] < 0.02 * soak["memory_mb"][-1][1]
