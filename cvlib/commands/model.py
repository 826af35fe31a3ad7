"""`cvlib train`, `evaluate`, `export`, `chat`: from a recipe to an adapter, its scores, one file, a conversation."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from cvlib import InputError
from cvlib.commands import command, natural, say


def register(group) -> None:
    """Add these commands to the command line."""
    training = command(group, "train", train, "train an adapter as a recipe says", epilog=train_help())
    training.add_argument("recipe", metavar="RECIPE", help="a recipe's name or a .yaml file")
    training.add_argument("-o", "--out", type=Path, help="the run's folder (default: runs/RECIPE)")
    training.add_argument(
        "--init-adapter", type=Path, metavar="DIR", help="start from a trained adapter's weights, with a new schedule"
    )
    setting_option(training, "change one value of the recipe")

    scoring = command(group, "evaluate", evaluate, "bits per byte and answer language on held-out rows")
    model_options(scoring)
    scoring.add_argument(
        "--rows", nargs="+", type=Path, metavar="FILE", help="row files; their held-out split is scored"
    )
    scoring.add_argument("--limit", type=natural, help="score at most so many rows of each file")
    scoring.add_argument("--answers", type=natural, default=0, metavar="N", help="also answer N questions of each file")

    leaving = command(group, "export", export, "one model folder or GGUF file out of a base and its adapters")
    leaving.add_argument("model", nargs="?", help="asset, hub id or folder (default: the adapter's base)")
    leaving.add_argument(
        "--adapter", nargs="+", type=Path, default=[], metavar="DIR", help="adapters to merge, one over the other"
    )
    leaving.add_argument("--to", choices=("hf", "gguf"), required=True, help="safetensors folder, or for llama.cpp")
    leaving.add_argument(
        "--quant", choices=("f16", "q8_0", "q4_0"), default="f16", help="the GGUF's format (default: f16)"
    )
    leaving.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="the folder or file to write")
    leaving.add_argument("--force", action="store_true", help="replace OUT if it exists")

    talking = command(group, "chat", chat, "talk to a model in the terminal")
    model_options(talking)
    setting_option(talking, "decoding, such as temperature=0")


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


def chosen(options: argparse.Namespace, overrides: list[str] | tuple[str, ...] = ()):
    """The recipe, model and tokenizer that the model options name; an adapter brings the recipe it was trained with."""
    from cvlib import loading, recipes

    if options.adapter:
        loading.read_adapter(options.adapter)
    recipe = recipes.load(options.adapter / "recipe.yaml" if options.adapter else "smollm2-cpu", overrides)
    base, bits = options.model or recipe.base, options.bits or recipe.bits
    model, tokenizer = loading.load(base, bits, recipe.dtype, options.adapter)
    return recipe, model, tokenizer


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


def export(options: argparse.Namespace) -> None:
    """`cvlib export`: merge in float32, then write; a GGUF is made from a merged folder that is thrown away."""
    from cvlib import export, loading

    if not (options.model or options.adapter):
        raise InputError("nothing to export; name a model, or --adapter DIR")
    if options.out.exists() and not options.force:
        raise InputError(f"{options.out}: exists already; choose another name, or replace it with --force")
    options.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    base = options.model or loading.read_adapter(options.adapter[0]).get("base_model_name_or_path")
    if options.to == "hf":
        merged = export.merge(base, options.adapter, options.out, force=options.force)
        say(options, dataclasses.asdict(merged) | {"folder": str(merged.folder)}, str(merged))
        return
    with tempfile.TemporaryDirectory(dir=options.out.absolute().parent, prefix=".merging-") as folder:
        merged = export.merge(base, options.adapter, Path(folder) / options.out.stem, dtype="float32")
        size = export.gguf(merged.folder, options.out, options.quant, options.force)
    data = {"out": str(options.out), "quant": options.quant, "bytes": size}
    say(options, data, f"{options.out}: {size / 1e6:,.1f} MB, {options.quant}; merged in float32")


def chat(options: argparse.Namespace) -> None:
    """`cvlib chat`"""
    recipe, model, tokenizer = chosen(options, [f"decoding.{item}" for item in options.set])
    from cvlib.chat import Chat, terminal

    talk = Chat(model, tokenizer, recipe.template, recipe.decoding)
    stream = sys.stderr if options.json else sys.stdout  # the transcript is alone on standard output

    def write(text: str) -> None:
        print(text, end="", flush=True, file=stream)

    def ask(prompt: str) -> str:
        write(prompt)  # input() itself would write it to standard output
        return input()

    terminal(talk, write, ask if options.json else input)
    if options.json:
        say(options, [turn.row() for turn in talk.history], "")
