"""Answers: greedy equals transformers' own, no character is ever torn, and an answer ends where it should."""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvlib.batching import prompt_ids
from cvlib.generation import LENGTHS, answers, end_tokens, spell, stream, tokens, until
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


def test_an_answer_cut_inside_a_character_leaves_it_out(model, tokenizer, talk):
    asked = talk("请介绍一下北京。")
    (row,) = drawn(model, [start(asked, tokenizer)], replace(GREEDY, max_new_tokens=24))
    torn = [n for n in range(1, 25) if tokenizer.decode(row[:n]).endswith("\N{REPLACEMENT CHARACTER}")]
    decoding = replace(GREEDY, max_new_tokens=torn[0])
    (said,) = answers(model, tokenizer, [asked], "chatml", decoding)
    assert "\N{REPLACEMENT CHARACTER}" not in said
    assert said == "".join(stream(model, tokenizer, asked, "chatml", decoding))


def test_prompts_come_in_few_lengths(model, tokenizer, talk):
    """PyTorch keeps code for each length that it meets: an hour of chat must not fill the memory with it."""
    seen = []
    note = model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    for count in (1, 5, 9):
        list(tokens(model, [start(talk("Hello. " * count), tokenizer)], Decoding(max_new_tokens=1)))
    note.remove()
    assert all(length % LENGTHS == 0 for length in seen)
    assert len(set(seen)) < 3


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


# what is penalised


@pytest.fixture(scope="module")
def small(tiny):
    """The random tiny model and its tokenizer."""
    from cvlib import loading

    return loading.load(str(tiny), dtype="float32")


@pytest.fixture
def parrot():
    """A stand-in model that always prefers token 7 to token 9, and both to all others."""

    class Parrot(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, **_):
            logits = torch.zeros(len(input_ids), 1, 20)
            logits[..., 7], logits[..., 9] = 2.0, 1.5
            return SimpleNamespace(logits=logits, past_key_values=None)

    return Parrot()


def test_the_penalty_touches_the_answer_only(parrot):
    """Trap 18: token 7 in the prompt costs nothing, once said it does."""
    decoding = Decoding(temperature=0, repetition_penalty=1.5, max_new_tokens=3)
    assert drawn(parrot, [[7, 7, 7, 1], [1]], decoding) == [[7, 9, 7], [7, 9, 7]]
    everything = replace(decoding, penalise="all")
    assert drawn(parrot, [[7, 7, 7, 1], [1]], everything) == [[9, 7, 7], [7, 9, 7]]


def test_penalising_everything_is_what_transformers_does(small, talk):
    model, words = small
    ids = start(talk("北京北京北京"), words)
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": -1}
    theirs = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), repetition_penalty=2.0, **options
    )
    decoding = Decoding(temperature=0, repetition_penalty=2.0, max_new_tokens=8)
    assert drawn(model, [ids], replace(decoding, penalise="all")) == [theirs[0, len(ids) :].tolist()]
    assert drawn(model, [ids], decoding) != [theirs[0, len(ids) :].tolist()]


# where an answer ends


@pytest.fixture
def careless(tokenizer):
    """The tokenizer as many base models have it: its end token is not the one that ends a turn (trap 17)."""
    import copy

    wrong = copy.deepcopy(tokenizer)
    wrong.eos_token = "<|endoftext|>"
    return wrong


def test_end_tokens(tokenizer, careless, llama_tokenizer):
    assert end_tokens(tokenizer, "chatml") == {1, 2}
    assert end_tokens(tokenizer, "alpaca") == {2}
    assert end_tokens(careless, "chatml") == {0, 1, 2}
    assert end_tokens(llama_tokenizer[0], "chatml") == {llama_tokenizer[0].eos_token_id}


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_wrong_end_token_does_not_keep_it_talking(careless, talk, mark):
    script = iter(careless(f"Paris.{mark}\nuser and so on and on and on").input_ids)

    class Reciter(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, **_):
            said = torch.tensor([[[next(script)]]])
            return SimpleNamespace(logits=torch.zeros(1, 1, 49_152).scatter(-1, said, 9.0), past_key_values=None)

    assert list(stream(Reciter(), careless, talk("?"), "chatml", GREEDY)) == ["Paris", "."]


def test_a_stop_string_ends_a_real_answer(model, tokenizer, talk, reference):
    whole = tokenizer.decode(reference[0])
    middle = whole[6:11]  # begins and ends inside tokens
    assert "".join(stream(model, tokenizer, talk(QUESTIONS[0]), "chatml", GREEDY, [middle])) == whole.split(middle)[0]


def first_stop(text, stop):
    """What must be shown, a character at a time and with nothing held back."""
    for end in range(1, len(text) + 1):
        if found := [mark for mark in stop if text[:end].endswith(mark)]:
            return text[: end - max(map(len, found))]
    return text


WORDS = st.text("ab\n语", max_size=12)


@given(st.lists(WORDS, max_size=8), st.lists(st.text("ab\n语", min_size=1, max_size=4), max_size=3))
@settings(max_examples=500)
def test_no_part_of_a_stop_string_is_shown_however_it_is_cut(pieces, stop):
    """Trap 5."""
    shown = list(until(pieces, stop))
    assert "".join(shown) == first_stop("".join(pieces), stop)
    assert all(shown)


def test_text_waits_only_as_long_as_it_must():
    taken = []
    source = (taken.append(piece) or piece for piece in ["a", "\n", "U", "s", "!", "b"])
    shown = until(source, ["\nUser:"])
    assert next(shown) == "a"
    assert taken == ["a"]
    assert next(shown) == "\nUs!"
    assert len(taken) == 5


def test_closing_midway_leaves_the_model_usable(small, talk):
    model, words = small
    decoding = replace(GREEDY, seed=3, temperature=1.0)
    whole = list(stream(model, words, talk("你好"), "chatml", decoding))
    pieces = stream(model, words, talk("你好"), "chatml", decoding)
    assert next(pieces) == whole[0]
    pieces.close()
    assert list(pieces) == []
    assert list(stream(model, words, talk("你好"), "chatml", decoding)) == whole
    assert torch.is_grad_enabled()


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
    """Bytes that are no character show as the decoder shows them, except those of a character broken off at the end."""
    assert "".join(spell(iter(ids), tokenizer)) == tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("text", ["好龘", "👍🏽"])
def test_a_character_cut_by_the_limit_is_left_out(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids[:-1]
    assert tokenizer.decode(ids).endswith("\N{REPLACEMENT CHARACTER}")
    assert "".join(spell(iter(ids), tokenizer)) == text[:1]


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
