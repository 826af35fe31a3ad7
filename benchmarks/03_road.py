"""Study of chapter 03: the whole road of Chinese-LLaMA, with and without new pieces, on one budget.

* grown: 2,048 more pieces; LoRA and the new rows read plain Chinese text, then LoRA learns from instructions.
* own: the running model's own vocabulary; LoRA reads the same text, then the same instructions.

Both arms see the same *bytes* of text once and the same rows once, by the recipes `smollm2-zh-pretrain` and
`smollm2-zh-sft`, with three seeds. A block of text has half as many tokens in the grown arm, which is about as many
bytes, so that both arms take about as many steps. After each leg: bits per byte of held-out text, of held-out Chinese
answers and of English ones. At the end of the road both models are merged, written as f16 GGUF and asked the same
questions by llama.cpp; what an answer costs is tokens a character, and characters a second.

    python benchmarks/03_road.py                    # every arm and seed that is not in the results file yet
    python benchmarks/03_road.py --minutes 20       # start no arm after 20 minutes; exit code 75: there is more
    python benchmarks/03_road.py --budget smoke     # a few steps of both arms, printed and not kept
"""

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import study
import torch

from cvlib import (
    ROOT,
    batching,
    embeddings,
    engines,
    evaluation,
    export,
    extension,
    loading,
    messages,
    recipes,
    texts,
    training,
)

NAME, BASE, PIECES, SEEDS, ARMS = "03-road", "smollm2-135m", 2048, (0, 1, 2), ("own", "grown")
TEXT_BYTES, ROWS, LONGEST = 40_000, 128, 300  # text read, instruction rows, characters of the longest line taken
HELD_OUT_BYTES, HELD_OUT_ROWS = 6_000, 32
BLOCK = {"own": 256, "grown": 128}  # tokens: about as many bytes of text
RUNS = ROOT / "runs" / "road"


def some(lines, size, seed):
    """Lines in a seed's order, about `size` bytes in all."""
    taken, used = [], 0
    for line in random.Random(seed).sample(lines, len(lines)):
        if used >= size:
            break
        if len(line) <= LONGEST:
            taken.append(line)
            used += len(line.encode())
    return taken


def sides(name):
    """Lines of a packaged text to learn from, and those held out."""
    return texts.split(texts.lines(name))


def mixed(side, size, seed):
    """The same number of bytes from every packaged text, shuffled; `side` 0 is for learning, 1 held out."""
    lines = [line for name in texts.PACKAGED for line in some(sides(name)[side], size // len(texts.PACKAGED), seed)]
    return random.Random(seed).sample(lines, len(lines))


def prepared(folder):
    """What both arms share: the grown tokenizer, and the held-out text and rows."""
    corpus = extension.packaged_corpus(folder)
    grown = extension.extend(loading.resolve(BASE), corpus.texts, folder / "grown", PIECES, corpus.words, multiple=64)
    rows = {name: messages.read(ROOT / f"data_samples/{name}.jsonl") for name in ("belle_zh", "alpaca_en")}
    held_out = {name: messages.split(rows[name])[1][:HELD_OUT_ROWS] for name in rows}
    return grown.path, mixed(1, HELD_OUT_BYTES, 0), held_out


@torch.no_grad()
def scores(model, tokenizer, held_text, held_out, template):
    """Bits per byte of held-out text and of the answers in each set of rows."""
    model.eval()
    nll = [
        evaluation.token_losses(model, batching.flatten([block])).double()
        for block in batching.blocks(held_text, tokenizer, 512)
    ]
    size = sum(len(line.encode()) for line in held_text)
    found = {"text": evaluation.bits_per_byte(torch.cat(nll), size)}
    for name, rows in held_out.items():
        found[name] = evaluation.score(model, tokenizer, rows, template).bits_per_byte
    return {name: round(value, 5) for name, value in found.items()}


def rows_file(path, seed, count):
    """Instruction rows of one seed, from the training side."""
    rows = messages.split(messages.read(ROOT / "data_samples/belle_zh.jsonl"))[0]
    chosen = random.Random(seed).sample(rows, count)
    lines = [json.dumps({"messages": [turn.row() for turn in row]}, ensure_ascii=False) for row in chosen]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def travelled(arm, seed, grown, held_text, held_out, size=TEXT_BYTES, count=ROWS, runs=RUNS):
    """One arm down the whole road, its adapters under `runs`; its scores after each leg."""
    here = runs / f"{arm}-{seed}"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    text = here / "text.txt"
    text.write_text("\n".join(mixed(0, size, seed)), encoding="utf-8")
    blocks = [f"data.max_length={BLOCK[arm]}", "schedule.batch_rows=4", "schedule.micro_rows=4"]
    growth = [f"growth.tokenizer={grown}"] if arm == "grown" else ['growth.tokenizer=""']
    common = [f"schedule.seed={seed}", "schedule.max_steps=0", "schedule.epochs=1"]
    first = recipes.load("smollm2-zh-pretrain", [f"data.text=[{text}]", *blocks, *growth, *common])
    second = recipes.load("smollm2-zh-sft", [f"data.train=[{rows_file(here / 'rows.jsonl', seed, count)}]", *common])
    began, row = time.process_time(), {"arm": arm, "seed": seed, "bytes": text.stat().st_size}
    run = training.train(first, here / "pretrained")
    row |= {"pretrain_steps": len(run.steps), "pretrain_cpu_seconds": round(time.process_time() - began, 1)}
    row["pretrained"] = scores(run.model, run.tokenizer, held_text, held_out, second.template)
    began = time.process_time()
    run = training.train(second, here / "tuned", init=here / "pretrained")
    row |= {"sft_steps": len(run.steps), "sft_cpu_seconds": round(time.process_time() - began, 1)}
    row["tuned"] = scores(run.model, run.tokenizer, held_text, held_out, second.template)
    return row


def start(arm, grown, held_text, held_out):
    """Where an arm stands before it has read anything."""
    model, tokenizer = loading.load(BASE)
    if arm == "grown":
        embeddings.grow(model, embeddings.spelt(grown, loading.resolve(BASE)))
        tokenizer = loading.read_tokenizer(str(grown))
    return scores(model, tokenizer, held_text, held_out, "chatml")


def answers(arm, seed=SEEDS[0], tokens=96):
    """The merged model as a GGUF, asked by llama.cpp: answers, and what they cost."""
    here = RUNS / f"{arm}-{seed}"
    file = here / "road.gguf"
    if not file.is_file():
        merged = export.merge(BASE, [here / "tuned"], here / "merged", dtype="float32")
        export.gguf(merged.folder, file, "f16")
    engine = engines.LlamaCpp(file)
    tokenizer = loading.read_tokenizer(str(here / "merged"))
    decoding = recipes.Decoding(temperature=0, repetition_penalty=1.1, max_new_tokens=tokens)
    said, seconds = [], 0.0
    list(engine.stream([messages.Message("user", "你好")], decoding))  # the first answer of an engine is slower
    for question in json.loads((ROOT / "data_samples/showcase.json").read_text(encoding="utf-8")):
        began = time.perf_counter()
        text = "".join(engine.stream([messages.Message("user", question)], decoding))
        seconds += time.perf_counter() - began
        said.append({"question": question, "answer": text})
    written = "".join(item["answer"] for item in said)
    count = sum(len(tokenizer(item["answer"], add_special_tokens=False).input_ids) for item in said)
    about = {"arm": arm, "seed": seed, "characters": len(written), "tokens": count, "seconds": round(seconds, 2)}
    return about | {"han_share": evaluation.han_share([written]), "said": said}


def main():
    options, clock = study.options(__doc__), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        grown, held_text, held_out = prepared(Path(folder))
        if options.budget == "smoke":
            for arm in ARMS:
                print(travelled(arm, 0, grown, held_text, held_out, size=3_000, count=8, runs=Path(folder)))
            return 0
        about = {"base": BASE, "pieces": PIECES, "text_bytes": TEXT_BYTES, "instruction_rows": ROWS}
        about["start"] = {arm: start(arm, grown, held_text, held_out) for arm in ARMS}
        for seed in SEEDS:
            for arm in ARMS:
                done = study.load(NAME)
                if any((row["arm"], row["seed"]) == (arm, seed) for row in done):
                    continue
                if time.perf_counter() - clock > 60 * options.minutes:
                    return 75
                study.save(NAME, [*done, travelled(arm, seed, grown, held_text, held_out)], **about)
        study.save(NAME, study.load(NAME), **about, answers=[answers(arm) for arm in ARMS])
    return 0


if __name__ == "__main__":
    sys.exit(main())
