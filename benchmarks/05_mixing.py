"""Study of chapter 05: what the languages of a mix do to each language of the model.

Three arms, three seeds, the same number of tokens for all: Chinese only; Chinese and multilingual rows; Chinese,
multilingual rows and an English replay. `cvlib.mixture` writes each mix, a seed draws its rows, their order and the
adapter's start. The model is scored on held-out rows before and after: bits per byte of the answers, row by row, with
each row's language. One run takes 60 to 90 seconds on two cores.

    python benchmarks/05_mixing.py                    # every arm that is not in the results file yet
    python benchmarks/05_mixing.py --minutes 3        # start no arm after 3 minutes; exit code 75: there is more to do
    python benchmarks/05_mixing.py --budget smoke     # one cell with a tenth of the tokens, printed and not kept
"""

import copy
import sys
import tempfile
import time
from pathlib import Path

import peft
import study
import torch

from cvlib import ROOT, batching, census, evaluation, loading, messages, mixture, templates

NAME, BASE, TEMPLATE = "05-mixing", "smollm2-135m", "chatml"
TOKENS, PER_STEP, LONGEST, RATE, SEEDS = 30_000, 500, 384, 1e-3, (0, 1, 2)
CHINESE = {"data_samples/belle_zh.jsonl": 4, "data_samples/chat_zh.jsonl": 1}
MULTILINGUAL, ENGLISH = {"data_samples/guanaco_multi.jsonl": 2}, {"data_samples/alpaca_en.jsonl": 2}
#: Shares of rows, not of tokens: the weights of each mix.
ARMS = {
    "Chinese": CHINESE,
    "+ multilingual": CHINESE | MULTILINGUAL,
    "+ English replay": CHINESE | MULTILINGUAL | ENGLISH,
}
HELD_OUT = {"Chinese": "belle_zh", "multilingual": "guanaco_multi", "English": "alpaca_en"}


def held_out(limit):
    """At most `limit` held-out conversations of each set."""
    files = {name: ROOT / "data_samples" / f"{file}.jsonl" for name, file in HELD_OUT.items()}
    return {name: messages.split(messages.read(file))[1][:limit] for name, file in files.items()}


def scores(model, tokenizer, rows):
    """Bits per byte of each set, and each row's nats, bytes and language."""
    result = {}
    for name, part in rows.items():
        found = evaluation.score(model, tokenizer, part, TEMPLATE)
        languages = [census.language(row[-1].content) for row in part]
        nll = [round(nats, 4) for nats in found.nll]
        result[name] = {"bpb": found.bits_per_byte, "nll": nll, "bytes": found.text_bytes, "languages": languages}
    return result


def steps(arm, seed, tokenizer, tokens):
    """The mix of an arm as steps of examples, `tokens` in all."""
    plan = mixture.Plan(ARMS[arm], [f"data_samples/{file}.jsonl" for file in HELD_OUT.values()], rows=400)
    plan.temperature, plan.seed = float("inf"), seed
    with tempfile.TemporaryDirectory() as folder:
        mixture.mix(plan, out := Path(folder) / "mix.jsonl")
        rendered = [templates.render(row, TEMPLATE, tokenizer.eos_token) for row in messages.read(out)]
    examples = [batching.encode(segments, tokenizer, LONGEST) for segments in rendered]
    taken, used = [], 0
    for group in batching.groups([example for example in examples if example], PER_STEP):
        taken.append([examples[place] for place in group])
        used += sum(map(len, taken[-1]))
        if used >= tokens:
            return taken, used
    raise ValueError(f"the mix holds {used} tokens; raise its rows")


def train(model, batches):
    """LoRA on every matrix of the blocks, one pass; the losses."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(copy.deepcopy(model), config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0), []
    for batch in batches:
        loss = evaluation.token_losses(model, batching.flatten(batch)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
    return model, losses


def measured(model, tokenizer, rows, arm, seed, tokens=TOKENS):
    """Train and score one arm: its row of the results."""
    torch.manual_seed(seed)
    batches, used = steps(arm, seed, tokenizer, tokens)
    started = time.perf_counter()
    tuned, losses = train(model, batches)
    seconds = time.perf_counter() - started
    about = {"arm": arm, "seed": seed, "tokens": used, "seconds": round(seconds, 1), "losses": losses}
    return about | scores(tuned, tokenizer, rows)


def main():
    options = study.options(__doc__)
    started = time.perf_counter()
    model, tokenizer = loading.load(BASE)
    model.requires_grad_(False)

    if options.budget == "smoke":
        row = measured(model, tokenizer, held_out(8), "+ English replay", 0, TOKENS // 10)
        print({key: row[key] for key in ("arm", "seed", "tokens", "seconds")})
        print("held-out bits per byte:", {name: round(row[name]["bpb"], 3) for name in HELD_OUT})
        return 0

    rows, done = held_out(45), study.load(NAME)
    if not done:
        done = [{"arm": "before", "seed": 0, "tokens": 0} | scores(model, tokenizer, rows)]
    finished = {(row["arm"], row["seed"]) for row in done}
    for seed in SEEDS:
        for arm in ARMS:
            if (arm, seed) in finished:
                continue
            if time.perf_counter() - started > 60 * options.minutes:
                return 75
            done.append(measured(model, tokenizer, rows, arm, seed))
            study.save(NAME, done, base=BASE, tokens=TOKENS, learning_rate=RATE, weights=ARMS)
            print(
                arm, seed, {name: round(done[-1][name]["bpb"], 4) for name in HELD_OUT}, done[-1]["seconds"], flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
