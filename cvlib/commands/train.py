"""`cvlib train`: from a recipe to an adapter."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cvlib import InputError, recipes
from cvlib.commands import command, explained, place, say, setting_option

EXAMPLES = """\
examples:
  cvlib train smollm2-cpu -o runs/mine
  cvlib train smollm2-cpu --set 'data.train=[mine.jsonl]' --set schedule.epochs=1 -o runs/quick
  cvlib train --resume runs/mine
  cvlib train smollm2-cpu --init-adapter runs/mine -o runs/more"""


def register(group) -> None:
    """Add this command to the command line."""
    keys = recipes.keys()
    epilog = f"recipes: {', '.join(recipes.names())}\n\n{explained(keys)}\n\n{EXAMPLES}"
    training = command(group, "train", train, "train an adapter as a recipe says", epilog)
    training.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe's name or a .yaml file")
    training.add_argument("-o", "--out", type=place, help="the run's folder (default: runs/RECIPE)")
    start = training.add_mutually_exclusive_group()
    start.add_argument(
        "--init-adapter", type=place, metavar="DIR", help="start from a trained adapter's weights, with a new schedule"
    )
    start.add_argument("--resume", type=place, metavar="RUN", help="go on with an interrupted run, exactly as it was")
    setting_option(training, keys, "change one value of the recipe")


def train(options: argparse.Namespace) -> int | None:
    """`cvlib train`: of several processes only the first one speaks."""
    recipe, out = planned(options)
    from cvlib import checkpoints, training

    try:
        run = training.train(recipe, out, init=options.init_adapter, resume=bool(options.resume))
    except KeyboardInterrupt as stop:
        if checkpoints.is_first():
            print(f"\n{options.name}: {stop or 'stopped'}", file=sys.stderr)
        return 130
    except InputError:
        if checkpoints.is_first():
            raise
        return 2
    if checkpoints.is_first():
        report(options, run)
    return None


def planned(options: argparse.Namespace):
    """The recipe and the run's folder, as asked or as an interrupted run has them."""
    if not options.resume:
        if not options.recipe:
            raise InputError(f"no recipe; choose one of {', '.join(recipes.names())} or name a .yaml file")
        return recipes.load(options.recipe, options.set), options.out or Path("runs") / Path(options.recipe).stem
    from cvlib import checkpoints

    if options.out and checkpoints.finished(options.out) != checkpoints.finished(options.resume):
        raise InputError(f"--out {options.out}: a resumed run stays where it is; leave --out away")
    checkpoints.begun(options.resume)  # refuses what is no interrupted run
    source = options.recipe or checkpoints.unfinished(options.resume) / "recipe.yaml"
    return recipes.load(source, options.set), options.resume


def report(options: argparse.Namespace, run) -> None:
    """Say what was trained and where it lies."""
    result = {
        "folder": str(run.folder),
        "steps": len(run.steps),
        "rows": run.rows,
        "first_loss": run.losses[0],
        "last_loss": run.losses[-1],
    }
    result |= {"seconds": round(run.seconds, 1), "adapter_bytes": run.adapter_bytes}
    text = (
        f"{len(run.steps)} steps over {run.rows:,} rows in {run.seconds:.0f} s, loss {run.losses[0]:.3f} → "
        f"{run.losses[-1]:.3f}, adapter of {run.adapter_bytes / 1e6:.1f} MB in {run.folder}\n"
    )
    if run.losses[-1] > run.losses[0]:
        text += "the loss has not fallen: train for longer, or lower schedule.learning_rate\n"
    text += f"talk to it: cvlib chat --adapter {run.folder}"
    say(options, result, text)
