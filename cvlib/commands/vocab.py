"""`cvlib vocab train|merge|extend|audit|fertility`: vocabularies, from text to a grown tokenizer and its audit."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from cvlib import InputError, choose
from cvlib.commands import command, place, positive, say, subcommands

SHOWN = 8  # examples of each finding
TRAIN = "example: cvlib vocab train novel.txt --size 8000 -o zh.model"
MERGE = "example: cvlib vocab merge mistral-v1-tokenizer zh.model -o merged.model"
AUDIT = "example: cvlib vocab audit merged.model --base mistral-v1-tokenizer"
EXTEND = """\
examples:
  cvlib vocab extend smollm2-135m --packaged --pieces 2048 -o runs/grown
  cvlib vocab extend mistral-v1-tokenizer novel.txt --common --pieces 8000 --multiple 64 -o grown.model
"""
FERTILITY = "example: cvlib vocab fertility smollm2-135m mistral-v1-tokenizer runs/grown --text novel.txt"


def register(group) -> None:
    """Add these commands to the command line."""
    actions = subcommands(group, "vocab", "train, merge, extend and audit vocabularies; count what text costs")

    about = "learn a Chinese SentencePiece model from text"
    training = command(actions, "train", train, about, TRAIN)
    text_options(training)
    training.add_argument("--size", type=positive, required=True, help="pieces in all, bytes and control tokens too")
    training.add_argument(
        "--algorithm", choices=("bpe", "unigram"), default="bpe", help="unigram: as the published Chinese model"
    )

    about = "append to one SentencePiece model the pieces of another that it lacks"
    merging = command(actions, "merge", merge, about, MERGE)
    merging.add_argument("base", metavar="BASE", help="a LLaMA-family tokenizer.model, or an asset")
    merging.add_argument("extra", type=Path, metavar="EXTRA", help="the model to take pieces from")
    merging.add_argument(
        "--scores",
        choices=("below", "zero"),
        default="below",
        help="below: new pieces rank under the base's; zero: the published rule, which breaks English pieces",
    )
    merging.add_argument("--han-only", action="store_true", help="take purely Chinese pieces only")

    about = "grow a tokenizer by Chinese pieces that its own merges reach"
    extending = command(actions, "extend", extend, about, EXTEND)
    extending.add_argument("base", metavar="BASE", help="a .model, a byte-level tokenizer.json, a folder or an asset")
    text_options(extending)
    extending.add_argument(
        "--packaged", action="store_true", help="learn from the laws, idioms and sentences that packages bring, too"
    )
    extending.add_argument("--pieces", type=positive, required=True, metavar="N", help="how many pieces to add")
    extending.add_argument("--common", action="store_true", help="begin with the common characters the base lacks")
    extending.add_argument(
        "--multiple", type=positive, default=1, metavar="M", help="round the size up to a multiple of M"
    )

    for making in (training, merging, extending):
        making.add_argument("-o", "--out", type=place, required=True, metavar="OUT", help="what to write")

    about = "what a grown vocabulary did to its base"
    auditing = command(actions, "audit", audit, about, AUDIT)
    auditing.add_argument("merged", metavar="MERGED", help="the grown tokenizer: file, folder or asset")
    auditing.add_argument("--base", required=True, metavar="BASE", help="the tokenizer it grew from")
    auditing.add_argument("--text", type=Path, metavar="FILE", help="also count the lines of FILE that are cut anew")

    about = "what a text costs in one vocabulary or several"
    counting = command(actions, "fertility", fertility, about, FERTILITY)
    counting.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help="files, folders or assets")
    counting.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text to count")


def text_options(parser: argparse.ArgumentParser) -> None:
    """The options that name text to learn from."""
    parser.add_argument("texts", nargs="*", type=Path, metavar="TEXT", help="UTF-8 text, a paragraph a line")
    parser.add_argument(
        "--words", nargs="+", type=Path, default=[], metavar="FILE", help="word lists, WORD<tab or space>COUNT a line"
    )


def located(tokenizer: str) -> Path:
    """A tokenizer named on the command line: an asset's files, or a path."""
    from cvlib import assets, loading

    if tokenizer in assets.ASSETS:
        return Path(loading.resolve(tokenizer))
    if not Path(tokenizer).exists():
        raise InputError(f"{tokenizer}: no such file, folder or asset; {choose(tokenizer, assets.ASSETS)}")
    return Path(tokenizer)


def fresh(out: Path) -> Path:
    """Refuse to write over what exists."""
    if out.exists():
        raise InputError(f"{out}: exists already; choose another name or remove it first")
    return out


def train(options: argparse.Namespace) -> None:
    """`cvlib vocab train`"""
    from cvlib import vocabulary

    made = vocabulary.train(options.texts, fresh(options.out), options.size, options.words, options.algorithm)
    say(options, {"out": str(options.out), "pieces": len(made.pieces)}, f"{options.out}: {len(made.pieces):,} pieces")


def merge(options: argparse.Namespace) -> None:
    """`cvlib vocab merge`"""
    from cvlib import vocabulary

    base = located(options.base)
    added = vocabulary.merge(base, options.extra, fresh(options.out), options.scores, options.han_only)
    grown(options, base, len(added), vocabulary.audit(options.out, base))


def extend(options: argparse.Namespace) -> None:
    """`cvlib vocab extend`"""
    from cvlib import extension

    if not (options.texts or options.words or options.packaged):
        raise InputError("no text to learn from; name text files, --words lists, or --packaged")
    base, out = located(options.base), fresh(options.out)
    with tempfile.TemporaryDirectory() as folder:
        corpus = extension.packaged_corpus(folder) if options.packaged else extension.Corpus([], [], {})
        texts, words = options.texts + corpus.texts, options.words + corpus.words
        made = extension.extend(base, texts, out, options.pieces, words, options.common, options.multiple)
    grown(options, base, len(made.added), made.audit)


def grown(options: argparse.Namespace, base: Path, added: int, found) -> None:
    """Say what was made, and what it did to its base."""
    text = f"{options.out}: {found.size:,} pieces, {added:,} of them new\n{findings(found)}"
    say(options, {"out": str(options.out), "base": str(base), **dataclasses.asdict(found)}, text)


def audit(options: argparse.Namespace) -> None:
    """`cvlib vocab audit`"""
    from cvlib import vocabulary
    from cvlib.pieces import read_text

    lines = read_text(options.text).splitlines() if options.text else ()
    found = vocabulary.audit(located(options.merged), located(options.base), lines)
    text = f"{options.merged}: {found.size:,} pieces, {found.added:,} added to {options.base}\n{findings(found)}"
    say(options, dataclasses.asdict(found), text)


def findings(found) -> str:
    """The counts of an audit, each with a few examples."""
    about = {
        "lost": "pieces of the base that no text gives any more",
        "dead": "new pieces that no text gives",
        "changed": "lines cut differently",
    }
    lines = [f"  bridges  {found.bridges:>6,}  steps on the way to whole characters"] if found.bridges else []
    for name, meaning in about.items():
        victims = getattr(found, name)
        lines.append(f"  {name:<8} {len(victims):>6,}  {meaning}")
        lines += [f"{'':<18}{victim[:60]!r} → {' '.join(cut)[:60]}" for victim, cut in list(victims.items())[:SHOWN]]
    return "\n".join(lines)


def fertility(options: argparse.Namespace) -> None:
    """`cvlib vocab fertility`"""
    from cvlib import vocabulary
    from cvlib.pieces import read_text
    from cvlib.show import Table

    text = read_text(options.text)
    counts = [vocabulary.fertility(located(name), text) for name in options.tokenizers]
    rates = ("tokens_per_character", "tokens_per_chinese_character", "bytes_per_token")
    rows = [
        [count.name, count.size, count.tokens, *(f"{getattr(count, rate):.3f}" for rate in rates)] for count in counts
    ]
    table = Table(["tokenizer", "pieces", "tokens", "per character", "per Chinese character", "bytes per token"], rows)
    data = [dataclasses.asdict(count) | {rate: getattr(count, rate) for rate in rates} for count in counts]
    say(options, data, repr(table))
