"""`cvlib train`: from a recipe to an adapter."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from cvlib.commands import command, say
from cvlib.commands.choosing import setting_option


def register(group) -> None:
    """Add this command to the command line."""
    training = command(group, "train", train, "train an adapter as a recipe says", epilog=train_help())
    training.add_argument("recipe", metavar="RECIPE", help="a recipe's name or a .yaml file")
    training.add_argument("-o", "--out", type=Path, help="the run's folder (default: runs/RECIPE)")
    training.add_argument(
        "--init-adapter", type=Path, metavar="DIR", help="start from a trained adapter's weights, with a new schedule"
    )
    setting_option(training, "change one value of the recipe")


def train_help() -> str:
    """The recipes and every key `--set` can change, read off the dataclasses."""
    from cvlib import recipes

    lines = [f"recipes: {', '.join(recipes.names())}", "", "keys for --set, with their defaults:"]
    for item in dataclasses.fields(recipes.Recipe):
        if dataclasses.is_dataclass(item.default_factory):
            lines += [_key(sub, f"{item.name}.") for sub in dataclasses.fields(item.default_factory)]
        else:
            lines.append(_key(item, ""))
    return "\n".join([*lines, "", "example: cvlib train smollm2-cpu --set schedule.epochs=1 -o runs/quick"])


def _key(item: dataclasses.Field, prefix: str) -> str:
    default = item.default_factory() if item.default is dataclasses.MISSING else item.default
    about = item.metadata["help"].replace("%", "%%")
    return f"  {prefix + item.name + '=' + str(default).replace(' ', ''):<42} {about}"


def train(options: argparse.Namespace) -> None:
    """`cvlib train`"""
    from cvlib import recipes

    recipe = recipes.load(options.recipe, options.set)
    out = options.out or Path("runs") / Path(options.recipe).stem
    from cvlib import training

    run = training.train(recipe, out, init=options.init_adapter)
    result = {
        "folder": str(run.folder),
        "steps": len(run.steps),
        "first_loss": run.losses[0],
        "last_loss": run.losses[-1],
    }
    result |= {"seconds": round(run.seconds, 1), "adapter_bytes": run.adapter_bytes}
    text = (
        f"{len(run.steps)} steps in {run.seconds:.0f} s, loss {run.losses[0]:.3f} → {run.losses[-1]:.3f}, adapter of "
        f"{run.adapter_bytes / 1e6:.1f} MB in {run.folder}\ntalk to it: cvlib chat --adapter {run.folder}"
    )
    say(options, result, text)
