"""A frozen model in, the same model with an adapter that can be trained out.

The adapter is LoRA by peft, in float32, over a base of any precision. It may be new, or one that was trained before and
goes on with other rows (`continue_adapter`); and it may bring rows for the new pieces of a grown tokenizer (`grow`).
Nothing here knows about data or steps: that is `training`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cvlib import InputError, embeddings, loading
from cvlib.recipes import Adapter, Recipe


def add_adapter(model, adapter: Adapter, base: str, checkpointing: bool = False, new: range = range(0)):
    """A fresh LoRA adapter over a frozen model; the `new` rows of a grown one are trained beside it."""
    from peft import LoraConfig, get_peft_model

    if checkpointing:
        recompute(model)
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        trainable_token_indices=embeddings.trainable(model, new) if new else None,
        task_type="CAUSAL_LM",
    )
    peft_model = loading.quiet(get_peft_model, model, config)
    peft_model.peft_config["default"].base_model_name_or_path = base
    return peft_model


def continue_adapter(model, init: str | Path, adapter: Adapter, base: str, checkpointing: bool = False):
    """The adapter folder `init` over a frozen model, ready to be trained on; dropout is as `adapter` says.

    Raises:
        InputError: an adapter of another base, or of another rank, scale or other matrices than `adapter`.
    """
    settings = loading.read_adapter(init)
    found = {"r": settings.get("r"), "alpha": settings.get("lora_alpha"), "targets": settings.get("target_modules")}
    wanted = {"r": adapter.r, "alpha": adapter.alpha, "targets": sorted(adapter.targets)}
    found["targets"] = sorted(found["targets"] or [])
    for key, value in wanted.items():
        if found[key] != value:
            raise InputError(f"{init}: its adapter.{key} is {found[key]}, the recipe says {value}; make them the same")
    if checkpointing:
        recompute(model)
    peft_model = loading.attach(model, init, base, trainable=True)
    for module in peft_model.modules():
        for dropout in getattr(module, "lora_dropout", {}).values():
            dropout.p = adapter.dropout
    return peft_model


def recompute(model) -> None:
    """Keep only the input of each block for the backward pass, and compute the rest again."""
    way = {"use_reentrant": False}
    loading.quiet(model.gradient_checkpointing_enable, gradient_checkpointing_kwargs=way)
    model.enable_input_require_grads()  # trap 14: frozen embeddings would leave nothing to differentiate


def grow(model, recipe: Recipe) -> range:
    """A row for each new piece of the recipe's grown tokenizer; none if it names no tokenizer."""
    if not recipe.growth.tokenizer:
        return range(0)
    base = loading.resolve(recipe.base)
    if not Path(base).is_dir():  # a hub id: the tokenizer's files are all we read here
        from huggingface_hub import snapshot_download

        base = snapshot_download(base, allow_patterns=["tokenizer*"])
    sub_pieces = embeddings.spelt(recipe.growth.tokenizer, base)
    return embeddings.grow(model, sub_pieces, recipe.growth.start, recipe.schedule.seed)


def two_rates(
    model, rate: float, row_rate: float, weight_decay: float = 0.0, kind: str = "adamw"
) -> torch.optim.Optimizer:
    """AdamW with a learning rate of their own for the new rows, whose numbers are of another size than LoRA's.

    `kind` says how its two moments are held: in 32 bits, in 8, or in 8 in pages that may leave the card for a while.
    """
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    rows = [weight for name, weight in weights if "trainable_tokens" in name]
    rest = [weight for name, weight in weights if "trainable_tokens" not in name]
    groups = [{"params": rest, "lr": rate}, {"params": rows, "lr": row_rate}]
    options = {"params": [group for group in groups if group["params"]], "weight_decay": weight_decay}
    if kind == "adamw":
        return torch.optim.AdamW(**options, fused=True)
    from bitsandbytes import optim

    return {"adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}[kind](**options)
