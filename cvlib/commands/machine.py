"""`cvlib doctor`, `cvlib assets`, `cvlib memory`: what there is, and what it is enough for."""

from __future__ import annotations

import argparse
import dataclasses

from cvlib import recipes
from cvlib.commands import command, positive, say, setting_option

#: Memory of the cards people ask about, in bytes.
CARDS = {"2080ti": 11_000_000_000, "t4": 16_000_000_000, "3090": 24_000_000_000, "4090": 24_000_000_000}
MARKS = "abcdefghijklmnopqrstuvwxyz"  # a letter for each part, in the table and in the bar

EXAMPLES = """\
The exit code is 1 if it does not fit; the last line says what to change.

examples:
  cvlib memory llama-7b-8bit-2080ti
  cvlib memory llama-7b-8bit-2080ti --set data.max_length=1024 --card t4
  cvlib memory llama-7b-8bit-2080ti --serve 2048
"""


def register(group) -> None:
    """Add these commands to the command line."""
    command(group, "doctor", doctor, "what this machine can do, and what to mend")

    fetching = command(group, "assets", fetch, "list models, vocabularies and texts, or fetch and verify them")
    fetching.add_argument("names", nargs="*", metavar="NAME", help="what to fetch; none lists them all")

    counting = command(group, "memory", budget, "what a recipe needs, part by part, against a card's memory", EXAMPLES)
    counting.add_argument("recipe", metavar="RECIPE", help="a recipe's name or a .yaml file")
    counting.add_argument(
        "--card", type=card, default="2080ti", help=f"GB, or one of {', '.join(CARDS)} (default: 2080ti)"
    )
    counting.add_argument(
        "--serve",
        type=positive,
        metavar="TOKENS",
        help="instead of training: answer in one conversation of so many tokens",
    )
    setting_option(counting, recipes.keys(), "change one value of the recipe")


def card(text: str) -> int:
    """The memory of a card given on the command line, in bytes."""
    if text.lower() in CARDS:
        return CARDS[text.lower()]
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size <= 1000:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither GB, above 0 and up to 1000, nor one of {', '.join(CARDS)}"
        )
    return round(size * 1e9)


def doctor(options: argparse.Namespace) -> None:
    """`cvlib doctor`"""
    from cvlib.doctor import examine

    found = examine()
    width = max(len(item.name) for item in found)
    remedy = "\n" + " " * width + " → "
    lines = [f"{item.name:<{width}} {item.value}" + (remedy + item.mend if item.mend else "") for item in found]
    say(options, [dataclasses.asdict(item) for item in found], "\n".join(lines))


def fetch(options: argparse.Namespace) -> None:
    """`cvlib assets`"""
    from cvlib import assets

    if options.names:
        paths = {name: str(assets.fetch(name)) for name in options.names}
        say(options, paths, "\n".join(f"{name}  {path}" for name, path in paths.items()))
        return
    listed = [dataclasses.asdict(asset) | {"cached": bool(assets.cached(asset))} for asset in assets.ASSETS.values()]
    lines = [
        f"{'✓' if row['cached'] else ' '} {row['name']:<22} {row['download'] / 1e6:>6.1f} MB  {row['licence']:<14} "
        f"{row['what']} [{row['package'] or row['hub']}]"
        for row in listed
    ]
    say(options, listed, "\n".join(lines))


def budget(options: argparse.Namespace) -> int:
    """`cvlib memory`: exit code 1 if the recipe does not fit."""
    from cvlib import fitting, memory, shapes
    from cvlib.show import Table

    recipe = recipes.load(options.recipe, options.set)
    shape = shapes.shape_of(recipe.base)
    if options.serve:
        needed = memory.serving(shape, recipe.bits, options.serve)
        fits, verdict = fitting.serves(recipe, shape, options.serve, options.card)
    else:
        needed = memory.of_recipe(recipe, shape)
        fits, verdict = fitting.fits(recipe, shape, options.card)
    data = {"peak": needed.peak, "moment": needed.moment, "card": options.card, "fits": fits, "verdict": verdict}
    parts = [dataclasses.asdict(part) for part in needed.parts]
    table = Table(
        ["", "part", "GB", "when"],
        [[mark, *row] for mark, row in zip([*MARKS[: len(parts)], ""], memory.table(needed), strict=True)],
    )
    say(options, data | {"parts": parts}, f"{table!r}\n\n{bar(needed, options.card)}\n{verdict}")
    return int(not fits)


def bar(needed, room: int, width: int = 60) -> str:
    """What is there at the peak as a bar of the parts' marks, and the card's memory as a line of the same scale."""
    scale, drawn, total = width / max(needed.peak, room), "", 0
    for mark, part in zip(MARKS, needed.parts, strict=False):
        if part.when in ("always", needed.moment):
            total += part.bytes
            drawn += mark * (round(scale * total) - len(drawn))
    return f"needs  {drawn} {needed.peak / 1e9:.1f} GB\ncard   {'─' * round(scale * room)} {room / 1e9:.1f} GB"
