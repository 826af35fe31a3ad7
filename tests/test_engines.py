"""Engines: llama.cpp answers a conversation as transformers does, token for token, with every dial meaning the same."""

import json
import shutil
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cvlib import InputError, engines, export, generation, loading, server
from cvlib.engines import LlamaCpp, Transformers
from cvlib.export import merging
from cvlib.recipes import Decoding
from cvlib.sampling import probabilities

GREEDY = {"temperature": 0, "repetition_penalty": 1}


@pytest.fixture(scope="module")
def spread(tiny, tmp_path_factory):
    """Folder of the tiny model with likeliest tokens that stand out, and one merge, which llama.cpp insists on."""
    folder = tmp_path_factory.mktemp("spread") / "model"
    shutil.copytree(tiny, folder)
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    state["model"]["vocab"]["Ġt"], state["model"]["merges"] = 259, [["Ġ", "t"]]
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(tiny, vocab_size=260, initializer_range=0.3)
    loading.quiet(LlamaForCausalLM(config).save_pretrained, folder)
    return folder


@pytest.fixture(scope="module")
def file(spread, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "spread.gguf"
    export.gguf(spread, path)
    return path


@pytest.fixture(scope="module")
def ours(file):
    return LlamaCpp(file, "chatml", threads=1)


@pytest.fixture(scope="module")
def theirs(spread, file):
    """The same numbers in transformers."""
    model, tokenizer = loading.load(str(spread), dtype="float32", device="cpu")
    export.fill(model, file)
    return Transformers(model, tokenizer, "chatml")


def drawn(engine, start, decoding):
    return list(engine.tokens(start, decoding))


def reference(engine, start, decoding):
    return [token for (token,) in generation.tokens(engine.model, [start], decoding)]


def test_both_count_and_cut_the_same_prompt(ours, theirs, talk):
    for conversation in (talk("你好 🙂"), talk("a", "b  c", "<|im_end|> 2024", system="甲\n")):
        assert ours.start(conversation) == theirs.start(conversation)
        assert ours.count(conversation) == theirs.count(conversation) == len(theirs.start(conversation))
    assert ours.context == theirs.context == 512


@pytest.mark.parametrize("penalise", ["answer", "all"])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 3.0])
def test_the_penalty_means_the_same(penalise, penalty, ours, theirs, talk):
    """Token for token; with another reach of the penalty the answer is another one (trap 18)."""
    start = theirs.start(talk("an apple, an apple, an apple"))
    decoding = Decoding(temperature=0, repetition_penalty=penalty, penalise=penalise, max_new_tokens=12)
    found = drawn(ours, start, decoding)
    assert found == reference(theirs, start, decoding)
    if penalty == 3.0:
        other = {"answer": "all", "all": "answer"}[penalise]
        assert found != reference(theirs, start, Decoding(**{**vars(decoding), "penalise": other}))


@pytest.mark.parametrize(
    "dials", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.4}, {"temperature": 0.5}, {"top_k": 8, "top_p": 0.9}], ids=str
)
def test_every_dial_leaves_the_same_tokens_with_the_same_chances(dials, ours, theirs, talk):
    start, draws = theirs.start(talk("hello")), 150
    decoding = Decoding(**{"temperature": 1.5, "top_k": 0, "top_p": 1, "repetition_penalty": 1} | dials)
    with torch.no_grad():
        logits = theirs.model(input_ids=torch.tensor([start])).logits[:, -1]
    chances = probabilities(logits, [[]], decoding)[0]
    one = [Decoding(**{**vars(decoding), "seed": seed, "max_new_tokens": 1}) for seed in range(draws)]
    found = Counter(token for each in one for token in ours.tokens(start, each))
    assert all(chances[token] > 0 for token in found)
    likeliest = chances.topk(3)
    for chance, token in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
        assert abs(found[token] / draws - chance) < 4.5 * (chance * (1 - chance) / draws) ** 0.5 + 0.01


def test_the_seed_makes_the_answer(ours, talk):
    start = ours.start(talk("hello"))
    answers = [
        drawn(ours, start, Decoding(temperature=2, top_k=0, top_p=1, seed=s, max_new_tokens=8)) for s in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]
    assert len(set(answers[0])) > 2  # the draws of one answer are not the same draw again and again


def test_an_answer_is_text_up_to_a_stop_string_or_an_end_token(ours, theirs, talk, monkeypatch):
    decoding = Decoding(**GREEDY, max_new_tokens=40)
    whole = "".join(ours.stream(talk("你好"), decoding))
    assert whole == "".join(theirs.stream(talk("你好"), decoding))
    stop = whole[5:8]
    assert "".join(ours.stream(talk("你好"), decoding, [stop])) == whole[: whole.index(stop)]
    spelt = "北京🙂，世界"
    monkeypatch.setattr(LlamaCpp, "tokens", lambda *_: iter([*ours.tokenizer(spelt).input_ids, 2, 70, 71]))
    pieces = list(ours.stream(talk("你好"), decoding))
    assert pieces == list(spelt)  # three or four tokens each, none torn; nothing behind <|im_end|>


def test_who_stops_an_answer_can_ask_again(ours, talk):
    decoding = Decoding(**GREEDY, max_new_tokens=200)
    answer = ours.stream(talk("hello"), decoding)
    first = next(answer)
    answer.close()
    assert next(ours.stream(talk("hello"), decoding)) == first


def test_several_answers_at_once_do_not_mix(ours, talk):
    decoding = Decoding(temperature=0, max_new_tokens=20)
    starts = [ours.start(talk(text)) for text in ("hello", "东北虎", "1 + 1")]
    alone = [drawn(ours, start, decoding) for start in starts]
    together = zip(*(ours.tokens(start, decoding) for start in starts), strict=True)
    assert [list(row) for row in zip(*together, strict=True)] == alone


def test_the_context_ends_the_answer(file, talk):
    small = LlamaCpp(file, "chatml", context=256, threads=1)
    start = [*small.start(talk("hello")), *[70] * 200][:250]
    assert len(drawn(small, start, Decoding(temperature=1, max_new_tokens=50))) == 6
    with pytest.raises(InputError, match="a prompt of 260 tokens, a context of 256; shorten the prompt"):
        drawn(small, [70] * 260, Decoding())


# ------------------------------------------------------------------------------------------- what the file says itself
def test_the_file_carries_the_whole_tokenizer(spread, file, ours):
    wanted = loading.read_tokenizer(str(spread))
    assert ours.tokenizer.backend_tokenizer.to_str() == wanted.backend_tokenizer.to_str()
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(ours.tokenizer, name) == getattr(wanted, name)
    facts = server.read_facts(file)
    assert (facts["llama.context_length"], facts["general.architecture"]) == (512, "llama")
    assert "tokenizer.ggml.tokens" not in facts


def test_the_template_is_read_off_the_file(spread, tmp_path, file):
    tokenizer = loading.read_tokenizer(str(spread))
    for name in engines.TEMPLATES:
        tokenizer.chat_template = merging.chat_template(name, tokenizer.eos_token)
        assert engines.recognised(tokenizer, file) == name
    for broken in ("{{ messages[0].content }}", "{{ raise_exception('no') }}", "{% if %}", None):
        tokenizer.chat_template = broken
        with pytest.raises(InputError, match=r"spread\.gguf: its chat template is none of chatml, .*; name the one"):
            engines.recognised(tokenizer, file)
    with pytest.raises(InputError, match="template 'zephyr' is unknown"):
        LlamaCpp(file, "zephyr")


def test_a_tokenizer_that_llama_cpp_contradicts_is_refused(file, monkeypatch):
    other = loading.read_tokenizer(loading.resolve("smollm2-135m"))
    monkeypatch.setattr(engines, "read_tokenizer", lambda *_: other)
    with pytest.raises(InputError, match="its tokenizer cannot be rebuilt exactly; export the model"):
        LlamaCpp(file, "chatml", threads=1)


# ---------------------------------------------------------------------------------------------------- the running model
def test_the_running_models_own_file_answers_as_ours_does(tokenizer, talk):
    """The published GGUF knows no template of ours by name and carries no tokenizer.json; both are found all the same,
    and a Chinese answer with a penalty is transformers' to the letter."""
    from cvlib import assets

    engine = LlamaCpp(assets.fetch("smollm2-135m"), context=1024, threads=1)
    assert engine.template == "chatml"
    for text in ("2024年，3.50元 🙂", "What is gravity?\n\n1234"):
        wanted = Transformers(_Shape(), tokenizer, "chatml").start(talk(text))
        assert engine.start(talk(text)) == wanted
    answer = "".join(engine.stream(talk("用中文回答：北京是什么？"), Decoding(temperature=0, max_new_tokens=24)))
    assert "\N{REPLACEMENT CHARACTER}" not in answer
    assert len(answer) > 8


class _Shape:
    """As much of a model as an engine looks at before it answers."""

    class config:
        max_position_embeddings = 8192
