"""An hour of scripted chat: does memory stay flat, is a character ever torn, does anything crash?

The terminal of `cvlib chat` talks to a script instead of a person, with the shipped Chinese adapter on transformers and
the running model's own GGUF file on llama.cpp, in turn, in one process. Each line is drawn at random: questions
of 1 to 400 characters in Chinese, English, emoji and all of them mixed, and now and then /retry, /undo, /reset, a
message that is too long or a system prompt. A quarter of the answers is stopped by Ctrl-C after a random piece.

After every answer what was shown is held against the tokens that were drawn: U+FFFD may stand only where the model
wrote bytes that are no character. Memory is the resident set of the process, every half minute; "flat" means that a
straight line through all but the first quarter climbs by less than 2 % an hour.

Before the clock starts, transformers reads a prompt of every length it will meet (lengths are rounded up to
`generation.LENGTHS`): oneDNN compiles code for each length once and keeps it, and that is no leak.

To leave the machine to others the script sleeps three times as long as it computed: a quarter of one core at most.

    python benchmarks/soak_chat.py --minutes 60
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import time
from collections import Counter
from pathlib import Path

import study

from cvlib import ROOT, assets, chat, engines, generation, loading
from cvlib.recipes import Decoding

ADAPTER = ROOT / "data_samples/adapters/smollm2-zh"
CONTEXT = 1024
REST = 3  # seconds of sleep for each second of computing
FLAT = 0.02  # of the memory held, an hour
PARTS = (
    "请介绍一下北京。",
    "天空为什么是蓝色的？",
    "写一首关于春天的短诗，",
    "龘靐齉，生僻字也要完整。",
    "Tell me about the Great Wall. ",
    "What is 12 + 30? ",
    "👍🏽🎉🧑‍🚀",
    "🇨🇳🐼",
    "𠀀㐀 e\u0301 が ",
)


class Script:
    """A person at the terminal: types lines, looks at what comes, and now and then presses Ctrl-C."""

    def __init__(self, name: str, talk: chat.Chat, draws: random.Random, drawn: list[list[int]]):
        self.name, self.talk, self.draws, self.drawn = name, talk, draws, drawn
        self.count: Counter = Counter()
        self.shown, self.patience, self.stopped = [], 0, False

    def turn(self) -> None:
        """One line typed, and what the terminal does with it."""
        self.shown, self.stopped = [], False
        self.patience = self.draws.randrange(1, 30) if self.draws.random() < 0.25 else 0
        self.drawn.clear()
        self.count["lines"] += 1
        line = self.next_line()
        said = chat.command(self.talk, line) if line.startswith("/") else self.talk.reply(line)
        chat.show(self.talk, said, self.write)
        self.check()

    def write(self, piece: str) -> None:
        self.shown.append(piece)
        if self.drawn and len(self.shown) == self.patience and not piece.startswith(("[", " [", "\n")):
            self.count["cancelled"] += 1
            self.stopped = True
            raise KeyboardInterrupt

    def next_line(self) -> str:
        kind = self.draws.random()
        for chance, line in (
            (0.04, "/retry"),
            (0.07, "/undo"),
            (0.09, "/reset"),
            (0.11, "很" * 3000),
            (0.13, "/system 简短地回答。"),
        ):
            if kind < chance:
                return line
        self.talk.decoding = Decoding(
            temperature=self.draws.choice((0.2, 1.0, 1.5)),
            top_p=self.draws.choice((0.9, 1.0)),
            min_p=self.draws.choice((0.0, 0.05)),
            max_new_tokens=self.draws.randrange(1, 80),
            seed=self.draws.randrange(2**31),
        )
        text = "".join(self.draws.choices(PARTS, k=self.draws.randrange(1, 40)))
        return text[: self.draws.randrange(1, 400)].strip() or "?"

    def check(self) -> None:
        """Hold what was shown against the tokens drawn."""
        if not self.drawn:
            return
        shown = "".join(self.shown)
        written = self.talk.engine.tokenizer.decode(self.drawn[-1], skip_special_tokens=True)
        text = shown.rpartition(" [stopped]\n")[0] if self.stopped else written.rstrip(generation.TORN)
        whole = written.startswith(text) if self.stopped else shown.startswith(text)
        if not whole:
            raise AssertionError(f"{self.name}: shown {shown!r}, but the model wrote {written!r}")
        self.count["answers"] += 1
        self.count["characters"] += len(text)
        self.count["chinese"] += len(re.findall(r"[\u4e00-\u9fff]", text))
        self.count["beyond_16_bits"] += sum(ord(character) > 0xFFFF for character in text)
        self.count["fffd_by_the_model"] += text.count(generation.TORN)
        self.count["ends_inside_a_character"] += not self.stopped and written.endswith(generation.TORN)


def record(drawn: list[list[int]]) -> None:
    """Let `generation.spell` note the tokens of every answer in `drawn`."""
    spell = generation.spell

    def noted(stream, tokenizer):
        ids: list[int] = []
        drawn.append(ids)
        yield from spell((ids.append(token) or token for token in stream), tokenizer)

    generation.spell = noted


def resident() -> float:
    """MB of memory this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def slope(samples: list[tuple[float, float]]) -> float:
    """MB an hour: a straight line through all but the first quarter of the (minute, MB) samples."""
    late = samples[len(samples) // 4 :]
    return statistics.linear_regression(*zip(*late, strict=True)).slope * 60 if len(late) > 2 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    minutes = parser.parse_args().minutes
    drawn: list[list[int]] = []
    record(drawn)
    first = engines.Transformers(*loading.load("smollm2-135m", adapter=ADAPTER), "chatml")
    first.context = CONTEXT
    warm(first.model)
    second = engines.LlamaCpp(assets.fetch("smollm2-135m"), "chatml", context=CONTEXT, threads=1)
    soak({"transformers": first, "llama.cpp": second}, minutes, drawn)


def warm(model) -> None:
    """One answer behind a prompt of every length that the chat can come to."""
    for length in range(generation.LENGTHS, CONTEXT, generation.LENGTHS):
        list(generation.tokens(model, [[1] * length], Decoding(max_new_tokens=generation.LENGTHS)))


def soak(models: dict[str, engines.Engine], minutes: float, drawn: list[list[int]]) -> None:
    """Talk to the engines in turn until the time is over; store what was counted every few minutes."""
    started, draws = time.time(), random.Random(0)
    people = [Script(name, chat.Chat(engine, Decoding()), draws, drawn) for name, engine in models.items()]
    samples: list[tuple[float, float]] = []
    while (minute := (time.time() - started) / 60) < minutes:
        for person in people:
            used = time.process_time()
            person.turn()
            time.sleep(REST * (time.process_time() - used))
        if not samples or minute - samples[-1][0] >= 0.5:
            samples.append((round(minute, 2), round(resident(), 1)))
            store(people, samples, minutes)
    store(people, samples, minutes)
    climb, held = slope(samples), samples[-1][1]
    print(f"memory {held:.0f} MB, slope {climb:+.1f} MB an hour")
    assert climb < FLAT * held, "memory is not flat"


def store(people: list[Script], samples: list[tuple[float, float]], minutes: float) -> None:
    rows = [{"engine": person.name, **person.count} for person in people]
    study.save(
        "13-soak",
        rows,
        minutes=samples[-1][0] if samples else 0,
        minutes_wanted=minutes,
        duty=f"sleeps {REST} s for each second of processor time: at most {1 / (1 + REST):.0%} of one core",
        processor_s=round(time.process_time(), 1),
        memory_mb=samples,
        slope_mb_per_hour=round(slope(samples), 2) if len(samples) > 8 else None,
        crashes=0,
        torn=0,
    )


if __name__ == "__main__":
    main()
