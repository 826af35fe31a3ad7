"""Useful tokens per second of training: ours beside two ways of arranging the same rows.

Useful is an answer's token that is learnt; padding, prompts and answers cut away are not. The same rows, model, adapter
and optimiser for every arm, in one process, the arms in turn so that whatever else the machine does hits all alike.

* ours: the default. Conversations end to end without padding, attention within each, logits at labelled positions only.
* vicuna: Chinese-Vicuna's script. Every row cut and padded to 256 tokens, four at once, the prompt in the loss.
* trl: TRL's `SFTTrainer`, packing conversations into 512 tokens, loss on the answers.

    python benchmarks/bench_train_vs_peers.py                    # stores results/train-vs-peers.json
    python benchmarks/bench_train_vs_peers.py --budget smoke     # one short round, printed and not kept
"""

import random
import sys
import tempfile
import time

import study
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from cvlib import adapters, attention, loading, recipes, training
from cvlib.batching import IGNORE_INDEX, Example, flatten

NAME, CUT, PACKED, ROWS, ROUNDS, SEED = "train-vs-peers", 256, 512, 40, 4, 0
FILES = ["data_samples/belle_zh.jsonl", "data_samples/guanaco_multi.jsonl", "data_samples/alpaca_en.jsonl"]


class Clock(TrainerCallback):
    """Processor and wall seconds of the last run, steps only."""

    def on_train_begin(self, *_, **__):
        self.start = time.process_time(), time.perf_counter()

    def on_train_end(self, *_, **__):
        self.processor, self.wall = time.process_time() - self.start[0], time.perf_counter() - self.start[1]


def prepared(recipe, kernel):
    """The running model with a fresh adapter of the recipe."""
    model, tokenizer = loading.load(recipe.base, dtype=recipe.dtype)
    model.set_attn_implementation(kernel)
    torch.manual_seed(SEED)
    return adapters.add_adapter(model, recipe.adapter, recipe.base), tokenizer


def settings(folder, rows):
    """What the two peers share: eight rows a step, our rate, nothing saved, nothing reported."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 8 // rows,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "seed": SEED,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,  # the model computes in its own format, as ours does
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }


def ours(examples, recipe, folder, clock):
    """`cvlib.training` as `cvlib train` runs it."""
    model, _ = prepared(recipe, attention.NAME)
    options = {"data_collator": flatten, "callbacks": [clock]}
    chosen = training.arguments(recipe, folder, model)
    return training.AnswerTrainer(
        recipe=recipe, tokenizer=None, model=model, args=chosen, train_dataset=examples, **options
    )


def vicuna(examples, recipe, folder, clock):
    """Cut at 256, padded to 256, every token of prompt and answer a label, padding seen by attention."""
    model, tokenizer = prepared(recipe, "sdpa")

    def batch(rows):
        ids = [row.input_ids[:CUT] for row in rows]
        padded = torch.tensor([row + [tokenizer.pad_token_id] * (CUT - len(row)) for row in ids])
        labels = torch.tensor([row + [IGNORE_INDEX] * (CUT - len(row)) for row in ids])
        return {"input_ids": padded, "labels": labels, "attention_mask": torch.ones_like(padded)}

    chosen = TrainingArguments(**settings(folder, 4), remove_unused_columns=False)
    return Trainer(model=model, args=chosen, train_dataset=examples, data_collator=batch, callbacks=[clock])


def trl(examples, recipe, folder, clock):
    """One packed row of 512 tokens, about three conversations, at once."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = prepared(recipe, "sdpa")
    masks = [[int(label != IGNORE_INDEX) for label in row.labels] for row in examples]
    rows = Dataset.from_dict({"input_ids": [row.input_ids for row in examples], "assistant_masks": masks})
    options = settings(folder, 1) | {"gradient_accumulation_steps": 3}  # about eight conversations a step
    chosen = SFTConfig(**options, max_length=PACKED, packing=True, gradient_checkpointing=False)
    return SFTTrainer(model=model, args=chosen, train_dataset=rows, processing_class=tokenizer, callbacks=[clock])


def useful(examples: list[Example], longest: int) -> int:
    """Answers' tokens within the first `longest` tokens of their rows.

    >>> useful([Example([1, 2, 3, 4], [-100, -100, 3, 4])], longest=3)
    1
    """
    return sum(label != IGNORE_INDEX for row in examples for label in row.labels[:longest])


def measured(rows, rounds):
    """Each arm in turn, `rounds` times, after one run that warms up: one result an arm and round."""
    recipe = recipes.load("smollm2-cpu", ["schedule.learning_rate=1e-3", "schedule.epochs=1", "schedule.save_every=0"])
    tokenizer = loading.read_tokenizer(loading.resolve(recipe.base))
    pool = training.prepare(training.training_rows(FILES), tokenizer, recipe)
    examples = random.Random(SEED).sample([row for row in pool if not row.cut], rows)
    everything, kept = useful(examples, PACKED), useful(examples, CUT)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        arms = {}
        for arm in (ours, vicuna, trl):
            clock = Clock()
            arms[arm.__name__] = arm(examples, recipe, folder, clock), clock
            arms[arm.__name__][0].remove_callback(PrinterCallback)
        for turn in range(rounds + 1):
            for name, (trainer, clock) in arms.items():
                trainer.train()
                learnt = kept if name == "vicuna" else everything
                row = {"arm": name, "round": turn, "useful": learnt, "lost": round(1 - learnt / everything, 4)}
                row |= {"cpu_seconds": round(clock.processor, 2), "wall_seconds": round(clock.wall, 2)}
                print(row, flush=True)
                results += [row] * (turn > 0)
    return results


def ratios(results):
    """Ours over each peer in useful tokens per processor and wall second: mean over the rounds, and its interval."""
    found = {}
    for peer in ("vicuna", "trl"):
        for clock in ("cpu_seconds", "wall_seconds"):
            speeds = [[row["useful"] / row[clock] for row in results if row["arm"] == arm] for arm in ("ours", peer)]
            quotients = [mine / theirs for mine, theirs in zip(*speeds, strict=True)]
            found[f"ours / {peer}, {clock}"] = [round(value, 3) for value in study.over_seeds(quotients)]
    return found


def main():
    options = study.options(__doc__)
    smoke = options.budget == "smoke"
    results = measured(8 if smoke else ROWS, 1 if smoke else ROUNDS)
    about = ratios(results)
    print(about)
    if not smoke:
        study.save(NAME, results, base="smollm2-135m", cut=CUT, packed=PACKED, rows_each=ROWS, ratios=about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
