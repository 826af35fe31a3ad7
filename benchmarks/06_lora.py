"""Study of chapter 06: LoRA's dials, and the field beside LoRA, on one small budget.

Every arm trains the running model (bf16) on the same Chinese rows for `STEPS` steps of about `TOKENS` tokens, one pass,
and is scored on held-out rows: bits per byte gained in Chinese, forgotten in English. Three seeds an arm; a seed draws
both the adapter's start and the order of the rows. One loop for every method; only what is trainable differs.

* grid: rank × α × learning rate, all seven projections excepted: q,v, as Chinese-Vicuna.
* matrices: which projections get the same number of parameters.
* field: LoRA, DoRA, LoRA+, full fine-tuning, norms only, prompt tuning, IA³. Each method's learning rate is the best
  of three for seed 0, judged by its *training* loss over the last steps: in one pass every batch is new.

How the grid was thinned: 3 of the 7 ranks from 1 to 64, 2 α, 3 rates, and a budget of about 10,000 tokens an arm (a
real run sees a hundred times that), scored in Chinese only, so that all of it takes two hours on one core.

    python benchmarks/06_lora.py                    # everything that is not in the results file yet
    python benchmarks/06_lora.py --minutes 3        # stop after the arm that passes 3 minutes; 75 means: more to do
    python benchmarks/06_lora.py --budget smoke     # one cell, printed and not kept
"""

import copy
import itertools
import random
import sys
import time

import peft
import study
import torch
from torch import nn

from cvlib import ROOT, batching, evaluation, loading, lora, messages, templates

NAME, BASE, TEMPLATE = "06-lora", "smollm2-135m", "chatml"
STEPS, TOKENS, LONGEST, HELD_OUT, SEEDS = 24, 400, 256, 40, (0, 1, 2)
QV, NORMS = ["q_proj", "v_proj"], ["input_layernorm", "post_attention_layernorm", "norm"]
#: Learning rates each method of the field chooses from.
RATES = {
    "LoRA": (3e-4, 1e-3, 3e-3),
    "DoRA": (3e-4, 1e-3, 3e-3),
    "LoRA+": (1e-4, 3e-4, 1e-3),
    "full": (1e-5, 3e-5, 1e-4),
    "norms only": (1e-3, 3e-3, 1e-2),
    "prompt tuning": (1e-2, 3e-2, 1e-1),
    "IA3": (3e-3, 1e-2, 3e-2),
}
#: Nearly equal parameters a layer: 30,720, 30,720, 31,680 and 30,528.
MATRICES = {
    "q,v": (16, QV),
    "attention": (8, lora.PROJECTIONS[:4]),
    "MLP": (5, lora.PROJECTIONS[4:]),
    "all seven": (3, lora.PROJECTIONS),
}


class Prompted(nn.Module):
    """A peft prompt in front of one conversation at a time, with the call that `evaluation.token_losses` makes."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device

    def forward(self, input_ids, position_ids, conversations, use_cache, logits_to_keep):
        prompt = self.model.get_prompt(batch_size=1)  # (1, virtual tokens, hidden)
        row = torch.cat([prompt, self.model.word_embeddings(input_ids).to(prompt.dtype)], dim=1)
        row = row.to(self.model.base_model.dtype)
        return self.model.base_model(
            inputs_embeds=row, use_cache=use_cache, logits_to_keep=logits_to_keep + prompt.shape[1]
        )


def prepared(model, arm):
    """A copy of the model with the arm's method on it, in training mode."""
    model, method = copy.deepcopy(model), arm["method"]
    if method == "full":
        return model.requires_grad_(True)
    if method in ("LoRA", "DoRA", "LoRA+"):
        targets = list(arm["targets"])
        config = peft.LoraConfig(r=arm["r"], lora_alpha=arm["alpha"], target_modules=targets, use_dora=method == "DoRA")
    elif method == "norms only":
        config = peft.LNTuningConfig(target_modules=NORMS)
    elif method == "IA3":
        config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    else:
        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=16,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="请用中文认真回答下面的问题。",
            tokenizer_name_or_path=loading.resolve(BASE),
        )
    model = peft.get_peft_model(model, config)
    return Prompted(model) if method == "prompt tuning" else model


def train(model, batches, arm):
    """AdamW with float32 master copies of whatever is trainable (bf16 would round small steps away)."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: p.detach().float().clone().requires_grad_() for name, p in weights.items()}
    fast = [m for name, m in masters.items() if "lora_B" in name]
    slow = [m for name, m in masters.items() if "lora_B" not in name]
    ratio = 16 if arm["method"] == "LoRA+" else 1
    groups = [{"params": slow, "lr": arm["lr"]}, {"params": fast, "lr": ratio * arm["lr"]}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    losses = []
    for batch in batches:
        parts = [[example] for example in batch] if arm["method"] == "prompt tuning" else [batch]
        labels = sum(label != batching.IGNORE_INDEX for example in batch for label in example.labels[1:])
        total = 0.0
        for part in parts:
            loss = evaluation.token_losses(model, batching.flatten(part)).sum() / labels
            loss.backward()
            total += loss.item()
        for name, p in weights.items():
            masters[name].grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(masters[name])
        losses.append(total)
    return losses, sum(p.numel() for p in weights.values())


def scores(model, tokenizer, rows, one_by_one=False):
    """Bits per byte and each row's nats, for each language of `rows`."""
    made = {
        name: evaluation.score(model, tokenizer, part, TEMPLATE, 1 if one_by_one else 2048)
        for name, part in rows.items()
    }
    return {name: {"bpb": s.bits_per_byte, "nll": [round(nats, 2) for nats in s.nll]} for name, s in made.items()}


def measured(model, tokenizer, examples, held_out, arm):
    """Train and score one arm: its row of the results."""
    torch.manual_seed(arm["seed"])
    order = random.Random(arm["seed"]).sample(examples, len(examples))
    batches = [[order[i] for i in group] for group in batching.groups(order, TOKENS)][:STEPS]
    tuned = prepared(model, arm)
    started = time.process_time()
    losses, parameters = train(tuned, batches, arm)
    seconds = time.process_time() - started
    asked = {"zh": held_out["zh"]} if arm["part"] == "grid" else held_out
    after = scores(tuned, tokenizer, asked, one_by_one=arm["method"] == "prompt tuning")
    tokens = sum(len(example) for batch in batches for example in batch)
    return {
        **arm,
        "parameters": parameters,
        "tokens": tokens,
        "cpu_seconds": round(seconds, 2),
        "losses": [round(loss, 4) for loss in losses],
        **after,
    }


def arms(done):
    """All arms in the order they should run: seed 0 of everything first, then the field's chosen rates."""
    one = {"method": "LoRA", "targets": QV, "r": 8, "alpha": 16, "lr": 1e-3}
    for seed in SEEDS:
        for method, rates in RATES.items():
            for lr in rates if seed == 0 else [best_rate(done, method)]:
                yield {"part": "field", "name": method, **one, "method": method, "lr": lr, "seed": seed}
        for name, (r, targets) in MATRICES.items():
            yield {"part": "matrices", "name": name, **one, "r": r, "alpha": 2 * r, "targets": targets, "seed": seed}
        for r, alpha, lr in itertools.product((1, 8, 64), (16, 64), (3e-4, 1e-3, 3e-3)):
            yield {"part": "grid", "name": f"r {r}, α {alpha}", **one, "r": r, "alpha": alpha, "lr": lr, "seed": seed}


def best_rate(done, method):
    """The rate of seed 0 with the lowest mean training loss over the last quarter of the steps."""
    rows = [row for row in done if row["part"] == "field" and row["method"] == method and row["seed"] == 0]
    return min(rows, key=lambda row: sum(row["losses"][-STEPS // 4 :]))["lr"]


def key(arm):
    return tuple(str(arm[field]) for field in ("part", "name", "lr", "seed"))


def main():
    options = study.options(__doc__)
    started = time.perf_counter()
    model, tokenizer = loading.load(BASE)
    model.requires_grad_(False)
    train_rows, zh = messages.split(messages.read(ROOT / "data_samples" / "belle_zh.jsonl"))
    en = messages.split(messages.read(ROOT / "data_samples" / "alpaca_en.jsonl"))[1]
    rendered = [templates.render(row, TEMPLATE, tokenizer.eos_token) for row in train_rows]
    examples = [e for e in (batching.encode(s, tokenizer, 512) for s in rendered) if e and len(e) <= LONGEST]
    held_out = {"zh": zh[:HELD_OUT], "en": en[:HELD_OUT]}

    if options.budget == "smoke":
        row = measured(model, tokenizer, examples, held_out, next(arms([])))
        print({name: value for name, value in row.items() if name not in ("zh", "en", "losses")})
        print("held-out bits per byte:", {name: round(row[name]["bpb"], 4) for name in ("zh", "en")})
        return 0

    done = study.load(NAME)
    if not done:
        done = [{"part": "base", "name": "base", "lr": 0.0, "seed": 0, **scores(model, tokenizer, held_out)}]
    finished = {key(row) for row in done}
    for arm in arms(done):
        if key(arm) in finished:
            continue
        if time.perf_counter() - started > 60 * options.minutes:
            return 75
        done.append(measured(model, tokenizer, examples, held_out, arm))
        study.save(NAME, done, base=BASE, steps=STEPS, tokens_per_step=TOKENS, held_out=HELD_OUT, seeds=list(SEEDS))
        print(
            *key(arm),
            *(f"{name} {done[-1][name]['bpb']:.4f}" for name in ("zh", "en") if name in done[-1]),
            f"{done[-1]['cpu_seconds']} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
