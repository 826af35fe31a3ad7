"""Study 00: the adapter that later chapters start from, three seeds.

Trains recipe `smollm2-zh` with three seeds, measures held-out Chinese and English and the language of the answers,
keeps the answers to fixed questions for a blind mark, and ships the first seed's adapter in 16 bits.

    python benchmarks/00_first_light.py                          the whole study
    python benchmarks/00_first_light.py --steps 2 --out smoke    a look at whether it runs
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import study
from safetensors.torch import load_file, save_file

from cvlib import ROOT, evaluation, generation, loading, messages, recipes, training

SEEDS = (42, 43, 44)
QUESTIONS = 24
SHIPPED = ROOT / "data_samples" / "adapters" / "smollm2-zh"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="fewer steps than the recipe")
    parser.add_argument("--out", default="00-first-light", help="name of the result file")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="only this seed")
    options = parser.parse_args()
    overrides = [f"schedule.max_steps={options.steps}"] if options.steps else []
    recipe = recipes.load("smollm2-zh", overrides)
    held_out = {
        "zh": messages.split(messages.read(ROOT / "data_samples/belle_zh.jsonl"))[1],
        "en": messages.split(messages.read(ROOT / "data_samples/alpaca_en.jsonl"))[1],
    }
    showcase = list(json.loads((ROOT / "data_samples/showcase.json").read_text(encoding="utf-8")))
    asked = [[messages.Message("user", text)] for text in showcase]
    asked += [row[:-1] for row in held_out["zh"] if len(row) == 2][: QUESTIONS - len(asked)]

    about = kept(options.out) or before(recipe, held_out, asked)
    for seed in options.seed or SEEDS:
        if any(row["seed"] == seed for row in study.load(options.out)):
            continue
        run = one_seed(recipe, seed)
        after, answers = measure(run.model, run.tokenizer, recipe, held_out, asked)
        about = kept(options.out) or about  # seeds may run side by side, as processes of their own
        row = {"seed": seed, "after": after, "seconds": run.seconds, "losses": [round(x, 4) for x in run.losses]}
        rows = sorted([*study.load(options.out), row], key=lambda row: row["seed"])
        if seed == SEEDS[0]:
            about["answers"]["after"] = answers
            if not options.steps:
                ship(run.folder)
        about |= {"steps": len(run.steps), "batch_rows": recipe.schedule.batch_rows, "summary": summary(rows)}
        study.save(options.out, rows, **about)


def before(recipe: recipes.Recipe, held_out: dict, asked: list) -> dict:
    """The untouched model's numbers and answers."""
    model, tokenizer = loading.load(recipe.base, recipe.bits)
    numbers, answers = measure(model, tokenizer, recipe, held_out, asked)
    return {"before": numbers, "questions": [row[-1].content for row in asked], "answers": {"before": answers}}


def kept(name: str) -> dict:
    """What an unfinished run of this study stored beside its rows; nothing if there is none."""
    path = study.RESULTS / f"{name}.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: stored[key] for key in ("before", "questions", "answers", "marks") if key in stored}


def one_seed(recipe: recipes.Recipe, seed: int) -> training.Run:
    recipe.schedule.seed = seed
    out = ROOT / "runs" / f"study-00-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    return training.train(recipe, out)


def measure(model, tokenizer, recipe: recipes.Recipe, held_out: dict, asked: list) -> tuple[dict, list[str]]:
    """Bits per byte of each set with its interval over rows, share of Chinese letters, and the answers."""
    scores = {name: evaluation.score(model, tokenizer, rows, recipe.template) for name, rows in held_out.items()}
    decoding = recipes.Decoding(temperature=0, repetition_penalty=1.1, max_new_tokens=96)
    answers = generation.answers(model, tokenizer, asked, recipe.template, decoding)
    numbers = {name: score.bits_per_byte for name, score in scores.items()}
    numbers |= {f"{name}_interval": score.interval() for name, score in scores.items()}
    return numbers | {"han": evaluation.han_share(answers)}, answers


def summary(rows: list[dict]) -> dict:
    """Mean and 95 % interval over seeds of every number."""
    over = {key: study.over_seeds([row["after"][key] for row in rows]) for key in ("zh", "en", "han")}
    return {key: dict(zip(("mean", "low", "high"), values, strict=True)) for key, values in over.items()}


def ship(folder: Path) -> None:
    """The adapter in 16 bits, small enough for the repository, with the recipe it was made with."""
    import torch

    shutil.rmtree(SHIPPED, ignore_errors=True)
    SHIPPED.mkdir(parents=True)
    for name in ("adapter_config.json", "recipe.yaml"):
        shutil.copy(folder / name, SHIPPED)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}, SHIPPED / "adapter_model.safetensors"
    )


if __name__ == "__main__":
    main()
