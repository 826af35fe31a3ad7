"""Loops, distinct n-grams and endless answers: by hand; the price of a penalty: a plain sum, and it rises."""

import math

import pytest
import torch

from cvlib import evaluation, generation
from cvlib.behaviour import describe, distinct, longest_loop, penalised_bits, summary, units
from cvlib.recipes import Decoding


def test_units_are_characters_of_chinese_and_words_of_the_rest():
    assert units("我在New York，花了99.5元！") == [
        "我", "在", "New", "York", "，", "花", "了", "99", ".", "5", "元", "！"
    ]  # fmt: skip
    assert units(" \n") == []


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("", 2, 1.0),
        ("好", 2, 1.0),
        ("abcd", 1, 1.0),
        ("a b a b", 1, 0.5),
        ("a b a b a", 2, 0.5),
        ("好好好好", 2, 1 / 3),
    ],
)
def test_distinct_by_hand(text, n, share):
    assert distinct(text, n) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("", 0),
        ("好好", 0),
        ("好好好", 3),
        ("谢谢你，谢谢你", 0),
        ("天天天天，向上", 4),
        ("一二三一二三一二三", 9),
        ("前面的话。一二三一二三一二三一二，后面", 11),  # the fourth time is not complete, and counts as far as it goes
        ("yes yes yes no", 3),
        ("一二一二一二三四五六三四五六三四五六", 12),
    ],
)
def test_the_longest_loop_by_hand(text, loop):
    assert longest_loop(text) == loop


def test_a_long_text_without_a_loop():
    assert longest_loop("".join(map(chr, range(0x4E00, 0x4E00 + 300)))) == 0


def test_summary_is_the_mean():
    found = summary([("好好好", False), ("Hello there", True)])
    assert found["answers"] == 2
    assert (found["loop"], found["never_stopped"], found["units"]) == (1.5, 0.5, 2.5)
    assert found["han_share"] == pytest.approx(3 / 13)
    assert describe("好好好", stopped=False)["never_stopped"] is True


def test_answers_say_whether_they_ended(tiny, talk):
    """A model that writes its end token at once ends; one that may not does not."""
    from cvlib import loading

    model, tokenizer = loading.load(str(tiny), dtype="float32")
    decoding = Decoding(temperature=0, max_new_tokens=4, repetition_penalty=1.0)
    rows = [talk("你好", "好")[:1]]
    ((text, stopped),) = generation.ended(model, tokenizer, rows, "chatml", decoding)
    assert not stopped
    assert generation.answers(model, tokenizer, rows, "chatml", decoding) == [text]
    end = tokenizer.eos_token_id
    with torch.no_grad():
        model.get_input_embeddings().weight[end] = 50 * model.model.norm.weight  # and the head is tied
        hook = model.model.norm.register_forward_hook(lambda *_: model.get_input_embeddings().weight[end][None, None])
    ((text, stopped),) = generation.ended(model, tokenizer, rows, "chatml", decoding)
    hook.remove()
    assert (text, stopped) == ("", True)


def test_without_a_penalty_the_price_is_the_score(model, tokenizer, talk):
    rows = [talk("你好", "你好！很高兴认识你，你好！"), talk("Name a fruit.", "An apple, an apple.")]
    ways = [Decoding(repetition_penalty=1.0), Decoding(repetition_penalty=2.0)]
    ways.append(Decoding(repetition_penalty=2.0, penalise="all"))
    plain, answer, everything = penalised_bits(model, tokenizer, rows, "chatml", ways)
    assert plain.nll == pytest.approx(evaluation.score(model, tokenizer, rows, "chatml").nll, rel=1e-4)
    assert plain.bits_per_byte < answer.bits_per_byte < everything.bits_per_byte


def test_the_price_by_hand(tiny, talk):
    """Position by position: the logits of what was said are divided or multiplied, then softmax."""
    from cvlib import loading
    from cvlib.batching import prompt_ids
    from cvlib.templates import prompt

    model, tokenizer = loading.load(str(tiny), dtype="float32")
    row = talk("问", "好好。")
    start = prompt_ids(prompt(row[:1], "chatml", tokenizer.eos_token), tokenizer)
    answer = tokenizer("好好。", add_special_tokens=False).input_ids
    total = 0.0
    for place, token in enumerate(answer):
        with torch.no_grad():
            logits = model(torch.tensor([start + answer[:place]])).logits[0, -1].double()
        for seen in set(answer[:place]):
            logits[seen] = logits[seen] / 1.5 if logits[seen] > 0 else logits[seen] * 1.5
        total -= logits.log_softmax(-1)[token].item()
    (found,) = penalised_bits(model, tokenizer, [row], "chatml", [Decoding(repetition_penalty=1.5)])
    assert found.nll == pytest.approx([total], rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / 9)
