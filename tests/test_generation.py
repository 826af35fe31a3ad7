"""Answers: greedy equals transformers' own, no character is ever torn, and sampling equals its processors."""

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from cvlib.batching import prompt_ids
from cvlib.generation import answers, probabilities, spell, stream, tokens
from cvlib.recipes import Decoding
from cvlib.templates import prompt

GREEDY = Decoding(temperature=0, repetition_penalty=1, max_new_tokens=16)
QUESTIONS = ("What is the capital of France?", "请介绍一下北京。", "Count: 1 2 3")


def start(conversation, tokenizer):
    return prompt_ids(prompt(conversation, "chatml", tokenizer.eos_token), tokenizer)


@pytest.fixture(scope="module")
def reference(model, tokenizer, talk):
    """transformers' own greedy continuation of each question, token for token."""
    found = []
    for question in QUESTIONS:
        ids = torch.tensor([start(talk(question), tokenizer)])
        options = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        found.append(model.generate(ids, **options)[0, ids.shape[1] :].tolist())
    return found


def drawn(model, prompts, decoding):
    return [list(row) for row in zip(*tokens(model, prompts, decoding), strict=True)]


# the loop


def test_greedy_equals_transformers(model, tokenizer, talk, reference):
    for question, ids in zip(QUESTIONS, reference, strict=True):
        said = "".join(stream(model, tokenizer, talk(question), "chatml", GREEDY))
        assert said == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_batch_padded_on_the_left_equals_single_prompts(model, tokenizer, talk, reference):
    prompts = [start(talk(question), tokenizer) for question in QUESTIONS]
    assert len(set(map(len, prompts))) > 1
    for row, ids in zip(drawn(model, prompts, GREEDY), reference, strict=True):
        assert row[: len(ids)] == ids  # a row goes on behind its end until all are done


def test_answers_equal_streams(model, tokenizer, talk, reference):
    wanted = [tokenizer.decode(ids, skip_special_tokens=True) for ids in reference]
    said = answers(model, tokenizer, [talk(question) for question in QUESTIONS], "chatml", GREEDY, batch=2)
    assert said == wanted


def test_an_answer_stops_at_its_end_token(model, tokenizer, talk):
    asked = talk("Answer with one word only: what is the capital of France?")
    decoding = Decoding(temperature=0, repetition_penalty=1, max_new_tokens=12)
    (row,) = drawn(model, [start(asked, tokenizer)], decoding)
    place = row.index(tokenizer.eos_token_id)
    said = "".join(stream(model, tokenizer, asked, "chatml", decoding))
    assert said == tokenizer.decode(row[:place])
    assert "<|im_end|>" not in said
    assert answers(model, tokenizer, [asked, talk("Count to 50.")], "chatml", decoding)[0] == said


def test_an_answer_is_never_longer_than_asked(model, tokenizer, talk):
    (row,) = drawn(model, [start(talk("Count to 50."), tokenizer)], Decoding(max_new_tokens=3))
    assert len(row) == 3


def test_the_cache_changes_nothing(model, tokenizer, talk):
    """Each step's choice is the arg max of a forward over the whole text so far."""
    ids = start(talk(QUESTIONS[0]), tokenizer)
    for (token,) in islice(tokens(model, [ids], GREEDY), 5):
        with torch.no_grad():
            assert model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item() == token
        ids = [*ids, token]


def test_a_seed_is_a_text(model, tokenizer, talk):
    ids = start(talk("Tell me a story."), tokenizer)
    warm = [
        drawn(model, [ids], Decoding(temperature=1.5, top_k=0, top_p=1, seed=s, max_new_tokens=8)) for s in (1, 1, 2)
    ]
    assert warm[0] == warm[1] != warm[2]


def test_no_gradient_is_kept(model, tokenizer, talk):
    with torch.enable_grad():
        list(stream(model, tokenizer, talk("Hi"), "chatml", Decoding(max_new_tokens=2)))
        assert torch.is_grad_enabled()
    assert all(weight.grad is None for weight in model.parameters())


# the distribution


@pytest.mark.parametrize("temperature", [0.2, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 10_000])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_sampling_equals_transformers_processors(temperature, top_k, top_p, penalty):
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) * 4
    said = [[3, 3, 77], [5, 6, 7], [199, 0, 1]]
    scores = theirs.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(said), logits.clone())
    scores = theirs.TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = theirs.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = theirs.TopPLogitsWarper(top_p)(None, scores)
    mine = probabilities(logits, said, Decoding(temperature, top_k, top_p, penalty))
    torch.testing.assert_close(mine, scores.softmax(-1), atol=1e-6, rtol=1e-5)
    assert torch.equal(mine > 0, scores.softmax(-1) > 0)


def test_probabilities_by_hand():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log()  # chances 0.4, 0.3, 0.2, 0.1
    plain = {"temperature": 1, "top_k": 0, "top_p": 1, "repetition_penalty": 1}

    def found(**changes):
        return [round(p, 4) for p in probabilities(logits, [[]], Decoding(**plain | changes))[0].tolist()]

    assert found() == [0.4, 0.3, 0.2, 0.1]
    assert found(top_k=2) == [0.5714, 0.4286, 0, 0]
    assert found(top_p=0.69) == [0.5714, 0.4286, 0, 0]
    assert found(top_p=0.71) == [0.4444, 0.3333, 0.2222, 0]
    assert found(temperature=0.5) == [0.5333, 0.3, 0.1333, 0.0333]
    assert found(temperature=0) == [1, 0, 0, 0]


def test_the_penalty_divides_what_is_positive_and_multiplies_what_is_not():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    before = logits.clone()
    mine = probabilities(logits, [[0, 1, 1, 1]], Decoding(1, 0, 1, repetition_penalty=2))
    torch.testing.assert_close(mine, torch.tensor([[1.0, -4.0, 2.0, -2.0]]).softmax(-1))
    assert torch.equal(logits, before)  # the caller's logits are not touched


def test_the_penalty_touches_the_answer_only(tokenizer):
    """Trap 18. A stand-in model that always prefers token 7: in the prompt it costs nothing, once said it does."""

    class Parrot(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, **_):
            from types import SimpleNamespace

            logits = torch.zeros(len(input_ids), 1, 20)
            logits[..., 7], logits[..., 9] = 2.0, 1.5
            return SimpleNamespace(logits=logits, past_key_values=None)

    decoding = Decoding(temperature=0, repetition_penalty=1.5, max_new_tokens=3)
    assert drawn(Parrot(), [[7, 7, 7, 1], [1]], decoding) == [[7, 9, 7], [7, 9, 7]]


# spelling

TEXTS = [
    "北京是中国的首都，人口约2189万。",
    "👍🏽🧑‍🚀🎉 emoji e\u0301 が",
    "plain English, it's fine.\n\n  indented\ttab",
    "𠀀㐀 rare 龘",
    " leading and trailing ",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("vocabulary", ["tokenizer", "llama_tokenizer"])
def test_a_stream_spells_the_whole_text_and_tears_nothing(text, vocabulary, request):
    words = request.getfixturevalue(vocabulary)
    words = words[0] if isinstance(words, tuple) else words
    ids = words(text, add_special_tokens=False).input_ids
    pieces = list(spell(iter(ids), words))
    assert "".join(pieces) == words.decode(ids)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert vocabulary == "llama_tokenizer" or "".join(pieces) == text


@given(st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"]), max_size=30))
@settings(deadline=None, max_examples=200)
def test_any_text_comes_out_whole(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert "".join(spell(iter(ids), tokenizer)) == text


@given(st.lists(st.integers(17, 49_151), max_size=24))
@settings(deadline=None, max_examples=200)
def test_any_tokens_come_out_as_their_decoding(tokenizer, ids):
    """Also where a model breaks off inside a character: the torn bytes show as the decoder shows them."""
    assert "".join(spell(iter(ids), tokenizer)) == tokenizer.decode(ids)


def test_a_character_of_three_tokens_appears_at_once(tokenizer):
    ids = tokenizer("龘", add_special_tokens=False).input_ids
    assert len(ids) > 1
    assert list(spell(iter(ids + ids), tokenizer)) == ["龘", "龘"]


def test_pieces_come_as_soon_as_they_can(tokenizer):
    taken = []

    def source():
        for token in tokenizer("Hello world 你好", add_special_tokens=False).input_ids:
            taken.append(token)
            yield token

    pieces = spell(source(), tokenizer)
    assert next(pieces) == "Hello"
    assert len(taken) == 1
