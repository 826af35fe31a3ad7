"""Peaks of real training steps on a card, beside what `cvlib.memory` predicts. Needs CUDA; needs no model hub.

Memory and speed depend on a model's shape, not on what it learnt: so the weights are random, built and quantised one
matrix at a time. Each case of `CASES` is a recipe of the book. Its LoRA step runs at three lengths, as it would on a
Turing card: in float16 with a gradient scaler, without FlashAttention. The allocator is capped at a smaller card's
memory less the CUDA context, which lies outside the allocator. Measured for every case, card and length: peak bytes
and tokens per second of one conversation, and the largest micro-batch that fits. Then answers are written, capped too.

A capped large card is not a small one: its speed is its own, and some kernels differ. So the file names the device.

    python benchmarks/gpu_train.py                # what is not in results/gpu-train.json yet; made for 8 minutes, H100
    python benchmarks/gpu_train.py --minutes 4    # start nothing after 4 minutes; exit code 75: there is more to do
    python benchmarks/gpu_train.py --rehearse     # the same path with a tiny shape on a CPU, printed and not kept
"""

import argparse
import gc
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import study
import torch
from bitsandbytes.nn import Int8Params
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from cvlib import adapters, attention, batching, evaluation, loading, memory, recipes, shapes
from cvlib.activations import Step
from cvlib.commands.machine import CARDS

NAME, LENGTHS, MOST = "gpu-train", (256, 512, 1024), 64
#: Recipes with their own bits or others: the released 7B recipe, ours, and 13B.
CASES = (
    ("chinese-vicuna-7b-8bit", 8),
    ("llama-7b-8bit-2080ti", 8),
    ("llama-7b-8bit-2080ti", 4),
    ("llama-13b-4bit-2080ti", 4),
    ("llama-13b-4bit-2080ti", 8),
)
#: Answers: whose base, in how many bits, in how much memory; and their tokens.
ANSWERS = (("llama-7b-8bit-2080ti", 4, 6_000_000_000), ("llama-13b-4bit-2080ti", 4, CARDS["2080ti"]))
PROMPT, WRITTEN = 960, 64
NOTHING = {"peak": None, "tokens_per_second": None}  # it did not fit
TINY = shapes.Shape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=4, head_dim=16, vocab=512)


class Card:
    """The device, with an allocator that pretends to have less memory; in a rehearsal a CPU that pretends as well."""

    def __init__(self, rehearse):
        self.rehearse = rehearse
        self.device, self.dtype = ("cpu", torch.float32) if rehearse else ("cuda", torch.float16)
        self.lengths = (16, 32) if rehearse else LENGTHS
        self.context = memory.CONTEXT["cpu"] if rehearse else self.outside()
        self.total = float("inf") if rehearse else torch.cuda.get_device_properties(0).total_memory

    def outside(self):
        """Bytes this process takes and the allocator does not know of: driver, kernels, libraries."""
        torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")  # loads the kernels of products
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    def cap(self, room=None):
        """Give out what a card of `room` bytes has beside the context; None: everything."""
        self.room = self.total if room is None else room - self.context
        if not self.rehearse:
            torch.cuda.set_per_process_memory_fraction(self.room / self.total)

    def allow(self, needed):
        """In a rehearsal, where no allocator looks, refuse a step that needs more than a ten-thousandth of the cap."""
        if self.rehearse and needed > self.room / 10_000:
            raise torch.OutOfMemoryError("more than the rehearsal's cap")

    def clean(self):
        """Take back what is free, and begin a new peak."""
        gc.collect()
        if not self.rehearse:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def timed(self, work, tokens):
        """Peak bytes given out and tokens per second of `work`."""
        self.clean()
        started = time.perf_counter()
        work()
        if not self.rehearse:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = None if self.rehearse else torch.cuda.max_memory_allocated()
        return {"peak": peak, "tokens_per_second": round(tokens / seconds, 1)}


# the model


def build(shape, bits, card):
    """A LLaMA of this shape with random weights; no more than one matrix at a time is held in 16 bits."""
    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=MOST * max(LENGTHS))
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(card.dtype)
    model.set_attn_implementation(attention.NAME)
    replace_with_bnb_linear(model, ["lm_head"], loading.quantization(bits, card.dtype))
    for module in list(model.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, filled(weight, card))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(card.device)
    setattr(model, f"is_loaded_in_{bits}bit", True)  # peft asks for it
    loading.keep_trainable(model)
    return model.requires_grad_(False)


def filled(weight, card):
    """A parameter like this one with numbers in it: random, or ones if it is a norm."""
    if weight.dim() == 1:
        return torch.nn.Parameter(torch.ones(weight.shape, device=card.device, dtype=card.dtype), requires_grad=False)
    made = torch.randn(weight.shape, device=card.device, dtype=card.dtype).mul_(0.02)
    about = {key: value for key, value in weight.__dict__.items() if key != "SCB"}
    if isinstance(weight, Int8Params):
        made = made.cpu()  # bitsandbytes quantises on the way to the card
    return type(weight)(made, requires_grad=False, **about).to(card.device)


def kernels(card):
    """The attention kernels that a Turing card has."""
    return nullcontext() if card.rehearse else sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


# a step


def stepper(model, recipe, card):
    """A function that trains on a batch as Trainer does on a Turing card, and its optimiser."""
    kind = "adamw" if card.rehearse else recipe.schedule.optimizer
    optimizer = adapters.two_rates(model, recipe.schedule.learning_rate, 0.0, kind=kind)
    scaler = torch.amp.GradScaler(card.device, init_scale=1024.0, enabled=not card.rehearse)
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def step(batch):
        with nullcontext() if card.rehearse else torch.autocast("cuda", torch.float16):
            loss = evaluation.token_losses(model, batch).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, recipe.schedule.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=False)  # they stay allocated, as they do while batches accumulate
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()}; random weights must give about ln of the vocabulary")

    return step, optimizer


def batch(rows, length, vocab, card):
    """`rows` conversations of `length` tokens, flattened, every token labelled: a step at its worst."""
    ids = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    flat = batching.flatten([batching.Example(row, row) for row in ids])
    return {name: tensor.to(card.device) for name, tensor in flat.items()}


def predicted(shape, recipe, rows, length):
    """The peak as `cvlib.memory` counts it, without the context."""
    step = Step(rows * length, rows * length - 1, rows > 1, recipe.bits, "float16", "cuda")
    plan = recipe.schedule
    whole = memory.budget(shape, recipe.adapter, step, plan.gradient_checkpointing, optimizer=plan.optimizer)
    return whole.peak - memory.CONTEXT["cuda"]


def survives(work, model, card):
    """What `work` returns, or None if it runs out of memory; the gradients are zero again afterwards."""
    try:
        found = work()
    except torch.OutOfMemoryError:
        found = None
    for weight in model.parameters():
        if weight.grad is not None:
            weight.grad.zero_()
    card.clean()
    return found


def most(fits):
    """The largest number up to `MOST` that fits, if all smaller ones do: double, then halve the gap.

    >>> [most(lambda rows: rows <= limit) for limit in (0, 1, 5, 47, 100)]
    [0, 1, 5, 47, 64]
    """
    good, bad = 0, 1
    while bad <= MOST and fits(bad):
        good, bad = bad, 2 * bad
    while good < MOST and bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


# the study


def training(card, done, late):
    """A row for every case, card and length that is not in `done`."""
    finished = {(row["recipe"], row["bits"], row["card"], row["length"]) for row in done if row["what"] == "training"}
    for name, bits in CASES:
        places = [(room, length) for room in ("2080ti", "t4") for length in card.lengths]
        missing = [place for place in places if (name, bits, *place) not in finished]
        if not missing or late():
            continue
        recipe = replace(recipes.load(name), bits=bits)
        shape = TINY if card.rehearse else shapes.shape_of(recipe.base)
        card.cap()
        model = build(shape, bits, card)
        model = adapters.add_adapter(model, recipe.adapter, name, recipe.schedule.gradient_checkpointing).train()
        step, optimizer = stepper(model, recipe, card)
        for _ in range(3):  # the scaler may skip a first step, and the optimiser would have no state yet
            step(batch(1, card.lengths[0], shape.vocab, card))
        if not optimizer.state:
            raise RuntimeError("the gradient scaler skipped every step")
        for room, length in missing:
            if late():
                break
            card.cap(CARDS[room])
            row = {"what": "training", "recipe": name, "bits": bits, "card": room, "length": length}
            yield row | cell(step, model, recipe, shape, length, card)
        del model, step, optimizer
        card.clean()


def cell(step, model, recipe, shape, length, card):
    """What one card and length give: peak, tokens per second, what was predicted, the largest micro-batch."""

    def taken(rows):
        card.allow(predicted(shape, recipe, rows, length))
        step(batch(rows, length, shape.vocab, card))
        return True

    one = survives(lambda: taken(1) and card.timed(lambda: taken(1), length), model, card)
    found = {**(one or NOTHING), "predicted": predicted(shape, recipe, 1, length), "fits": bool(one)}
    return found | {
        "most_rows": one and most(lambda rows: rows == 1 or bool(survives(lambda: taken(rows), model, card)))
    }


@torch.no_grad()
def written(model, vocab, card):
    """Peak and tokens per second of an answer, its prompt read first."""
    prompt = torch.randint(vocab, (1, PROMPT), device=card.device)
    asked = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0}
    found = survives(lambda: card.timed(lambda: model.generate(prompt, **asked), WRITTEN), model, card)
    return (found or NOTHING) | {"fits": bool(found)}


def answering(card, done, late):
    """A row for every answer: a prompt read and as many tokens written as asked for."""
    finished = {row["recipe"] for row in done if row["what"] == "answering"}
    for name, bits, room in ANSWERS:
        if name in finished or late():
            continue
        shape = TINY if card.rehearse else shapes.shape_of(recipes.load(name).base)
        card.cap()
        model = build(shape, bits, card).eval()
        card.cap(room)
        row = {"what": "answering", "recipe": name, "bits": bits, "room": room, "tokens": PROMPT + WRITTEN}
        expected = memory.serving(shape, bits, PROMPT + WRITTEN).peak - memory.CONTEXT["cuda"]
        yield row | written(model, shape.vocab, card) | {"predicted": expected}
        del model
        card.clean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="start nothing after this many (default: 7.5)")
    parser.add_argument("--rehearse", action="store_true", help="a tiny shape on a CPU; printed and not kept")
    options, began = parser.parse_args(), time.perf_counter()
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu_train.py: no CUDA card here; run it where there is one, or try --rehearse", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    card = Card(options.rehearse)

    def late():
        return time.perf_counter() - began > 60 * options.minutes

    done = [] if options.rehearse else study.load(NAME)
    about = {
        "context": card.context,
        "capability": None if options.rehearse else list(torch.cuda.get_device_capability()),
    }
    with kernels(card):
        for make in (answering, training):
            for row in make(card, list(done), late):
                done.append(row)
                print(*row.values(), flush=True)
                if not options.rehearse:
                    study.save(NAME, done, **about)
    return 75 if late() else 0


if __name__ == "__main__":
    sys.exit(main())
