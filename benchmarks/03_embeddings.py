"""Study of chapter 03: when does a grown vocabulary pay? Equal *bytes* of Chinese text for every arm.

* base: the running model's own vocabulary, LoRA on q and v.
* mean, random: `PIECES` more pieces, their rows starting from the mean of their sub-pieces or from N(0, 0.02), trained
  together with the same LoRA. The rows have a learning rate of their own: the best of five for seed 0 on a quarter of
  the text, judged by the loss of the last steps (one pass, so every step's text is new).

A step holds the same lines of text in every arm, however many tokens they make; its loss is bits per byte. Three seeds
draw the text, its order, the adapter and the random rows. Scored on the way, at every mark of `MARKS`: held-out lines
of the same sources, and English.

    python benchmarks/03_embeddings.py                    # every arm that is not in the results file yet
    python benchmarks/03_embeddings.py --minutes 3        # start no arm after 3 minutes; exit code 75: there is more
    python benchmarks/03_embeddings.py --budget smoke     # one short arm, printed and not kept
"""

import math
import random
import sys
import tempfile
import time
from pathlib import Path

import study
import torch

from cvlib import ROOT, adapters, batching, embeddings, evaluation, extension, loading, messages
from cvlib.recipes import Adapter

NAME, BASE, PIECES, SEEDS = "03-embeddings", "smollm2-135m", 2048, (0, 1, 2)
STEP_BYTES, LONGEST, RATE, ROW_RATES = 1_500, 300, 1e-3, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
MARKS = (0, 3_000, 6_000, 12_000, 24_000, 48_000)  # bytes of text seen
TUNING = 12_000  # bytes for each rate that is tried
HELD_OUT = 6_000  # bytes of each held-out text


def cut(lines, size, seed):
    """Lines in a seed's order, `size` bytes in all, none longer than `LONGEST` characters."""
    taken, used = [], 0
    for line in random.Random(seed).sample(lines, len(lines)):
        if used >= size:
            return taken
        taken.append(line[:LONGEST])
        used += len(taken[-1].encode())
    raise ValueError(f"only {used} bytes of text, {size} asked for")


def mixed(sources, size, seed):
    """The same number of bytes from every source, in one shuffled order."""
    lines = [line for source in sources for line in cut(source, size // len(sources), seed)]
    return random.Random(seed).sample(lines, len(lines))


def steps(lines):
    """The lines in groups of about `STEP_BYTES` bytes."""
    group, used = [], 0
    for line in lines:
        group.append(line)
        used += len(line.encode())
        if used >= STEP_BYTES:
            yield group, used
            group, used = [], 0
    if group:
        yield group, used


def encoded(lines, tokenizer):
    """Each line behind an end-of-text token, every token of it predicted: one flat batch."""
    start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    rows = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    return batching.flatten([batching.Example([start, *ids], [batching.IGNORE_INDEX, *ids]) for ids in rows])


def bits(model, tokenizer, lines):
    """Bits per byte of plain text, as a tensor that can be differentiated."""
    total = evaluation.token_losses(model, encoded(lines, tokenizer)).sum()
    return total / math.log(2) / sum(len(line.encode()) for line in lines)


@torch.no_grad()
def scores(model, tokenizer, texts):
    """Bits per byte of each held-out text."""
    model.eval()
    found = {}
    for name, lines in texts.items():
        groups = list(steps(lines))
        weighted = sum(bits(model, tokenizer, group).item() * used for group, used in groups)
        found[name] = round(weighted / sum(used for _, used in groups), 5)
    model.train()
    return found


def prepared(arm, seed, grown):
    """The model and tokenizer of an arm, its adapter on and its rows grown."""
    from transformers import AutoTokenizer

    model, tokenizer = loading.load(BASE)
    model.requires_grad_(False)
    new = range(0)
    if arm != "base":
        tokenizer = AutoTokenizer.from_pretrained(grown)
        new = embeddings.grow(model, embeddings.spelt(grown, loading.resolve(BASE)), arm, seed)
    torch.manual_seed(seed)
    return adapters.add_adapter(model, Adapter(r=16, alpha=32, dropout=0.0), BASE, new=new), tokenizer


def measured(arm, row_rate, seed, size, sources, texts, grown):
    """Train one arm on `size` bytes; its curve of held-out scores and its losses."""
    model, tokenizer = prepared(arm, seed, grown)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = adapters.two_rates(model, RATE, row_rate)
    curve, losses, seen, tokens, started = (
        [{"bytes": 0, **scores(model, tokenizer, texts)}],
        [],
        0,
        0,
        time.process_time(),
    )
    for group, used in steps(mixed(sources, size + 3 * STEP_BYTES, seed)):
        if seen >= size:
            break
        loss = bits(model, tokenizer, group)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        seen, before = seen + used, seen
        tokens += sum(len(ids) for ids in tokenizer(group, add_special_tokens=False)["input_ids"])
        if any(before < mark <= seen for mark in MARKS):
            curve.append({"bytes": seen, **scores(model, tokenizer, texts)})
    seconds = time.process_time() - started
    about = {"arm": arm, "row_rate": row_rate, "seed": seed, "size": size, "tokens": tokens}
    return about | {"cpu_seconds": round(seconds, 1), "curve": curve, "losses": losses}


def best_rate(done, arm):
    """The row rate of the tuning runs with the lowest mean loss over their last quarter."""
    tried = [row for row in done if row["arm"] == arm and row["size"] == TUNING]
    return min(tried, key=lambda row: sum(row["losses"][-len(row["losses"]) // 4 :]))["row_rate"]


def arms(done):
    """All runs in their order: the rates for the rows, then every arm with every seed."""
    for arm in ("mean", "random"):
        for rate in ROW_RATES:
            yield arm, rate, SEEDS[0], TUNING
    for seed in SEEDS:
        yield "base", None, seed, MARKS[-1]
        for arm in ("mean", "random"):
            yield arm, best_rate(done, arm), seed, MARKS[-1]


def main():
    options, began = study.options(__doc__), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        corpus = extension.packaged_corpus(folder)
        made = extension.extend(loading.resolve(BASE), corpus.texts, Path(folder) / "grown", PIECES, corpus.words)
        sources = [path.read_text(encoding="utf-8").splitlines() for path in corpus.texts]
        english = messages.split(messages.read(ROOT / "data_samples" / "alpaca_en.jsonl"))[1]
        zh = mixed([text.splitlines() for text in corpus.held_out.values()], HELD_OUT, 0)
        texts = {"zh": zh, "en": cut([row[-1].content.replace("\n", " ") for row in english], HELD_OUT, 0)}
        run = (sources, texts, made.path)

        if options.budget == "smoke":
            row = measured("mean", ROW_RATES[1], 0, MARKS[1], *run)
            print(row["curve"], f"{row['tokens']} tokens, {row['cpu_seconds']} s")
            return 0
        done = study.load(NAME)
        finished = {(row["arm"], row["row_rate"], row["seed"], row["size"]) for row in done}
        for arm in arms(done):
            if arm in finished:
                continue
            if time.perf_counter() - began > 60 * options.minutes:
                return 75
            done.append(measured(*arm, *run))
            study.save(NAME, done, base=BASE, pieces=PIECES, lora_rate=RATE, marks=list(MARKS))
            print(*arm, done[-1]["curve"][-1], f"{done[-1]['tokens']} tokens, {done[-1]['cpu_seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
