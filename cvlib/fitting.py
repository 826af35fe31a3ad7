"""A recipe and the memory of a card in; whether it fits, or which settings make it fit, out.

The advice is in the order of its price. For training: fewer conversations at once and checkpointing cost time and
change nothing; shorter rows lose the ends of answers; fewer bits cost a little quality (chapter 09 measures it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from cvlib.memory import of_recipe, serving
from cvlib.recipes import Recipe
from cvlib.shapes import Shape

MARGIN = 0.05  # share of the memory that is left to the allocator's rounding and fragmentation


def fits(
    recipe: Recipe, shape: Shape, available_bytes: int, device: str = "cuda", dtype: str = "float16"
) -> tuple[bool, str]:
    """Whether a recipe trains in the memory there is, and one line: how much it needs, or what to change.

    >>> from cvlib import recipes
    >>> from cvlib.shapes import SHAPES
    >>> recipe = recipes.load("smollm2-cpu", ["bits=8", "schedule.micro_rows=1"])
    >>> fits(recipe, SHAPES["llama-13b"], 11_500_000_000)[0]
    False
    """
    room = available_bytes * (1 - MARGIN)
    needed = of_recipe(recipe, shape, device, dtype)
    if needed.peak <= room:
        rows = "; the rows of growth.tokenizer are not counted" if recipe.growth.tokenizer else ""
        return True, f"needs {needed.peak / 1e9:.1f} of {available_bytes / 1e9:.1f} GB{rows}"
    largest = f"{needed.largest.name}: {needed.largest.bytes / 1e9:.1f} GB"
    start = f"needs {needed.peak / 1e9:.1f} GB, {available_bytes / 1e9:.1f} are there ({largest}); "
    for smaller in _smaller(recipe):
        peak = of_recipe(smaller, shape, device, dtype).peak
        if peak <= room:
            old, new = _settings(recipe), _settings(smaller)
            changes = " ".join(f"--set {key}={new[key]}" for key in new if new[key] != old[key])
            return False, f"{start}{peak / 1e9:.1f} GB with {changes}"
    return False, start + "no setting makes it fit: choose a smaller base"


def serves(
    recipe: Recipe, shape: Shape, tokens: int, available_bytes: int, device: str = "cuda", dtype: str = "float16"
) -> tuple[bool, str]:
    """Whether the recipe's base answers one conversation of `tokens` tokens, and one line: its need, or what to change.

    >>> from cvlib import recipes
    >>> from cvlib.shapes import SHAPES
    >>> recipe = recipes.load("smollm2-cpu", ["bits=8"])
    >>> serves(recipe, SHAPES["llama-7b"], 1024, 6_000_000_000)
    (False, 'needs 8.2 GB, 6.0 are there; 5.1 GB with --set bits=4')
    """
    room, chosen = available_bytes * (1 - MARGIN), dtype if recipe.dtype == "auto" else recipe.dtype

    def peak(bits: int, tokens: int) -> int:
        return serving(shape, bits, tokens, dtype=chosen, device=device).peak

    needed = peak(recipe.bits, tokens)
    if needed <= room:
        return True, f"needs {needed / 1e9:.1f} of {available_bytes / 1e9:.1f} GB"
    start = f"needs {needed / 1e9:.1f} GB, {available_bytes / 1e9:.1f} are there; "
    for bits in (bits for bits in (8, 4) if bits < recipe.bits):
        if peak(bits, tokens) <= room:
            return False, f"{start}{peak(bits, tokens) / 1e9:.1f} GB with --set bits={bits}"
    longest = int((room - peak(4, 0)) / (peak(4, 1) - peak(4, 0)))  # every token costs the same
    if longest < 1:
        return False, start + "no setting makes it fit: choose a smaller base"
    return False, f"{start}{peak(4, longest) / 1e9:.1f} GB with --set bits=4 --serve {longest}"


def _smaller(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with cheaper settings, in the order of their price: micro-batch, checkpointing, length, bits."""
    plan, length = recipe.schedule, recipe.data.max_length
    options = product(
        [bits for bits in (16, 8, 4) if bits <= recipe.bits],
        [length // part for part in (1, 2, 4) if length // part >= min(length, 256)],
        sorted({plan.gradient_checkpointing, True}),
        [rows for rows in range(plan.micro_rows, 0, -1) if plan.batch_rows % rows == 0],
    )
    for bits, max_length, checkpointing, micro_rows in options:
        schedule = replace(plan, micro_rows=micro_rows, gradient_checkpointing=checkpointing)
        yield replace(recipe, bits=bits, data=replace(recipe.data, max_length=max_length), schedule=schedule)


def _settings(recipe: Recipe) -> dict[str, str]:
    """What `_smaller` changes, as the command line spells it."""
    return {
        "schedule.micro_rows": str(recipe.schedule.micro_rows),
        "schedule.gradient_checkpointing": str(recipe.schedule.gradient_checkpointing).lower(),
        "data.max_length": str(recipe.data.max_length),
        "bits": str(recipe.bits),
    }
