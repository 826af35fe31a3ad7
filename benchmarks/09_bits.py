"""Study of chapter 09: the same rows over 16-, 8- and 4-bit weights, and what it costs to serve another format.

Four ways to hold the frozen weights of one model, all computing in the same 16-bit format: as they are; int8; NF4 with
double quantisation (the book's four bits); and FP4, which bitsandbytes takes when nobody says a type, as Chinese-Vicuna
trained before it served in NF4 (trap 10). Three seeds each; a seed draws the adapter's start (q and v) and the order of
the rows, the same for all four. Each adapter is then scored on held-out rows over its own weights and over others,
in `eval()` mode: bits per byte and each row's nats. Untrained models are scored too. Processor seconds, on one thread.

    python benchmarks/09_bits.py                    # every arm that is not in the results file yet
    python benchmarks/09_bits.py --minutes 3        # start no arm after 3 minutes; exit code 75: there is more to do
    python benchmarks/09_bits.py --budget smoke     # one arm of three steps, printed and not kept
"""

import random
import sys
import time

import study
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cvlib import ROOT, adapters, batching, evaluation, loading, messages, recipes, templates

NAME, RECIPE = "09-bits", recipes.load("smollm2-cpu", ["data.max_length=256", "adapter.dropout=0"])
RATE = 1e-3  # the best of study 06 for this adapter
STEPS, TOKENS, HELD_OUT, SEEDS = 24, 320, 14, (0, 1, 2)
#: What the weights are in training, and in which formats that adapter is then served: its own, 16 bits, and trap 10.
ARMS = {"16": ("16", "NF4"), "int8": ("int8", "16"), "NF4": ("NF4", "16", "FP4"), "FP4": ("FP4", "16", "NF4")}
SETS = {"zh": "belle_zh", "en": "alpaca_en"}


def load(kind):
    """The model with its weights held as `kind` says, and its tokenizer."""
    if kind != "FP4":
        return loading.load(RECIPE.base, {"16": 16, "int8": 8, "NF4": 4}[kind])
    _, native = loading.device_and_dtype()
    nobody_says = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=getattr(torch, native))
    options = {"dtype": getattr(torch, native), "quantization_config": nobody_says}
    folder = loading.resolve(RECIPE.base)
    model = loading.quiet(AutoModelForCausalLM.from_pretrained, folder, **options)
    loading.keep_trainable(model)
    return model, loading.read_tokenizer(folder)


def held(model):
    """Bytes of the model's weights in memory, the scales of its codes counted."""
    tensors = [*model.parameters(), *model.buffers()]
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        second = [state.offset, state.state2.absmax, state.state2.code] if state and state.nested else []
        tensors += [state.absmax, state.code, *second] if state else []
        tensors += [weight.SCB] if getattr(weight, "SCB", None) is not None else []
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def trained(model):
    """The adapter's own tensors by name; the same names over every format."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def begin(model, start):
    """Give the adapter the tensors of `start`."""
    with torch.no_grad():
        for name, weight in trained(model).items():
            weight.copy_(start[name])


def train(model, batches):
    """One pass of AdamW at a constant rate; the losses."""
    optimizer, losses = torch.optim.AdamW(trained(model).values(), RATE, weight_decay=0.0), []
    model.train()
    for batch in batches:
        loss = evaluation.token_losses(model, batching.flatten(batch)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
    return losses


def scores(model, tokenizer, rows):
    """Bits per byte of each set, and each row's nats and bytes."""
    made = {name: evaluation.score(model, tokenizer, part, RECIPE.template) for name, part in rows.items()}
    return {
        name: {"bpb": score.bits_per_byte, "nll": [round(nats, 3) for nats in score.nll], "bytes": score.text_bytes}
        for name, score in made.items()
    }


def examples(tokenizer):
    """Every row of the training split that is not cut at the longest length."""
    rows = messages.split(messages.read(ROOT / "data_samples" / "belle_zh.jsonl"))[0]
    rendered = [templates.render(row, RECIPE.template, tokenizer.eos_token) for row in rows]
    encoded = [batching.encode(segments, tokenizer, RECIPE.data.max_length) for segments in rendered]
    return [example for example in encoded if example and not example.cut]


def measured(models, tokenizer, rows, kind, seed, steps=STEPS):
    """Train over one format and score over all: the row of the results."""
    torch.manual_seed(seed)
    pool = examples(tokenizer)
    order = random.Random(seed).sample(pool, len(pool))
    batches = [[order[place] for place in group] for group in batching.groups(order, TOKENS)][:steps]
    start = {
        name: torch.nn.init.kaiming_uniform_(torch.empty_like(weight), a=5**0.5) * ("lora_A" in name)
        for name, weight in trained(models["16"]).items()  # A as LoRA draws it, B zero
    }
    begin(models[kind], start)
    began = time.process_time()
    losses = train(models[kind], batches)
    seconds = time.process_time() - began
    tokens = sum(len(example) for batch in batches for example in batch)
    served = {}
    for other in ARMS[kind]:
        if other != kind:
            begin(models[other], trained(models[kind]))
        served[other] = scores(models[other], tokenizer, rows)
    about = {"trained": kind, "seed": seed, "tokens": tokens, "cpu_seconds": round(seconds, 2), "losses": losses}
    return about | {"served": served}


def main():
    options, began = study.options(__doc__), time.perf_counter()
    loaded = {kind: load(kind) for kind in ARMS}
    sizes = {kind: held(model) for kind, (model, _) in loaded.items()}
    tokenizer = loaded["16"][1]
    kept = {kind: adapters.add_adapter(model, RECIPE.adapter, RECIPE.base) for kind, (model, _) in loaded.items()}
    files = {name: ROOT / "data_samples" / f"{file}.jsonl" for name, file in SETS.items()}
    rows = {name: messages.split(messages.read(file))[1][:HELD_OUT] for name, file in files.items()}

    if options.budget == "smoke":
        few = {name: part[:4] for name, part in rows.items()}
        row = measured(kept, tokenizer, few, "NF4", 0, steps=3)
        print(sizes, {key: row[key] for key in ("tokens", "cpu_seconds", "losses")})
        print(
            {kind: {name: round(part["bpb"], 4) for name, part in sets.items()} for kind, sets in row["served"].items()}
        )
        return 0

    done = study.load(NAME)
    about = {
        "base": RECIPE.base,
        "steps": STEPS,
        "tokens_per_step": TOKENS,
        "learning_rate": RATE,
    }
    about |= {"held": sizes, "threads": torch.get_num_threads()}
    if not done:  # B is zero: an untrained adapter changes nothing
        done = [{"trained": None, "seed": 0, "served": {k: scores(m, tokenizer, rows) for k, m in kept.items()}}]
    finished = {(row["trained"], row["seed"]) for row in done}
    for seed in SEEDS:
        for kind in ARMS:
            if (kind, seed) in finished:
                continue
            if time.perf_counter() - began > 60 * options.minutes:
                return 75
            done.append(measured(kept, tokenizer, rows, kind, seed))
            study.save(NAME, done, **about)
            found = {other: round(sets["zh"]["bpb"], 4) for other, sets in done[-1]["served"].items()}
            print(kind, seed, found, f"{done[-1]['tokens']} tokens, {done[-1]['cpu_seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
