"""What the commands that work on a model share: the options that choose it, and loading what they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from cvlib import InputError


def model_options(command: argparse.ArgumentParser) -> None:
    """The options that choose a model, the same in every command."""
    command.add_argument(
        "model", nargs="?", help="asset, hub id or folder (default: the adapter's base, or smollm2-135m)"
    )
    command.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter to lay over the model")
    command.add_argument(
        "--bits", type=int, choices=(16, 8, 4), help="precision of the weights (default: the adapter's)"
    )


def recipe_of(options: argparse.Namespace, overrides: list[str] | tuple[str, ...] = ()):
    """The recipe that belongs to the model options: the one the adapter was trained with, or the running model's."""
    from cvlib import checkpoints, loading, recipes

    if options.adapter:
        if not options.adapter.exists():  # it may still be in training
            checkpoints.refuse_unfinished(options.adapter)
        loading.read_adapter(options.adapter)
    return recipes.load(options.adapter / "recipe.yaml" if options.adapter else "smollm2-cpu", overrides)


def chosen(options: argparse.Namespace, recipe):
    """The model and tokenizer that the model options name, and their recipe where they name none."""
    from cvlib import loading

    return loading.load(options.model or recipe.base, options.bits or recipe.bits, recipe.dtype, options.adapter)


def engine(options: argparse.Namespace, recipe):
    """What answers: llama.cpp for a GGUF file, transformers for everything else."""
    from cvlib import engines, server

    if not (str(options.model).endswith(".gguf") or server.is_gguf(options.model or "")):
        return engines.Transformers(*chosen(options, recipe), recipe.template)
    if options.adapter or options.bits:
        raise InputError(f"{options.model}: a GGUF file is whole; leave --adapter and --bits out, or `cvlib export` it")
    return engines.LlamaCpp(options.model)
