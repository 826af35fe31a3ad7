"""`cvlib data check|mix`: look at rows before training on them, and mix several sources into one file."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from cvlib import InputError
from cvlib.commands import command, place, say, subcommands

CHECK = """\
Rows may have the shape of BELLE, Alpaca, Guanaco, ShareGPT or OpenAI's messages.

example: cvlib data check mine.jsonl data_samples/belle_zh.jsonl"""
MIX = """\
sources:                              # a file or a packaged source, and its weight; earlier ones win over duplicates
  data_samples/belle_zh.jsonl: 1
  data_samples/alpaca_en.jsonl: 0.5
  hsk-sentences: 0.25
held_out: [data_samples/belle_zh.jsonl, data_samples/exam]    # nothing of these may be trained on
rows: 2000                            # of the mix; 0: as many as are left
temperature: 1.0                      # 1: in proportion to weight and rows; .inf: to the weights alone
seed: 42"""


def register(group) -> None:
    """Add these commands to the command line."""
    actions = subcommands(group, "data", "look at rows, and mix them")

    checking = command(
        actions, "check", check, "rows, languages, turns, lengths, duplicates, and every broken row", CHECK
    )
    checking.add_argument("files", nargs="+", metavar="FILE", help="row files, or the names of packaged sources")
    checking.add_argument(
        "--tokenizer", default="smollm2-135m", metavar="MODEL", help="whose tokens to count (default: smollm2-135m)"
    )

    about = "mix sources as a MIX.yaml says: weighted, deduplicated, decontaminated"
    mixing = command(actions, "mix", mix, about, f"a MIX.yaml:\n\n{MIX}")
    mixing.add_argument("plan", type=Path, metavar="MIX.yaml", help="sources with weights, held-out files, rows, seed")
    mixing.add_argument("-o", "--out", type=place, required=True, metavar="OUT.jsonl", help="the file to write")
    mixing.add_argument("--force", action="store_true", help="replace OUT.jsonl if it exists")


def check(options: argparse.Namespace) -> int:
    """`cvlib data check`: exit code 1 if a row is broken or a file has none."""
    from cvlib import census, loading

    try:
        tokenizer = loading.read_tokenizer(loading.resolve(options.tokenizer))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"--tokenizer {options.tokenizer}: cannot be read ({reason}); name a model") from None
    found = [census.count(file, tokenizer) for file in options.files]
    say(options, [dataclasses.asdict(item) for item in found], "\n".join(map(census.report, found)))
    return int(any(item.broken or not item.rows for item in found))


def mix(options: argparse.Namespace) -> None:
    """`cvlib data mix`"""
    from cvlib import mixture

    tallies = mixture.mix(mixture.load(options.plan), options.out, options.force)
    complaints = "".join(f"\n  {reason}" for tally in tallies for reason in tally.complaints)
    text = f"{mixture.table(tallies)!r}\n{options.out}: {sum(tally.written for tally in tallies):,} rows{complaints}"
    say(options, [vars(tally) | {"written": tally.written} for tally in tallies], text)
