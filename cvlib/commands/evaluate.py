"""`cvlib evaluate`: a model's scores on held-out rows, on plain text and in an exam."""

from __future__ import annotations

import argparse
from pathlib import Path

from cvlib import InputError, recipes
from cvlib.commands import command, natural, positive, say, setting_option
from cvlib.commands.choosing import chosen, model_options, recipe_of

COLUMNS = """\
columns of the table:
  bits per byte    what the answers' text costs with this model's help, with a 95 % interval over rows (chapter 00)
  Chinese letters  share of all letters in its own answers that are Chinese characters
  distinct-2       share of its neighbouring pairs of characters or words that are different: 1 repeats nothing
  longest loop     characters or words in the longest stretch that says one piece three times or more in a row
  endless          share of answers that had not ended after max_new_tokens

examples:
  cvlib evaluate --adapter runs/mine --rows data_samples/belle_zh.jsonl --answers 4
  cvlib evaluate --adapter runs/mine --exam data_samples/exam --shots 5
"""


def register(group) -> None:
    """Add this command to the command line."""
    about = "bits per byte on held-out rows and plain text, answers and their language, marks in an exam"
    scoring = command(group, "evaluate", evaluate, about, COLUMNS)
    model_options(scoring)
    files = {"nargs": "+", "type": Path, "metavar": "FILE", "default": []}
    scoring.add_argument("--rows", **files, help="row files; their held-out split is scored")
    scoring.add_argument("--text", **files, help="plain text files, scored whole")
    scoring.add_argument("--answers", type=natural, default=0, metavar="N", help="also answer N questions of each file")
    scoring.add_argument("--exam", type=Path, metavar="DIR", help="an exam folder as C-Eval or CMMLU publish it")
    scoring.add_argument("--shots", type=natural, help="worked examples before each exam question (default: 5)")
    scoring.add_argument("--scoring", default="letter", help="how the exam's answer is found; see cvlib.exams")
    scoring.add_argument("--chat", action="store_true", help="ask the exam through the model's chat template")
    scoring.add_argument("--batch", type=positive, default=16, help="exam prompts read at once")
    scoring.add_argument("--limit", type=natural, help="at most so many rows, passages or questions of each file")
    setting_option(scoring, recipes.keys(recipes.Decoding), "decoding of the answers, such as temperature=0")


def evaluate(options: argparse.Namespace) -> None:
    """`cvlib evaluate`"""
    from cvlib import exams, loading, questions

    held_out, passages = inputs(options)
    shots = 5 if options.shots is None else options.shots
    subjects = questions.read(options.exam, shots, options.limit) if options.exam else []
    # equal letters are a matter of rounding: on a processor there is room for all digits
    exact = ["dtype=float32"] if subjects and loading.device_and_dtype()[0] == "cpu" else []
    recipe = recipe_of(options, exact)
    recipe.decoding = recipes.override(recipe.decoding, options.set)
    model, tokenizer = chosen(options, recipe)
    sets = scores(options, recipe, model, tokenizer, held_out, passages)
    found, tables = {"sets": sets}, [table(sets)] if sets else []
    if subjects:
        template = recipe.template if options.chat else ""
        marks = exams.sit(model, tokenizer, subjects, options.scoring, template, options.batch)
        found["exam"] = exams.report(marks, options.scoring, shots)
        tables.append(exams.report_table(found["exam"]))
    say(options, found, "\n\n".join([*map(str, tables), *(said(one) for one in sets if "said" in one)]))


def inputs(options: argparse.Namespace) -> tuple[dict, dict]:
    """Everything that is to be scored, read before a model is loaded: rows and passages by file."""
    from cvlib import evaluation, messages
    from cvlib.pieces import read_text
    from cvlib.training import locate

    asked = options.rows or options.text or options.exam
    if options.answers and asked and not options.rows:
        raise InputError("--answers asks the questions of rows; name some with --rows")
    if options.set and not options.answers:
        raise InputError("--set says how answers are drawn; ask for some with --answers N")
    if options.shots is not None and not options.exam:
        raise InputError("--shots belongs to an exam; name its folder with --exam")
    files = options.rows if asked else ["data_samples/belle_zh.jsonl", "data_samples/alpaca_en.jsonl"]
    held_out = {str(file): messages.split(messages.read(locate(file)))[1][: options.limit] for file in files}
    passages = {str(file): evaluation.passages(read_text(file))[: options.limit] for file in options.text}
    for file, found in [*held_out.items(), *passages.items()]:
        if not found:
            raise InputError(f"{file}: no row is held out to be scored; add rows or raise --limit")
    return held_out, passages


def scores(options: argparse.Namespace, recipe, model, tokenizer, held_out: dict, passages: dict) -> list[dict]:
    """Bits per byte of each set with its interval, and what its answers are like."""
    from cvlib import behaviour, evaluation, generation

    sets = []
    for file, parts in [*held_out.items(), *passages.items()]:
        if file in passages:
            found = evaluation.score_text(model, tokenizer, parts)
        else:
            found = evaluation.score(model, tokenizer, parts, recipe.template)
        low, high = found.interval()
        about = {"file": file, "rows": len(parts), "bits_per_byte": found.bits_per_byte, "low": low, "high": high}
        if options.answers and file in held_out:
            asked = [conversation[:-1] for conversation in parts[: options.answers]]
            ended = generation.ended(model, tokenizer, asked, recipe.template, recipe.decoding)
            about |= behaviour.summary(ended)
            about["said"] = [[turns[-1].content, text] for turns, (text, _) in zip(asked, ended, strict=True)]
        sets.append(about)
    return sets


def said(one: dict) -> str:
    """A set's questions and the answers to them, to be read: no number says whether an answer is right."""
    return "\n\n".join(f"> {question}\n{answer}" for question, answer in one["said"])


def table(sets: list[dict]):
    """The scores as a table; columns about answers only where there are any."""
    from cvlib.show import Table

    extra = {
        "han_share": "Chinese letters",
        "distinct_2": "distinct-2",
        "loop": "longest loop",
        "never_stopped": "endless",
    }
    extra = {key: name for key, name in extra.items() if any(key in one for one in sets)}
    rows = []
    for one in sets:
        interval = f"[{one['low']:.3f}, {one['high']:.3f}]" if one["rows"] > 1 else "[one row has none]"
        bits = f"{one['bits_per_byte']:.3f} {interval}"
        rows.append([one["file"], one["rows"], bits, *(f"{one[key]:.2f}" if key in one else "" for key in extra)])
    return Table(["set", "rows", "bits per byte [95 %]", *extra.values()], rows)
