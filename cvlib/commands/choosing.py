"""What the commands that work on a model share: the options that choose it, and loading what they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from cvlib import InputError


def setting_option(command: argparse.ArgumentParser, about: str) -> None:
    """`--set KEY=VALUE`, as often as wanted."""
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=about)


def model_options(command: argparse.ArgumentParser) -> None:
    """The options that choose a model, the same in every command."""
    command.add_argument(
        "model", nargs="?", help="asset, hub id or folder (default: the adapter's base, or smollm2-135m)"
    )
    command.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter to lay over the model")
    command.add_argument(
        "--bits", type=int, choices=(16, 8, 4), help="precision of the weights (default: the adapter's)"
    )


def chosen(options: argparse.Namespace, overrides: list[str] | tuple[str, ...] = ()):
    """The recipe, model and tokenizer that the model options name; an adapter brings the recipe it was trained with."""
    from cvlib import loading, recipes

    if options.adapter:
        loading.read_adapter(options.adapter)
    recipe = recipes.load(options.adapter / "recipe.yaml" if options.adapter else "smollm2-cpu", overrides)
    base, bits = options.model or recipe.base, options.bits or recipe.bits
    model, tokenizer = loading.load(base, bits, recipe.dtype, options.adapter)
    return recipe, model, tokenizer


def engine(options: argparse.Namespace, overrides: list[str] | tuple[str, ...] = ()):
    """What answers, and its decoding: llama.cpp for a GGUF file, transformers for everything else."""
    from cvlib import engines, recipes

    if not str(options.model).endswith(".gguf"):
        recipe, model, tokenizer = chosen(options, overrides)
        return engines.Transformers(model, tokenizer, recipe.template), recipe.decoding
    if options.adapter or options.bits:
        raise InputError(f"{options.model}: a GGUF file is whole; leave --adapter and --bits out, or `cvlib export` it")
    decoding = recipes.load("smollm2-cpu", overrides).decoding
    return engines.LlamaCpp(options.model), decoding
