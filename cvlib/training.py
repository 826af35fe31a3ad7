"""Recipe in, adapter folder out.

`transformers.Trainer` runs the loop: order, schedule, accumulation, several processes. We add what decides
the result: the loss (`evaluation.token_losses`, over answers and plain text), float32 adapters over frozen weights of
any precision, the guards of `callbacks` that turn a silent failure into a stop, and `checkpoints` to go on from.

A run folder holds the adapter (`adapter_config.json`, `adapter_model.safetensors`), the recipe it was made with
(`recipe.yaml`, read again by chat and evaluation) and `metrics.jsonl`, one line per optimiser step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from cvlib import ROOT, InputError, checkpoints, choose, loading, sources, texts, vocabulary
from cvlib.adapters import add_adapter, continue_adapter, grow, two_rates
from cvlib.batching import Example, blocks, encode, flatten
from cvlib.callbacks import Guard, Keeper, Steps
from cvlib.evaluation import token_losses
from cvlib.messages import Conversation, read, split
from cvlib.recipes import Recipe
from cvlib.templates import render


@dataclass(frozen=True)
class Run:
    """What a training run left behind: its folder, how many rows it had, its steps, and the model, still loaded."""

    folder: Path
    rows: int
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


def train(recipe: Recipe, out: str | Path, loaded=None, init: str | Path | None = None, resume: bool = False) -> Run:
    """Train an adapter as the recipe says and write it to the folder `out`.

    Args:
        recipe: what to train on what, and how.
        out: the run's folder; it must not exist yet, and appears only when the run is complete (see `checkpoints`).
        loaded: a `(model, tokenizer)` pair from `loading.load`, to save loading it again.
        init: an adapter to start from, as from a general one to a domain's. Its weights are taken over and nothing
            else: steps, learning rate and order begin anew. (Resuming would bring the old plan along, trap 11.)
        resume: go on with the interrupted run `out`, exactly as if it had not been.

    Raises:
        InputError: an existing folder, a run in other hands, rows that cannot be used, or a run that would not learn.
        KeyboardInterrupt: Ctrl-C; what was learnt is saved, and the message says how to go on.
    """
    out, last = checkpoints.finished(out), None
    with checkpoints.alone(out):
        device = join(recipe)
        if resume:
            last, init = checkpoints.reopen(out, recipe), checkpoints.origin(out)
        elif init:
            checkpoints.refuse_unfinished(init)
        if not resume and checkpoints.is_first():
            checkpoints.refuse_taken(out)
        set_seed(recipe.schedule.seed)
        model, tokenizer = loaded or loading.load(recipe.base, recipe.bits, recipe.dtype, device=device)
        own = grown_tokenizer(recipe, last or init)
        tokenizer = loading.read_tokenizer(own) if own else tokenizer
        examples = training_examples(recipe, tokenizer)
        model = trainable(model, recipe, last or init)
        about = {"data": checkpoints.fingerprint(examples), "processes": checkpoints.processes()}
        about["init"] = str(init) if init else None
        if resume:
            checkpoints.refuse_changed(out, about)
        settings = arguments(recipe, checkpoints.unfinished(out), model)
        if checkpoints.is_first() and not resume:
            checkpoints.begin(out, recipe, about)
        checkpoints.wait()
        try:
            steps, gathered = learn(model, tokenizer if own else None, examples, recipe, settings, last)
            if checkpoints.is_first():
                save(model, recipe, checkpoints.unfinished(out), tokenizer if own else None, gathered)
                checkpoints.finish(out)
            checkpoints.wait()
        except BaseException:
            checkpoints.abandon(out)
            raise
        return Run(out, len(examples), steps, steps[-1]["seconds"], model, tokenizer)


def join(recipe: Recipe) -> str:
    """Refuse what the machine cannot do, meet the other processes if there are any, and say which device is ours."""
    check_machine(recipe)
    if checkpoints.processes() == 1:
        return "auto"
    from accelerate import PartialState

    return str(PartialState(cpu=not torch.cuda.is_available()).device)


def trainable(model, recipe: Recipe, init: str | Path | None):
    """The model with an adapter that learns: the one in the folder `init`, or a fresh one with its new rows."""
    checkpointing = recipe.schedule.gradient_checkpointing
    if init:
        return continue_adapter(model, init, recipe.adapter, recipe.base, checkpointing)
    return add_adapter(model, recipe.adapter, recipe.base, checkpointing, grow(model, recipe))


def learn(model, tokenizer, examples: list[Example], recipe: Recipe, settings: TrainingArguments, last: Path | None):
    """All steps, from the checkpoint `last` on if there is one; and the weights, if they lie spread over cards."""
    steps = Steps(Path(settings.output_dir) / "metrics.jsonl")
    with Keeper() as keeper:
        trainer = AnswerTrainer(
            recipe=recipe,
            tokenizer=tokenizer,
            model=model,
            args=settings,
            train_dataset=examples,
            data_collator=flatten,
            callbacks=[steps, Guard(), keeper],
        )
        trainer.remove_callback(PrinterCallback)  # the progress bar says it already
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            steps.close()
    if keeper.stopped_at:
        run = checkpoints.finished(settings.output_dir)
        raise KeyboardInterrupt(f"saved after step {keeper.stopped_at}; go on with cvlib train --resume {run}")
    return steps.rows, trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None


def check_machine(recipe: Recipe) -> None:
    """Refuse what this machine cannot do, before anything is loaded."""
    if recipe.report_to not in (known := ["none", *INTEGRATION_TO_CALLBACK]):
        raise InputError(f"report_to is {recipe.report_to!r}; {choose(recipe.report_to, known)}")
    if recipe.report_to not in ("none", *get_available_reporting_integrations()):
        raise InputError(f"report_to is {recipe.report_to!r}, which is not installed; install it or choose none")
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
    own = brought or asked
    if own and not loading.has_tokenizer(own):
        raise InputError(f"growth.tokenizer is {own!r}: no tokenizer there; name a folder `cvlib vocab extend` wrote")
    return own


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
    devices = checkpoints.processes()
    accumulation, left_over = divmod(plan.batch_rows, plan.micro_rows * devices)
    if left_over:
        raise InputError(
            f"schedule.batch_rows is {plan.batch_rows}; choose a multiple of micro_rows × processes, "
            f"{plan.micro_rows} × {devices}"
        )
    settings = TrainingArguments(
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
        data_seed=plan.seed,  # one order for all processes (trap 12)
        logging_steps=1,
        logging_nan_inf_filter=False,  # Trainer would print an earlier loss in place of one that is not finite
        save_strategy="steps" if plan.save_every else "no",
        save_steps=max(1, plan.save_every),
        include_num_input_tokens_seen="all",
        report_to=recipe.report_to,
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if settings.world_size != devices:  # each would train a copy of its own, and nobody would notice
        raise InputError(f"{devices} processes were started, but torch joined {settings.world_size}; mend the launch")
    settings._n_gpu = min(1, settings.n_gpu)  # one process, one card: Trainer would cut the batch for all it sees
    return settings


class AnswerTrainer(Trainer):
    """Trainer with the book's loss: the mean over all labelled tokens of a step, on all its micro-batches and ranks."""

    def __init__(self, recipe: Recipe, tokenizer, **options):
        super().__init__(**options)
        self.recipe, self.tokenizer = recipe, tokenizer

    def create_optimizer(self, model=None):
        plan, rows = self.recipe.schedule, self.recipe.growth
        rates = plan.learning_rate, rows.learning_rate
        self.optimizer = two_rates(model or self.model, *rates, plan.weight_decay, plan.optimizer)
        return self.optimizer

    def _save(self, output_dir=None, state_dict=None):
        """A checkpoint holds the adapter, its rows and their tokenizer, and never the base again (trap 8)."""
        if self.args.should_save:
            write_adapter(self.accelerator.unwrap_model(self.model), Path(output_dir), self.tokenizer, state_dict)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = token_losses(model, inputs).sum() / num_items_in_batch
        return loss * self.accelerator.num_processes  # gradients are averaged over ranks afterwards


def save(model, recipe: Recipe, folder: Path, tokenizer=None, weights: dict | None = None) -> None:
    """Write the adapter and its recipe into `folder`, after checking that the adapter changes something (trap 7)."""
    learnt = [weight for name, weight in (weights or dict(model.named_parameters())).items() if "lora_B" in name]
    if not learnt or not any(weight.any() for weight in learnt):
        raise InputError(
            "every B of the adapter is zero, so it would change nothing; train for more steps or with "
            "schedule.warmup_ratio=0: the first step of a warm-up has rate 0"
        )
    if not all(weight.isfinite().all() for weight in learnt):
        raise InputError("the adapter holds numbers that are not finite; lower schedule.learning_rate")
    write_adapter(model, folder, tokenizer, weights)
    checkpoints.write_recipe(recipe, folder)


def write_adapter(model, folder: Path, tokenizer=None, weights: dict | None = None) -> None:
    """The adapter's weights, its new rows, and the tokenizer they belong to."""
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    if tokenizer:
        tokenizer.save_pretrained(folder)
