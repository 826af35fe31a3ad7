"""Study 11: what the way of asking does to an exam's marks, and what a repetition penalty hides.

Two parts, both on the running model and on the shipped adapter:

* **exam**: the book's 180 questions under every scoring, with 0 and 5 worked examples, and with none (by letters)
  as a chat. The letters are read in float32, where equal logits are rare; the options' texts and what is generated
  in the hardware's 16-bit format, for time.
* **penalty**: sixteen held-out Chinese questions answered under repetition penalties from 1.0 to 3.0, laid on the
  answer only or on the prompt as well, three seeds each; and the bits per byte of the *written* answers of those rows
  under the same penalised distribution.

    python benchmarks/11_evaluation.py                    # every arm that is not in the results file yet
    python benchmarks/11_evaluation.py --minutes 3        # start no arm after 3 minutes; exit code 75: there is more
    python benchmarks/11_evaluation.py --budget smoke     # one short arm, printed and not kept
"""

import sys
import time
from dataclasses import replace
from functools import partial

import study

from cvlib import ROOT, behaviour, exams, generation, loading, messages, questions
from cvlib.recipes import Decoding

NAME, BASE, TEMPLATE, SEEDS = "11-evaluation", "smollm2-135m", "chatml", (0, 1, 2)
ADAPTERS = {"base": None, "smollm2-zh": ROOT / "data_samples" / "adapters" / "smollm2-zh"}
EXAM, SHOTS = ROOT / "data_samples" / "exam", (0, 5)
PENALTIES, ANSWERED = (1.0, 1.1, 1.3, 1.6, 2.0, 3.0), 16
DECODING = Decoding(temperature=0.7, top_k=40, top_p=1.0, max_new_tokens=96)


def letters(model, tokenizer, shots, template="", limit=None):
    """What is chosen by each of the three readings of one pass over the letters."""
    chosen = {scoring: {} for scoring in exams.BY_LETTER}
    for subject in questions.read(EXAM, shots, limit):
        found = list(exams.letters(model, tokenizer, subject, template))
        for scoring, scores in exams.BY_LETTER.items():
            chosen[scoring][subject.name] = "".join(exams.likeliest(scores(logs)) for logs in found)
    return chosen


def options(model, tokenizer, shots, template="", limit=None):
    """What is chosen by the options' texts, whole and per byte."""
    chosen = {scoring: {} for scoring in exams.BY_ANSWER}
    for subject in questions.read(EXAM, shots, limit):
        found = list(exams.answers(model, tokenizer, subject, template))
        for scoring, scores in exams.BY_ANSWER.items():
            pairs = zip(found, map(exams.sizes, subject.questions), strict=True)
            chosen[scoring][subject.name] = "".join(exams.likeliest(scores(logs, own)) for logs, own in pairs)
    return chosen


def generated(model, tokenizer, shots, template="", limit=None):
    """What is chosen by writing; "-" where no letter came."""
    subjects = questions.read(EXAM, shots, limit)
    texts = {subject.name: exams.written(model, tokenizer, subject, template) for subject in subjects}
    return {"generation": {name: "".join(exams.first_letter(t) or "-" for t in found) for name, found in texts.items()}}


def asked():
    """The held-out Chinese rows that are answered: the first ones of one question and one answer."""
    rows = messages.split(messages.read(ROOT / "data_samples" / "belle_zh.jsonl"))[1]
    return [row for row in rows if len(row) == 2 and len(row[-1].content) > 40][:ANSWERED]


def answered(model, tokenizer, penalty, penalise, rows, seed):
    """The numbers of each answer, and the answers themselves."""
    decoding = replace(DECODING, repetition_penalty=penalty, penalise=penalise, seed=seed)
    found = generation.ended(model, tokenizer, [row[:-1] for row in rows], TEMPLATE, decoding)
    numbers = [behaviour.describe(text, stopped) for text, stopped in found]
    columns = {key: [round(float(one[key]), 4) for one in numbers] for key in numbers[0]}
    return columns | {"answers": [text for text, _ in found]}


def priced(model, tokenizer, penalty, penalise, rows):
    """Nats and bytes of each row's own answer under the penalised distribution."""
    decoding = replace(DECODING, repetition_penalty=penalty, penalise=penalise)
    found = behaviour.penalised_bits(model, tokenizer, rows, TEMPLATE, decoding)
    return {"nll": [round(nats, 3) for nats in found.nll], "bytes": found.text_bytes}


def arms():
    """Every arm as (the key that names it, its number format, what measures it)."""
    rows = asked()
    for name in ADAPTERS:
        for shots in SHOTS:
            about = {"model": name, "part": "exam", "shots": shots}
            for way, template in (("plain", ""), ("chat", TEMPLATE))[: 1 if shots else 2]:
                measure = partial(letters, shots=shots, template=template)
                yield about | {"asked": way, "by": "letters"}, "float32", measure
            yield about | {"asked": "plain", "by": "options"}, "auto", partial(options, shots=shots)
            yield about | {"asked": "plain", "by": "generation"}, "auto", partial(generated, shots=shots)
    for penalty, way in [(p, w) for p in PENALTIES for w in ("answer", "all") if p > 1 or w == "answer"]:
        about = {"model": "smollm2-zh", "penalty": penalty, "penalise": way}
        laid = {"penalty": penalty, "penalise": way, "rows": rows}
        yield about | {"part": "bits"}, "auto", partial(priced, **laid)
        for seed in SEEDS:
            yield about | {"part": "answers", "seed": seed}, "auto", partial(answered, **laid, seed=seed)


def main():
    options_given, began, held = study.options(__doc__), time.perf_counter(), (None, None)
    if options_given.budget == "smoke":
        model, tokenizer = loading.load(BASE)
        print(letters(model, tokenizer, 0, limit=2), options(model, tokenizer, 0, limit=2))
        print(generated(model, tokenizer, 0, limit=2), priced(model, tokenizer, 1.3, "all", asked()[:2]))
        print(answered(model, tokenizer, 1.3, "all", asked()[:2], 0))
        return 0
    done = study.load(NAME)
    finished = [{key: row[key] for key in row if key not in ("cpu_seconds", "found")} for row in done]
    for about, dtype, measure in arms():
        if about in finished:
            continue
        if time.perf_counter() - began > 60 * options_given.minutes:
            return 75
        if held[0] != (about["model"], dtype):
            held = (about["model"], dtype), loading.load(BASE, dtype=dtype, adapter=ADAPTERS[about["model"]])
        started = time.process_time()
        found = measure(*held[1])
        done.append({**about, "cpu_seconds": round(time.process_time() - started, 1), "found": found})
        study.save(NAME, done, base=BASE, penalties=PENALTIES, seeds=SEEDS, max_new_tokens=DECODING.max_new_tokens)
        print(about, f"{done[-1]['cpu_seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
