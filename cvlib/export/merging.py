"""Base and adapters in, one model folder out.

Merging adds every update to its weight, W + s·B A (see `lora`; the sums themselves are peft's, whose layers know every
variant). They are made in float32, on the base's own weights and never on int8 or NF4 codes, and rounded once, on
storing. What the rounding cost is measured on the folder as written, against the model with its adapter still beside
it.

The template and the decoding of the adapter's recipe travel with the model: asked in another template than the one it
was trained in, a model answers a question nobody put (trap 6).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from cvlib import InputError, loading, recipes
from cvlib.templates import find

#: What a model is asked before and after its weights are stored.
PROBE = "What is the capital of France? 中国的首都是哪里？ 1 + 1 = 2, 🙂"

#: Largest file of weights; what is larger is split.
SHARD = "2GB"


@dataclass(frozen=True)
class Merged:
    """A merged folder, its bytes, and how storing it moved the logits of `PROBE`.

    `change`: the largest move of a logit. `same`: the share of positions whose likeliest token stayed. `bits`: the
    fewest bits an adapter was trained over; below 16, it now stands on other weights than those it has learnt beside.
    """

    folder: Path
    dtype: str
    bytes: int
    change: float
    same: float
    bits: int

    def __str__(self) -> str:
        over = f", although trained over {self.bits}-bit ones" if self.bits < 16 else ""
        return (
            f"{self.folder}: {self.bytes / 1e6:,.1f} MB, merged in float32 into the 16-bit weights{over}, stored as "
            f"{self.dtype}; logits moved by at most {self.change:.2g}, likeliest token the same at {self.same:.0%}"
        )


def merge(
    base: str, adapters: Sequence[str | Path], out: str | Path, dtype: str = "bfloat16", force: bool = False
) -> Merged:
    """Write `base` with the adapters inside its weights: sharded safetensors, tokenizer, template, generation defaults.

    Args:
        base: an asset, hub id or folder, in 16 or 32 bits.
        adapters: folders of LoRA, rsLoRA or DoRA over any matrices, new rows of the embedding included. Each is laid
            over what those before it made. For LoRA the order makes no difference; DoRA rescales what it finds.
        dtype: "bfloat16", "float16" or "float32", the format to store.
        force: replace the model folder `out` if there is one.

    Raises:
        InputError: an adapter of another base, a quantised base, no room, `out` exists, or weights beyond the format.
    """
    if dtype not in ("bfloat16", "float16", "float32"):
        raise InputError(f"dtype {dtype!r} is unknown; choose one of bfloat16, float16, float32")
    for adapter in adapters:
        loading.belongs(adapter, base)
    stored = getattr(torch, dtype)
    needed = skeleton(loading.resolve(base), base).num_parameters() * stored.itemsize
    with complete(Path(out), force, needed) as part, tqdm(total=len(adapters) + 2, desc="merging", leave=False) as bar:
        first, *others = adapters or [None]
        model, tokenizer = loading.load(base, dtype="float32", adapter=first, device="cpu")
        for adapter in others:
            model = loading.attach(plain(model), adapter, base)
            bar.update()
        before = logits(model, tokenizer)
        model = plain(model).to(stored)
        check_range(model, base, dtype)
        adopt(model, tokenizer, recipe_of(adapters[-1]) if adapters else None)
        bar.update()
        loading.quiet(model.save_pretrained, part, max_shard_size=SHARD)
        tokenizer.save_pretrained(part)
        del model  # with the one below they would be twice 27 GB for a 7B
        bar.update()
        after = logits(*loading.load(str(part), dtype="float32", device="cpu"))
        size = sum(file.stat().st_size for file in part.iterdir())
    same = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    bits = min([recipe.bits for recipe in map(recipe_of, adapters) if recipe], default=16)
    return Merged(Path(out), dtype, size, (after - before).abs().max().item(), same, bits)


def plain(model):
    """The model with its adapter, if it has one, added into its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


@torch.no_grad()
def logits(model, tokenizer) -> torch.Tensor:
    """What the model predicts after each token of `PROBE`: (tokens, vocabulary), float32."""
    return model.eval()(input_ids=torch.tensor([tokenizer(PROBE).input_ids])).logits[0].float()


def skeleton(folder: str | Path, name: str):
    """A model without its numbers (torch's device "meta"): what tensors it must have, and of which shapes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: no config.json to read ({str(error).splitlines()[0]}); name a model") from None
    if codes := getattr(config, "quantization_config", None):
        raise InputError(f"{name}: stored as {codes['quant_method']} codes; name the 16-bit model they were made from")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_range(model, base: str, dtype: str) -> None:
    """Refuse what the format cannot hold: float16 ends at 65,504, beyond it lies infinity."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"{base}: {name} is not finite as {dtype}; choose bfloat16 or float32, or train again")


def recipe_of(adapter: str | Path) -> recipes.Recipe | None:
    """The recipe an adapter was trained with, if `cvlib train` wrote it."""
    path = Path(adapter) / "recipe.yaml"
    return recipes.load(path) if path.is_file() else None


def adopt(model, tokenizer, recipe: recipes.Recipe | None) -> None:
    """Give the model its recipe's template and decoding, and the tokenizer's end token (trap 17).

    The repetition penalty stays behind: elsewhere it would fall on the words of the question, too (trap 18).
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    if recipe:
        tokenizer.chat_template = chat_template(recipe.template, tokenizer.eos_token)
        draw = recipe.decoding
        choice = {"temperature": draw.temperature, "top_k": draw.top_k, "top_p": draw.top_p} if draw.temperature else {}
        model.generation_config.update(do_sample=bool(choice), max_new_tokens=draw.max_new_tokens, **choice)


def chat_template(name: str, eos: str) -> str:
    """A template of `templates` in Jinja, the language in which model folders and GGUF files carry theirs.

    >>> from jinja2 import Template
    >>> Template(chat_template("alpaca", "</s>")).render(messages=[{"role": "user", "content": "你好"}])[-21:]
    '### Instruction:\\n你好\\n\\n'
    """
    style = find(name)
    start = {role: json.dumps(text) for role, text in style.open.items()}
    end = {role: json.dumps(text.replace("{eos}", eos)) for role, text in style.close.items()}

    def when(condition: str, *words: str) -> str:
        return f"{{% if {condition} %}}{{{{ {' + '.join(words)} }}}}{{% endif %}}"

    system = when("messages[0]['role'] != 'system'", start["system"], json.dumps(style.system), end["system"])
    turns = [when(f"turn['role'] == '{role}'", start[role], "turn['content']", end[role]) for role in start]
    ask = when("add_generation_prompt", start["assistant"])
    return f"{system}{{% for turn in messages %}}{''.join(turns)}{{% endfor %}}{ask}"


@contextmanager
def complete(out: Path, force: bool, needed: int) -> Iterator[Path]:
    """A hidden folder beside `out` to write `needed` bytes into; it gets the name at the end, or is removed."""
    refuse_folder(out, force)
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    try:
        require_space(out, needed)
        shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
        part.mkdir(parents=True)
        yield part
        if out.exists():
            os.replace(out, old)
        os.replace(part, out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{out}: could not be written ({error}); make room or choose another place") from None
    finally:
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)


def refuse_folder(out: Path, force: bool) -> None:
    """Refuse to write where something is, unless it is a model and `force` says that it may go."""
    if out.exists() and not force:
        raise InputError(f"{out}: exists already; name another folder, or --force to replace a model")
    if out.exists() and not (out / "config.json").is_file():
        raise InputError(f"{out}: holds no model, so force does not replace it; name another folder")


def require_space(out: Path, needed: int) -> None:
    """Refuse before anything is written, in bytes."""
    there = next(folder for folder in out.absolute().parents if folder.is_dir())
    if (free := shutil.disk_usage(there).free) < needed:
        raise InputError(f"{out}: {needed:,} bytes needed on the way, {free:,} free; make room or choose another disk")
