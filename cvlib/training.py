"""Recipe in, adapter folder out.

`transformers.Trainer` runs the loop: order, schedule, accumulation, several processes. We add what decides
the result: the loss (`evaluation.token_losses`, over answers only), float32 adapters over frozen weights of any
precision, and three guards that turn a silent failure into a stop:

* a trainable parameter without a gradient (traps 14 and 21: the loss prints, nothing learns),
* a loss that is not finite (trap 9),
* an adapter whose B is all zero, which would be saved and change nothing (trap 7).

A run folder holds the adapter (`adapter_config.json`, `adapter_model.safetensors`), the recipe it was made with
(`recipe.yaml`, read again by chat and evaluation) and `metrics.jsonl`, one line per optimiser step.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from cvlib import ROOT, InputError, loading, sources, texts, vocabulary
from cvlib.adapters import add_adapter, continue_adapter, grow, two_rates
from cvlib.batching import Example, blocks, encode, flatten
from cvlib.evaluation import token_losses
from cvlib.messages import Conversation, read, split
from cvlib.recipes import Recipe
from cvlib.templates import render


@dataclass(frozen=True)
class Run:
    """What a training run left behind: its folder, one entry per optimiser step, and the model, still loaded."""

    folder: Path
    steps: list[dict]
    seconds: float
    model: torch.nn.Module
    tokenizer: object

    @property
    def losses(self) -> list[float]:
        """Mean loss of the answers' tokens at each step, in nats."""
        return [step["loss"] for step in self.steps]

    @property
    def adapter_bytes(self) -> int:
        """Size of the adapter's weights on disk."""
        return (self.folder / "adapter_model.safetensors").stat().st_size


def train(recipe: Recipe, out: str | Path, loaded=None, init: str | Path | None = None) -> Run:
    """Train an adapter as the recipe says and write it to the folder `out`.

    Args:
        recipe: what to train on what, and how.
        out: the run's folder; it must not exist yet, and appears only when the run is complete.
        loaded: a `(model, tokenizer)` pair from `loading.load`, to save loading it again.
        init: an adapter to start from, as from a general one to a domain's. Its weights are taken over and nothing
            else: steps, learning rate and order begin anew. (Resuming would bring the old plan along, trap 11.)

    Raises:
        InputError: an existing folder, rows that cannot be used, or a run that would not learn.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already; name another folder or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_machine(recipe)
    set_seed(recipe.schedule.seed)
    model, tokenizer = loaded or loading.load(recipe.base, recipe.bits, recipe.dtype)
    own = grown_tokenizer(recipe, init)
    tokenizer = loading.read_tokenizer(own) if own else tokenizer
    examples = training_examples(recipe, tokenizer)
    part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    checkpointing = recipe.schedule.gradient_checkpointing
    steps = Steps(part / "metrics.jsonl")
    try:
        if init:
            model = continue_adapter(model, init, recipe.adapter, recipe.base, checkpointing)
        else:
            model = add_adapter(model, recipe.adapter, recipe.base, checkpointing, grow(model, recipe))
        started = time.perf_counter()
        trainer = AnswerTrainer(
            model=model,
            args=arguments(recipe, part, model),
            train_dataset=examples,
            data_collator=flatten,
            callbacks=[steps, Guard()],
            recipe=recipe,
        )
        trainer.remove_callback(PrinterCallback)  # the progress bar says it already
        trainer.train()
        seconds = time.perf_counter() - started
        save(model, recipe, part)
        if own:
            tokenizer.save_pretrained(part)
        os.chmod(part, 0o755)
        os.replace(part, out)
    finally:
        steps.close()
        shutil.rmtree(part, ignore_errors=True)
    return Run(out, steps.rows, seconds, model, tokenizer)


def check_machine(recipe: Recipe) -> None:
    """Refuse what this machine's hardware cannot do, before anything is loaded."""
    card = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if not card and recipe.schedule.optimizer != "adamw":
        raise InputError(
            f"schedule.optimizer is {recipe.schedule.optimizer!r}, but there is no NVIDIA card here; choose adamw"
        )
    if card and card < (8, 0) and recipe.dtype == "bfloat16":
        raise InputError("dtype is 'bfloat16', but this card only emulates it; choose auto, which is float16 here")
    if card and card < (7, 5) and recipe.bits == 8:  # trap 9
        raise InputError("bits is 8, but this card is older than Turing and has no int8 cores; choose 4 or 16")


def grown_tokenizer(recipe: Recipe, init: str | Path | None) -> str:
    """The folder of the grown tokenizer: what the adapter `init` brings, or else what the recipe names; "" for none."""
    asked, brought = recipe.growth.tokenizer, str(init) if init and loading.has_tokenizer(init) else ""
    if init and asked and not (brought and vocabulary.load(asked).pieces == vocabulary.load(brought).pieces):
        raise InputError(
            f"growth.tokenizer is {asked!r}, but {init} was not trained with it; leave it empty to go on as before"
        )
    return brought or asked


def training_rows(files: Iterable[str]) -> list[Conversation]:
    """Conversations of the training split of every file or source named in a recipe."""
    rows = [
        row for name in files for row in split(sources.rows(name) if name in sources.names() else read(locate(name)))[0]
    ]
    if not rows and files:
        raise InputError(f"{', '.join(files)}: every row falls into the held-out split; add rows to train on")
    return rows


def training_examples(recipe: Recipe, tokenizer) -> list[Example]:
    """All a recipe trains on: its conversations, and its plain text in blocks."""
    rows, documents = recipe.data.train, [line for name in recipe.data.text for line in texts.lines(name)]
    if not rows and not documents:
        raise InputError("data.train and data.text are empty; name at least one file of rows or of text")
    learnt = blocks(texts.split(documents)[0], tokenizer, recipe.data.max_length)
    if documents and not learnt:
        raise InputError(f"{', '.join(recipe.data.text)}: every line falls into the held-out split; give more text")
    return (prepare(training_rows(rows), tokenizer, recipe) if rows else []) + learnt


def locate(file: str) -> Path:
    """A row file named in a recipe: relative to the current folder, else to the repository."""
    inside = ROOT / file
    return inside if inside.exists() and not Path(file).exists() else Path(file)


def prepare(conversations: Iterable[Conversation], tokenizer, recipe: Recipe) -> list[Example]:
    """Tokens and labels of every conversation that keeps at least one trained token."""
    rendered = (render(row, recipe.template, tokenizer.eos_token) for row in conversations)
    encoded = (encode(segments, tokenizer, recipe.data.max_length) for segments in rendered)
    examples = [example for example in encoded if example is not None]
    if not examples:
        raise InputError(f"no answer fits into data.max_length={recipe.data.max_length} tokens; allow longer rows")
    return examples


def arguments(recipe: Recipe, folder: Path, model) -> TrainingArguments:
    """The recipe's schedule in Trainer's words. Adapters are float32, so float16 bases need a gradient scaler."""
    plan = recipe.schedule
    devices = int(os.environ.get("WORLD_SIZE", 1))
    accumulation, left_over = divmod(plan.batch_rows, plan.micro_rows * devices)
    if left_over:
        raise InputError(
            f"schedule.batch_rows is {plan.batch_rows}; choose a multiple of micro_rows × processes, "
            f"{plan.micro_rows} × {devices}"
        )
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=plan.micro_rows,
        gradient_accumulation_steps=accumulation,
        learning_rate=plan.learning_rate,
        num_train_epochs=plan.epochs,
        max_steps=plan.max_steps or -1,
        lr_scheduler_type=plan.scheduler,
        warmup_steps=plan.warmup_steps or plan.warmup_ratio,  # below 1: a share of the run
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.max_grad_norm,
        fp16=model.dtype == torch.float16 and model.device.type == "cuda",
        seed=plan.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # Trainer would print an earlier loss in place of one that is not finite
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


class AnswerTrainer(Trainer):
    """Trainer with the book's loss: the mean over all labelled tokens of a step, on all its micro-batches and ranks."""

    def __init__(self, recipe: Recipe, **options):
        super().__init__(**options)
        self.recipe = recipe

    def create_optimizer(self, model=None):
        plan, rows = self.recipe.schedule, self.recipe.growth
        rates = plan.learning_rate, rows.learning_rate
        self.optimizer = two_rates(model or self.model, *rates, plan.weight_decay, plan.optimizer)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = token_losses(model, inputs).sum() / num_items_in_batch
        return loss * self.accelerator.num_processes  # gradients are averaged over ranks afterwards


class Guard(TrainerCallback):
    """Stop a run that looks alive and learns nothing."""

    def on_train_begin(self, args, state, control, **_):
        if 2 * args.warmup_steps > state.max_steps and args.warmup_steps >= 1:  # trap 13
            raise InputError(
                f"schedule.warmup_steps is {args.warmup_steps:.0f}, but the run has {state.max_steps} steps; choose "
                "fewer, or 0 to climb for schedule.warmup_ratio of them"
            )

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        missing = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
        if missing:
            raise InputError(
                f"{len(missing)} trainable parameters got no gradient (first: {missing[0]}); load the base with "
                "cvlib.loading, which keeps quantised and checkpointed models trainable"
            )

    def on_log(self, args, state, control, logs=None, **_):
        loss = (logs or {}).get("loss")
        if loss is not None and not 0 < loss < float("inf"):
            raise InputError(
                f"the loss is {loss} at step {state.global_step}; lower schedule.learning_rate, "
                "and on cards older than Turing use bits: 16"
            )


class Steps(TrainerCallback):
    """One line per optimiser step into `metrics.jsonl`, and a progress bar with loss and tokens per second."""

    def __init__(self, path: Path):
        self.path, self.rows, self.bar = path, [], None

    def on_train_begin(self, args, state, control, **_):
        from tqdm import tqdm

        self.started = time.perf_counter()
        self.bar = tqdm(total=state.max_steps, desc="training", unit="step") if state.is_world_process_zero else None

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        exact = state.log_history[-1]
        row = {"step": state.global_step, "loss": exact["loss"], "learning_rate": exact["learning_rate"]}
        row["seconds"] = round(time.perf_counter() - self.started, 3)
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def close(self) -> None:
        """End the progress bar's line, also when the run was stopped."""
        if self.bar is not None:
            self.bar.close()


def save(model, recipe: Recipe, folder: Path) -> None:
    """Write the adapter and its recipe into `folder`, after checking that the adapter changes something (trap 7)."""
    learnt = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    if not learnt or not any(weight.any() for weight in learnt):
        raise InputError(
            "every B of the adapter is zero, so it would change nothing; train for more steps or with "
            "schedule.warmup_ratio=0: the first step of a warm-up has rate 0"
        )
    if not all(weight.isfinite().all() for weight in learnt):
        raise InputError("the adapter holds numbers that are not finite; lower schedule.learning_rate")
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    text = yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
