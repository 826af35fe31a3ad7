"""A training run as data: YAML in, small dataclasses out, impossible values refused before anything is loaded.

A recipe names everything that decides a result, so that one file is the whole experiment: base model, bits, prompt
template, adapter, data, schedule and decoding. `load("smollm2-cpu")` reads a recipe shipped here; `load("my.yaml")`
reads yours.
The command line (`--set schedule.learning_rate=1e-3`) and `--help` are derived from these classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cvlib import InputError, choose

FOLDER = Path(__file__).parent
#: What a field's type means in a recipe file: the Python type, and the words of an error message.
KINDS = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "a text"),
    "bool": (bool, "true or false"),
    "list[str]": (list, "a list of texts, such as [a, b]"),
}
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def setting(default: Any, help: str, choices: tuple = ()) -> Any:
    """A field with its default, the line `--help` prints for it, and the values it may take."""
    about = {"help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=about)
    return field(default=default, metadata=about)


def need(condition: bool, key: str, value: Any, remedy: str) -> None:
    """Refuse an impossible value, naming key, value and remedy."""
    if not condition:
        raise InputError(f"{key} is {value!r}; {remedy}")


@dataclass
class Adapter:
    """LoRA (Hu et al. 2021): which matrices get a low-rank update, and how large."""

    r: int = setting(8, "rank of the update, columns of B")
    alpha: float = setting(16, "the update is scaled by alpha / r")
    dropout: float = setting(0.05, "share of the adapter's inputs dropped in training")
    targets: list[str] = setting(
        ["q_proj", "v_proj"], f"matrices to adapt, among {', '.join(PROJECTIONS)}", PROJECTIONS
    )

    def __post_init__(self):
        need(self.r >= 1, "r", self.r, "a rank is 1 or more")
        need(self.alpha > 0, "alpha", self.alpha, "choose a scale above 0, often 2 * r")
        need(0 <= self.dropout < 1, "dropout", self.dropout, "choose a share from 0 up to, not including, 1")
        need(bool(self.targets), "targets", self.targets, "name at least one matrix")


@dataclass
class Growth:
    """A grown tokenizer: new pieces, whose rows are trained beside the adapter."""

    tokenizer: str = setting("", "folder of a tokenizer grown from the base's; empty keeps the base's own")
    start: str = setting("mean", "where new rows start: the mean of their sub-pieces", ("mean", "random", "zero"))
    learning_rate: float = setting(1e-3, "peak learning rate of the new rows")

    def __post_init__(self):
        need(self.learning_rate > 0, "learning_rate", self.learning_rate, "choose a rate above 0")


@dataclass
class Data:
    """Conversations to answer in, and plain text to learn whole."""

    train: list[str] = setting([], "row files or sources of rows; rows held out by their hash are left out")
    text: list[str] = setting([], "plain text, a document a line: files, or assets such as china-law")
    max_length: int = setting(512, "longest conversation, in tokens; longer answers are cut and lose their end token")

    def __post_init__(self):
        need(self.max_length >= 16, "max_length", self.max_length, "room for at least 16 tokens is needed")


@dataclass
class Schedule:
    """How long, how fast, in which order."""

    learning_rate: float = setting(3e-4, "peak learning rate of AdamW")
    optimizer: str = setting("adamw", "AdamW with its moments in 32 bits; 8 or paged need a card", OPTIMIZERS)
    epochs: float = setting(3.0, "passes over the rows")
    max_steps: int = setting(0, "stop after this many optimiser steps instead; 0 means by epochs")
    batch_rows: int = setting(128, "conversations per optimiser step, over all devices")
    micro_rows: int = setting(8, "conversations per forward pass; batch_rows must be a multiple of it")
    warmup_ratio: float = setting(0.05, "share of the steps in which the learning rate climbs from 0")
    warmup_steps: int = setting(0, "climb for this many steps instead; 0 means by warmup_ratio")
    scheduler: str = setting("linear", "what happens after the peak", ("linear", "cosine", "constant_with_warmup"))
    weight_decay: float = setting(0.0, "AdamW's decay of the adapter weights")
    max_grad_norm: float = setting(1.0, "gradients longer than this are scaled down to it")
    gradient_checkpointing: bool = setting(False, "recompute activations backward: less memory, a third slower")
    save_every: int = setting(50, "steps between two checkpoints; 0 means only when Ctrl-C stops the run")
    seed: int = setting(42, "seed of initialisation, order and dropout")

    def __post_init__(self):
        need(self.learning_rate > 0, "learning_rate", self.learning_rate, "choose a positive rate")
        need(self.epochs > 0, "epochs", self.epochs, "choose more than 0 passes")
        need(self.max_steps >= 0, "max_steps", self.max_steps, "choose 0 (by epochs) or a number of steps")
        need(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "choose a share below 1")
        need(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "choose 0 (by ratio) or a number")
        need(self.micro_rows >= 1, "micro_rows", self.micro_rows, "a forward pass needs a row")
        need(
            self.batch_rows >= 1 and self.batch_rows % self.micro_rows == 0,
            "batch_rows",
            self.batch_rows,
            f"choose a multiple of micro_rows, which is {self.micro_rows}",
        )
        need(self.save_every >= 0, "save_every", self.save_every, "choose 0 (only on Ctrl-C) or a number")
        need(0 <= self.seed < 2**32, "seed", self.seed, "choose a number from 0 to 2^32 - 1")


@dataclass
class Decoding:
    """How answers are drawn from the model's probabilities."""

    temperature: float = setting(0.2, "below 1 sharpens, above 1 flattens; 0 always takes the likeliest token")
    top_k: int = setting(40, "draw from the k likeliest tokens; 0 means from all")
    top_p: float = setting(0.9, "draw from the likeliest tokens that together hold this probability")
    min_p: float = setting(0.0, "drop tokens less likely than this share of the likeliest one; 0 means none")
    repetition_penalty: float = setting(1.1, "weaken tokens that were said already; 1 means not")
    penalise: str = setting("answer", "said where: in the answer, or in the prompt as well", ("answer", "all"))
    max_new_tokens: int = setting(256, "longest answer, in tokens")
    seed: int = setting(0, "seed of the draws")

    def __post_init__(self):
        need(self.temperature >= 0, "temperature", self.temperature, "choose 0 or more")
        need(self.top_k >= 0, "top_k", self.top_k, "choose 0 (all) or more")
        need(0 < self.top_p <= 1, "top_p", self.top_p, "choose a probability above 0, at most 1")
        need(0 <= self.min_p < 1, "min_p", self.min_p, "choose a share from 0 up to, not including, 1")
        need(self.repetition_penalty >= 1, "repetition_penalty", self.repetition_penalty, "choose 1 or more")
        need(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "ask for at least one token")
        need(0 <= self.seed < 2**32, "seed", self.seed, "choose a number from 0 to 2^32 - 1")


@dataclass
class Recipe:
    """Everything that decides a run."""

    base: str = setting("smollm2-135m", "the frozen model: an asset, a hub id or a folder")
    bits: int = setting(16, "how its weights are held", (16, 8, 4))
    template: str = setting("chatml", "how a conversation becomes text", ("chatml", "alpaca"))
    dtype: str = setting("auto", "number format of the computation", ("auto", "float32", "bfloat16", "float16"))
    report_to: str = setting("none", "who else is told of each step: a reporter of Trainer, such as tensorboard")
    growth: Growth = field(default_factory=Growth)
    adapter: Adapter = field(default_factory=Adapter)
    data: Data = field(default_factory=Data)
    schedule: Schedule = field(default_factory=Schedule)
    decoding: Decoding = field(default_factory=Decoding)

    def as_dict(self) -> dict:
        """The recipe as plain data, ready for YAML or JSON."""
        return dataclasses.asdict(self)


def names() -> list[str]:
    """The recipes shipped with the package.

    >>> "smollm2-cpu" in names()
    True
    """
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def keys(section: type = Recipe, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every key that `--set` can change, with its field.

    >>> [key for key in keys() if key.endswith("learning_rate")]
    ['growth.learning_rate', 'schedule.learning_rate']
    """
    found = {}
    for item in dataclasses.fields(section):
        nested = item.default_factory
        found |= keys(nested, f"{item.name}.") if dataclasses.is_dataclass(nested) else {prefix + item.name: item}
    return found


def load(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by name or path and change single values.

    Args:
        source: the name of a shipped recipe or the path of a YAML file.
        overrides: `key=value` strings with dotted keys; values are read as YAML.

    Raises:
        InputError: no such recipe, broken YAML, an unknown key or an impossible value.

    >>> load("smollm2-cpu", ["adapter.r=16", "schedule.epochs=1"]).adapter.r
    16
    """
    path = Path(source) if str(source).endswith((".yaml", ".yml")) else FOLDER / f"{source}.yaml"
    if str(source).endswith((".json", ".jsonl")):
        raise InputError(f"{source}: rows are no recipe; name a recipe, and the rows as --set 'data.train=[{source}]'")
    if not path.is_file():
        raise InputError(f"recipe {str(source)!r} not found; {choose(str(source), names())} (or name a .yaml file)")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values; found {type(values).__name__}")
    recipe = _build(Recipe, values, path.name, prefix="")  # first: a mistake in the file is no fault of the overrides
    for pair in overrides:
        _override(values, pair)
    return _build(Recipe, values, ", ".join(overrides), prefix="") if overrides else recipe


def read_yaml(path: Path) -> Any:
    """The values in a YAML file; `InputError` names the line that is broken."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        line = f":{error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise InputError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)}); mend this line") from None


def override(section: Any, pairs: Iterable[str]) -> Any:
    """A section of a recipe with single values changed, each given as `key=value`.

    >>> override(Decoding(), ["temperature=0", "top_k=5"]).top_k
    5
    """
    for pair in pairs:
        values = dataclasses.asdict(section)
        _override(values, pair)
        section = _build(type(section), values, pair, prefix="")
    return section


def _override(values: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise InputError(f"{override!r}: write key=value")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"{override!r}: {parent!r} holds a value, not further keys")
    try:
        values[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"{override!r}: not valid YAML ({error.problem}); mend the value") from None


def _build(cls: type, values: dict, where: str, prefix: str) -> Any:
    """Fill a dataclass from plain data, checking every key, type and choice; sections are filled in turn."""
    fields = {item.name: item for item in dataclasses.fields(cls)}
    ready = {}
    for key, value in values.items():
        name = prefix + str(key)
        if key not in fields:
            raise InputError(f"{where}: unknown key {name!r}; {choose(name, [prefix + known for known in fields])}")
        section = fields[key].default_factory
        if dataclasses.is_dataclass(section):
            if not isinstance(value, dict):
                raise InputError(f"{where}: {name} is {value!r}; it is a section of keys")
            ready[key] = _build(section, value, where, name + ".")
        else:
            ready[key] = _checked(fields[key], value, f"{where}: {name}")
    try:
        return cls(**ready)
    except InputError as error:
        raise InputError(f"{where}: {prefix}{error}") from None


def _checked(item: dataclasses.Field, value: Any, where: str) -> Any:
    """`value` as the field's type; 3e-4 without a dot is a string to YAML and a number to everybody else."""
    kind = item.type
    try:
        if kind == "float" and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, KINDS[kind][0]) or (kind == "int" and isinstance(value, bool)):
            raise TypeError
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        if isinstance(value, list) and not all(isinstance(part, str) for part in value):
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where} is {value!r}; write {KINDS[kind][1]}") from None
    for part in value if isinstance(value, list) else [value]:
        if item.metadata["choices"] and part not in item.metadata["choices"]:
            raise InputError(f"{where} is {part!r}; choose among {', '.join(map(str, item.metadata['choices']))}")
    return value
