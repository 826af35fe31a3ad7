"""Marks: equal to lm-eval's, whatever the batch and the cache; averages by hand; the command on CMMLU's 67 files."""

import importlib
import json
from dataclasses import replace

import pytest
import torch

from cvlib import ROOT, InputError, exams, loading, questions
from cvlib.batching import prompt_ids
from cvlib.exams import Marks
from cvlib.questions import Question, Subject

EXAM = ROOT / "data_samples" / "exam"
KNOWN = json.loads((ROOT / "cvlib" / "subjects.json").read_text(encoding="utf-8"))


def sums(start, count):
    """Small sums as questions; the right option stands at each letter in turn."""
    made = []
    for number in range(start, start + count):
        options = [number + wrong for wrong in (1, 2, 3)]
        options.insert(number % 4, 2 * number)
        made.append(Question(f"{number}+{number}=", tuple(map(str, options)), "ABCD"[number % 4]))
    return made


def subject(examples=2, asked=7, name="logic", category="Humanities", china=False):
    return Subject(name, "逻辑学", category, china, sums(20, examples), sums(3, asked))


@pytest.fixture(scope="module")
def small(tiny):
    model, tokenizer = loading.load(str(tiny), dtype="float32")
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def geography():
    """A real subject, five worked examples and three questions."""
    (found,) = [one for one in questions.read(EXAM, shots=5, limit=3) if one.name == "geography"]
    return found


# prompts


def test_the_prompt_is_the_published_one(geography, tokenizer):
    (plain,) = exams.segments(geography, geography.questions[0], tokenizer)
    assert plain.text.startswith("以下是中国关于地理考试的单项选择题，请选出其中的正确答案。\n\n")
    assert plain.text.count("\n答案：") == 6
    assert plain.text.endswith("\n答案：")
    chat = exams.segments(geography, geography.questions[0], tokenizer, "chatml")
    said = [segment.text for segment in chat if segment.trained and not segment.control]
    assert said == [example.answer for example in geography.examples]
    assert chat[-1].text.endswith("<|im_start|>assistant\n")


def test_the_options_are_not_listed_where_their_text_is_the_answer(geography, tokenizer):
    (plain,) = exams.segments(geography, geography.questions[0], tokenizer, listed=False)
    assert "\nA. " not in plain.text
    assert f"答案：{geography.examples[0].right}\n\n" in plain.text


# likelihoods


@pytest.mark.parametrize("template", ["", "chatml"])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_neither_cache_nor_batch_changes_a_number(small, template, batch):
    """Each prompt read alone, whole and without a cache, gives the same letters and the same options."""
    model, tokenizer = small
    asked = subject()
    places = exams.letter_tokens(tokenizer)
    letters = exams.letters(model, tokenizer, asked, template, batch)
    answers = exams.answers(model, tokenizer, asked, template, batch)
    for question, logs, texts in zip(asked.questions, letters, answers, strict=True):
        ids = prompt_ids(exams.segments(asked, question, tokenizer, template), tokenizer)
        with torch.no_grad():
            alone = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert torch.allclose(logs, alone[places], atol=1e-5)
        start = prompt_ids(exams.segments(asked, question, tokenizer, template, listed=False), tokenizer)
        for option, found in zip(question.options, texts.tolist(), strict=True):
            ending = tokenizer(option, add_special_tokens=False).input_ids
            with torch.no_grad():
                chances = model(torch.tensor([start + ending])).logits[0].log_softmax(-1)[len(start) - 1 : -1]
            assert found == pytest.approx(chances.gather(1, torch.tensor([ending]).T).sum().item(), abs=1e-4)


def test_the_examples_are_read_once(small, monkeypatch):
    model, tokenizer = small
    seen, forward = [], exams.forward

    def watched(model, ids, *rest):
        seen.append(ids.shape)
        return forward(model, ids, *rest)

    monkeypatch.setattr(exams, "forward", watched)
    list(exams.letters(model, tokenizer, subject(asked=5), batch=2))
    prefix, *batches = seen
    assert prefix[0] == 1
    assert prefix[1] > 4 * max(shape[1] for shape in batches)
    assert [shape[0] for shape in batches] == [2, 2, 1]


def test_what_is_written_does_not_depend_on_the_batch(small):
    model, tokenizer = small
    one, many = (list(exams.written(model, tokenizer, subject(), "", batch)) for batch in (1, 16))
    assert one == many
    ids = prompt_ids(exams.segments(subject(), subject().questions[0], tokenizer), tokenizer)
    with torch.no_grad():
        alone = model.generate(torch.tensor([ids]), max_new_tokens=exams.WRITTEN, do_sample=False)[0, len(ids) :]
    assert tokenizer.decode(alone, skip_special_tokens=True) == one[0]


def test_log_likelihoods_equal_lm_evals(model, tokenizer, geography, monkeypatch):
    """The letters with five worked examples, the options' texts with none: to 1e-3 of lm-eval 0.4, offline."""
    pytest.importorskip("lm_eval")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    study = importlib.import_module("11_evaluation")
    bare = replace(geography, examples=[])
    letters = torch.stack(list(exams.letters(model, tokenizer, geography)))[:, 0]
    texts = torch.stack(list(exams.answers(model, tokenizer, bare)))
    theirs = study.lm_eval(model, tokenizer, geography, study.LISTED, list("ABCD"), 5)
    assert torch.allclose(letters, torch.tensor(theirs), atol=1e-3)
    texts_asked = ("{{question}}\n答案：", "{{[A, B, C, D]}}", 0)
    assert torch.allclose(texts, torch.tensor(study.lm_eval(model, tokenizer, bare, *texts_asked)), atol=1e-3)


def test_one_cell_of_the_stored_study_comes_out_again(model, tokenizer, geography):
    study = json.loads((ROOT / "benchmarks/results/11-evaluation.json").read_text(encoding="utf-8"))
    about = {"model": "base", "part": "exam", "shots": 5, "asked": "plain", "by": "letters"}
    (stored,) = [row["found"] for row in study["rows"] if about.items() <= row.items()]
    again = list(exams.letters(model, tokenizer, geography))
    for scoring, scores in exams.BY_LETTER.items():
        assert stored[scoring]["geography"][:3] == "".join(exams.likeliest(scores(logs)) for logs in again)


# choices


def test_the_scorings_on_numbers_by_hand():
    """As "A" and as " A" the four letters are this likely; each reading has another favourite."""
    chances = torch.tensor([[0.40, 0.30, 0.05, 0.01], [0.001, 0.05, 0.14, 0.02]])
    logs = chances.log()
    picked = {name: exams.likeliest(scores(logs)) for name, scores in exams.BY_LETTER.items()}
    assert picked == {"letter": "A", "both-logits": "B", "both-probabilities": "A"}
    logs, sizes = torch.tensor([-6.0, -8.0, -9.0, -10.0]), torch.tensor([3, 12, 3, 3])
    picked = {name: exams.likeliest(scores(logs, sizes)) for name, scores in exams.BY_ANSWER.items()}
    assert picked == {"answer": "A", "answer-per-byte": "B"}


def test_an_empty_option_is_never_chosen(small):
    model, tokenizer = small
    asked = Subject("x", "x", "Other", False, [], [Question("1+1=", ("", "2", "3", "4"), "B")])
    for scoring in exams.BY_ANSWER:
        assert exams.sit(model, tokenizer, [asked], scoring)[0].chosen != ["A"]


@pytest.mark.parametrize("scoring", exams.SCORINGS)
def test_sitting_twice_gives_the_same_and_leaves_the_mode(small, scoring):
    model, tokenizer = small
    model.train()
    first, second = (exams.sit(model, tokenizer, [subject(asked=3)], scoring, batch=batch) for batch in (1, 16))
    assert model.training
    model.eval()
    assert first == second
    assert len(first[0].right) == 3


def test_what_cannot_be_sat(small):
    model, tokenizer = small
    with pytest.raises(InputError, match="scoring 'best' is unknown; choose one of letter, both-logits"):
        exams.sit(model, tokenizer, [subject()], "best")
    with pytest.raises(InputError, match="exceeds the context of 512; ask with fewer --shots"):
        exams.sit(model, tokenizer, [subject(examples=30)])


# averages


def test_micro_weighs_questions_and_macro_subjects():
    one = Marks(subject(asked=1, category="STEM"), [sums(3, 1)[0].answer])
    other = Marks(subject(asked=9, category="STEM"), [""] * 9)
    found = exams.report([one, other], "letter", 5)["groups"][0]
    assert (found["name"], found["questions"], found["right"]) == ("STEM", 10, 1)
    assert found["micro"] == 0.1
    assert found["macro"] == 0.5
    assert found["low"] < 0.1 < found["high"]


def test_each_subject_counts_in_its_one_category():
    """All 67 subjects of CMMLU: four categories add up to the whole, and "China specific" is a second look."""
    marks = [
        Marks(subject(asked=2, name=name, category=about["category"], china=about.get("china", False)), ["A", "A"])
        for name, about in KNOWN["CMMLU"].items()
    ]
    *categories, whole, china = exams.report(marks, "letter", 0)["groups"]
    assert [group["name"] for group in categories] == ["STEM", "Humanities", "Social Science", "Other"]
    assert sum(group["subjects"] for group in categories) == whole["subjects"] == 67
    assert sum(group["questions"] for group in categories) == whole["questions"] == 134
    assert (china["name"], china["subjects"]) == ("of these China specific", 15)


# the command


@pytest.fixture
def cmmlu(tmp_path):
    """CMMLU's own layout: 67 files in dev/ and in test/, with its header."""
    for part, asked in (("dev", sums(20, 5)), ("test", sums(3, 4))):
        (tmp_path / "cmmlu" / part).mkdir(parents=True)
        rows = [f"{n},{q.text},{','.join(q.options)},{q.answer}\n" for n, q in enumerate(asked)]
        for name in KNOWN["CMMLU"]:
            path = tmp_path / "cmmlu" / part / f"{name}.csv"
            path.write_text(",Question,A,B,C,D,Answer\n" + "".join(rows), encoding="utf-8")
    return tmp_path / "cmmlu"


def test_the_command_runs_on_cmmlus_folder(cmmlu, tiny, run):
    code, out, err = run("evaluate", tiny, "--exam", cmmlu, "--limit", 1, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["sets"] == []
    exam = found["exam"]
    assert (exam["scoring"], exam["shots"], exam["chance"]) == ("letter", 5, 0.25)
    assert len(exam["subjects"]) == 67
    assert [group["questions"] for group in exam["groups"]] == [17, 13, 22, 15, 67, 15]
    assert "exam" in err
    assert "67/67" in err or "question" in err
    code, out, _ = run("evaluate", tiny, "--exam", cmmlu, "--limit", 1, "--shots", 0, "--scoring", "both-logits")
    assert code == 0
    assert "of these China specific" in out


def test_the_command_scores_plain_text(tiny, rows_file, tmp_path, run):
    text = tmp_path / "text.txt"
    text.write_text("一行文字。\n又一行。\n", encoding="utf-8")
    code, out, _ = run("evaluate", tiny, "--text", text, "--rows", rows_file, "--limit", 2, "--json")
    assert code == 0
    rows, plain = json.loads(out)["sets"]
    assert (rows["file"], plain["file"]) == (str(rows_file), str(text))
    assert plain["low"] <= plain["bits_per_byte"] <= plain["high"]
    assert "han_share" not in plain


def test_exams_that_cannot_be_used(cmmlu, tiny, tmp_path, refused):
    refused(["evaluate", tiny, "--exam", tmp_path / "none"], "no such folder")
    refused(["evaluate", tiny, "--exam", tmp_path], "no .csv files in val/ or test/")
    refused(["evaluate", tiny, "--exam", cmmlu, "--shots", "6"], "has 5 worked examples", "fewer --shots")
    refused(["evaluate", tiny, "--exam", cmmlu, "--limit", "1", "--scoring", "best"], "scoring 'best' is unknown")
    path = cmmlu / "test" / "agronomy.csv"
    path.write_text(",Question,A,B,C,D\n0,问,1,2,3,4\n", encoding="utf-8")
    refused(["evaluate", tiny, "--exam", cmmlu], f"{path}: no column 'answer'")
    path.write_text(",Question,A,B,C,D,Answer\n0,问,1,2,3,4,F\n", encoding="utf-8")
    refused(["evaluate", tiny, "--exam", cmmlu], f"{path}:2: the answer is 'F'; write A, B, C or D")


def test_texts_that_cannot_be_scored(tiny, tmp_path, refused):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    refused(["evaluate", tiny, "--text", empty], f"{empty}: the file is empty")
    refused(["evaluate", tiny, "--text", tmp_path / "none.txt"], "none.txt", "No such file")
