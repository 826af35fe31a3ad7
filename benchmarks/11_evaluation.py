"""Study 11: what the way of asking does to an exam's marks, and what a repetition penalty hides.

Three parts, on the running model and on the shipped adapter:

* **exam**: the book's 180 questions under every scoring, with 0 and 5 worked examples, and with none (by letters)
  as a chat. The letters are read in float32, where equal logits are rare; the options' texts and what is generated
  in the hardware's 16-bit format, for time.
* **lm-eval**: log-likelihoods by lm-eval 0.4 of three questions' letters, with five worked examples, in float32: the
  chapter compares its own with them.
* **penalty**: sixteen held-out Chinese questions answered under repetition penalties from 1.0 to 3.0, laid on the
  answer only or on the prompt as well, three draws each; and the bits per byte of the *written* answers of those rows
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

NAME, BASE, TEMPLATE = "11-evaluation", "smollm2-135m", "chatml"
ADAPTERS = {"base": None, "smollm2-zh": ROOT / "data_samples" / "adapters" / "smollm2-zh"}
EXAM = ROOT / "data_samples" / "exam"
PENALTIES = (1.0, "answer"), (2.0, "answer"), (2.0, "all"), (3.0, "answer"), (1.3, "answer")  # what is laid where
PENALTIES += (3.0, "all"), (1.3, "all"), (1.6, "answer"), (1.1, "answer")
ANSWERED, DRAWS = 16, 3  # questions, and answers drawn to each
LISTED = "{{question}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案："  # the question as lm-eval's templates write it
DECODING = Decoding(temperature=0.7, top_k=40, top_p=1.0, max_new_tokens=64)
LAID = [replace(DECODING, repetition_penalty=penalty, penalise=where) for penalty, where in PENALTIES]


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


def lm_eval(model, tokenizer, subject, text, choices, shots):
    """lm-eval's log-likelihoods of the four choices of each question: rows of a local data set, a model in memory."""
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    def rows(some):
        named = [{"question": q.text, "answer": q.answer} | dict(zip("ABCD", q.options, strict=True)) for q in some]
        return Dataset.from_list(named)

    data = {"dev": rows(subject.examples), "val": rows(subject.questions)}
    config = {
        "task": "book",
        "custom_dataset": lambda **_: data,
        "validation_split": "val",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "description": subject.heading,
        "doc_to_text": text,
        "doc_to_choice": choices,
        "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
        "target_delimiter": "",  # by default it scores " A"
        "num_fewshot": shots,
    }
    lm, task = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), ConfigurableTask(config=config)
    found = simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0, log_samples=True)
    return [[likelihood for ((likelihood, _),) in sample["resps"]] for sample in found["samples"]["book"]]


def theirs(model, tokenizer, name):
    """lm-eval's log-likelihoods of the letters of a subject's first three questions."""
    (subject,) = [subject for subject in questions.read(EXAM, 5, 3) if subject.name == name]
    return lm_eval(model, tokenizer, subject, LISTED, list("ABCD"), 5)


def asked():
    """The held-out Chinese rows that are answered: the first ones of one question and one answer."""
    rows = messages.split(messages.read(ROOT / "data_samples" / "belle_zh.jsonl"))[1]
    return [row for row in rows if len(row) == 2 and len(row[-1].content) > 40][:ANSWERED]


def answered(model, tokenizer, decoding, rows):
    """The numbers of each answer, `DRAWS` answers a question, drawn independently in one batch."""
    again = [row[:-1] for _ in range(DRAWS) for row in rows]
    found = generation.ended(model, tokenizer, again, TEMPLATE, decoding, batch=len(again))
    numbers = [behaviour.describe(text, stopped) for text, stopped in found]
    columns = {key: [round(float(one[key]), 4) for one in numbers] for key in numbers[0]}
    return columns | {"answers": [text for text, _ in found]}


def priced(model, tokenizer, rows):
    """Nats of each row's own answer under each penalised distribution, and its bytes."""
    scores = behaviour.penalised_bits(model, tokenizer, rows, TEMPLATE, LAID)
    about = [{"penalty": way.repetition_penalty, "penalise": way.penalise} for way in LAID]
    columns = [{"nll": [round(nats, 3) for nats in score.nll], "bytes": score.text_bytes} for score in scores]
    return [one | two for one, two in zip(about, columns, strict=True)]


def arms():
    """Every arm as (the key that names it, its number format, what measures it)."""
    rows = asked()
    yield {"model": "base", "part": "lm-eval", "subject": "geography"}, "float32", partial(theirs, name="geography")
    yield {"model": "smollm2-zh", "part": "bits"}, "auto", partial(priced, rows=rows)
    yield from exam_arms(shots=0)
    for way in LAID:
        about = {"model": "smollm2-zh", "penalty": way.repetition_penalty, "penalise": way.penalise}
        yield about | {"part": "answers"}, "auto", partial(answered, decoding=way, rows=rows)
    yield from exam_arms(shots=5)


def exam_arms(shots):
    """Both models by letters, options and writing; without examples also as a chat."""
    for name in ADAPTERS:
        about = {"model": name, "part": "exam", "shots": shots}
        for way, template in (("plain", ""), ("chat", TEMPLATE))[: 1 if shots else 2]:
            measure = partial(letters, shots=shots, template=template)
            yield about | {"asked": way, "by": "letters"}, "float32", measure
        yield about | {"asked": "plain", "by": "options"}, "auto", partial(options, shots=shots)
        yield about | {"asked": "plain", "by": "generation"}, "auto", partial(generated, shots=shots)


def main():
    options_given, began, held = study.options(__doc__), time.perf_counter(), (None, None)
    if options_given.budget == "smoke":
        model, tokenizer = loading.load(BASE)
        print(letters(model, tokenizer, 0, limit=2), options(model, tokenizer, 0, limit=2))
        print(generated(model, tokenizer, 0, limit=2), priced(model, tokenizer, asked()[:1]))
        print(answered(model, tokenizer, LAID[-1], asked()[:2]))
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
        study.save(NAME, done, base=BASE, questions=ANSWERED, draws=DRAWS, max_new_tokens=DECODING.max_new_tokens)
        print(about, f"{done[-1]['cpu_seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
