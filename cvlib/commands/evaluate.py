"""`cvlib evaluate`: a model's scores on held-out rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from cvlib import InputError
from cvlib.commands import command, natural, say
from cvlib.commands.choosing import chosen, model_options


def register(group) -> None:
    """Add this command to the command line."""
    scoring = command(group, "evaluate", evaluate, "bits per byte and answer language on held-out rows")
    model_options(scoring)
    scoring.add_argument(
        "--rows", nargs="+", type=Path, metavar="FILE", help="row files; their held-out split is scored"
    )
    scoring.add_argument("--limit", type=natural, help="score at most so many rows of each file")
    scoring.add_argument("--answers", type=natural, default=0, metavar="N", help="also answer N questions of each file")


def evaluate(options: argparse.Namespace) -> None:
    """`cvlib evaluate`"""
    from cvlib import messages
    from cvlib.training import locate

    files = options.rows or ["data_samples/belle_zh.jsonl", "data_samples/alpaca_en.jsonl"]
    held_out = {str(file): messages.split(messages.read(locate(file)))[1][: options.limit] for file in files}
    for file, rows in held_out.items():
        if not rows:
            raise InputError(f"{file}: no row is held out to be scored; add rows or raise --limit")
    recipe, model, tokenizer = chosen(options)
    from cvlib import evaluation, generation

    results = []
    for file, rows in held_out.items():
        found = evaluation.score(model, tokenizer, rows, recipe.template)
        low, high = found.interval()
        row = {"file": file, "rows": len(rows), "bits_per_byte": found.bits_per_byte, "low": low, "high": high}
        if options.answers:
            questions = [conversation[:-1] for conversation in rows[: options.answers]]
            said = generation.answers(model, tokenizer, questions, recipe.template, recipe.decoding)
            row["han_share"] = evaluation.han_share(said)
        results.append(row)
    lines = [
        f"{row['file']}: {row['bits_per_byte']:.3f} bits per byte "
        f"[{row['low']:.3f}, {row['high']:.3f}], {row['rows']} rows"
        + (f", {row['han_share']:.0%} of the answers' letters are Chinese" if options.answers else "")
        for row in results
    ]
    say(options, results, "\n".join(lines))
