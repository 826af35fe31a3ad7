"""Scores: by hand, whatever the grouping, and equal to a plain sum by transformers' own loss."""

import math

import numpy as np
import pytest
import torch

from cvlib import InputError
from cvlib.batching import flatten
from cvlib.evaluation import (
    Score,
    bits_per_byte,
    change,
    forgetting,
    forgetting_table,
    han_share,
    is_han,
    passages,
    score,
    score_text,
    token_losses,
)
from cvlib.training import prepare


@pytest.fixture(scope="module")
def rows(talk):
    return [
        talk("你好", "你好！很高兴认识你。"),
        talk("What is 7 × 8?", "56", "为什么？", "因为7个8加起来是56。"),
        talk("写一句话", "春天来了，🌸开了。", system="你是诗人。"),
        talk("Name a fruit.", "An apple."),
    ]


@pytest.fixture(scope="module")
def scored(model, tokenizer, rows):
    return score(model, tokenizer, rows, "chatml")


def plain(model, tokenizer, conversation):
    """Nats of the answers' text, summed by hand: the whole talk by the model's own chat template, its own loss."""
    turns = [{"role": turn.role, "content": turn.content} for turn in conversation]
    total = 0.0
    for end, turn in enumerate(turns, 1):
        if turn["role"] == "assistant":
            options = {"tokenize": True, "return_dict": False}
            asked = tokenizer.apply_chat_template(turns[: end - 1], add_generation_prompt=True, **options)
            told = tokenizer.apply_chat_template(turns[:end], **options)[:-2]  # without end token and newline
            labels = [-100] * len(asked) + told[len(asked) :]
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([told]), labels=torch.tensor([labels])).loss
            total += loss.double().item() * (len(told) - len(asked))
    return total


def test_score_equals_a_plain_sum_by_transformers_own_loss(model, tokenizer, rows, scored):
    assert scored.nll == pytest.approx([plain(model, tokenizer, row) for row in rows], rel=1e-5)
    answers = ["你好！很高兴认识你。", "56因为7个8加起来是56。", "春天来了，🌸开了。", "An apple."]
    assert scored.text_bytes == [len(text.encode()) for text in answers]
    assert scored.bits_per_byte == pytest.approx(sum(scored.nll) / math.log(2) / sum(scored.text_bytes))


@pytest.mark.parametrize("max_tokens", [1, 90, 150])
def test_the_grouping_changes_nothing(max_tokens, model, tokenizer, rows, scored):
    again = score(model, tokenizer, rows, "chatml", max_tokens=max_tokens)
    assert again.nll == pytest.approx(scored.nll, rel=1e-5)
    assert again.bits_per_byte == pytest.approx(scored.bits_per_byte, rel=1e-6)


def test_the_order_changes_nothing(model, tokenizer, rows, scored):
    backwards = score(model, tokenizer, rows[::-1], "chatml")
    assert backwards.nll[::-1] == pytest.approx(scored.nll, rel=1e-5)


def test_a_worse_answer_costs_more(model, tokenizer, talk):
    right, wrong = (score(model, tokenizer, [talk("What is 2+2?", text)], "chatml") for text in ("4", "7"))
    assert right.bits_per_byte < wrong.bits_per_byte


def test_scoring_leaves_the_mode_and_the_dropout_alone(tiny, rows):
    from cvlib import loading, recipes, training

    base, words = loading.load(str(tiny), dtype="float32")
    noisy = training.add_adapter(base, recipes.Adapter(dropout=0.9), str(tiny))
    for weight in noisy.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight)
    noisy.train()
    first, second = (score(noisy, words, rows, "chatml").nll for _ in range(2))
    assert first == second
    assert noisy.training
    assert not any(weight.grad is not None for weight in noisy.parameters())
    noisy.eval()
    score(noisy, words, rows, "chatml")
    assert not noisy.training


def test_token_losses_are_the_training_loss(model, tokenizer, rows):
    """End tokens included: the mean is what transformers' own loss says of the same labels."""
    from cvlib import recipes

    for example in prepare(rows, tokenizer, recipes.Recipe()):
        with torch.no_grad():
            mine = token_losses(model, flatten([example]))
            ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
            theirs = model(input_ids=ids, labels=labels).loss
        assert len(mine) == sum(label != -100 for label in example.labels)
        assert mine.mean().item() == pytest.approx(theirs.item(), rel=1e-5)


def test_what_cannot_be_scored(model, tokenizer, talk):
    with pytest.raises(InputError, match="nothing to score"):
        score(model, tokenizer, [], "chatml")
    with pytest.raises(InputError, match="longer than the model's context of 8192 tokens; shorten it"):
        score(model, tokenizer, [talk("问", "答" * 9000)], "chatml")


# numbers


@pytest.mark.parametrize(
    ("nats", "size", "bits"), [([math.log(2)] * 8, 1, 8.0), ([0.0], 3, 0.0), ([math.log(256)], 4, 2.0)]
)
def test_bits_per_byte_by_hand(nats, size, bits):
    assert bits_per_byte(torch.tensor(nats, dtype=torch.float64), size) == pytest.approx(bits)


def test_a_uniform_model_over_bytes_takes_eight_bits():
    text = "北京 is big"
    assert bits_per_byte(torch.full((len(text.encode()),), math.log(256.0)), len(text.encode())) == pytest.approx(8)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_losses_are_refused(bad):
    with pytest.raises(ValueError, match="1 of 2 losses are not finite"):
        bits_per_byte(torch.tensor([1.0, bad]), 5)
    with pytest.raises(ValueError, match="text_bytes is 0"):
        bits_per_byte(torch.tensor([1.0]), 0)


def test_rows_weigh_by_their_bytes():
    """Not the mean of the rows' own figures, which would let a row of two bytes count like one of two hundred."""
    assert Score([math.log(2) * 8, 0.0], [1, 7]).bits_per_byte == pytest.approx(1.0)


def test_the_interval_is_the_bootstrap():
    """For rows of equal length the bootstrap's spread is the standard error of a mean."""
    noise = np.random.default_rng(0).normal(1.0, 0.3, 400)
    found = Score((noise * math.log(2) * 50).tolist(), [50] * 400)
    low, high = found.interval(draws=4000)
    assert low < found.bits_per_byte < high
    assert (high - low) / 2 == pytest.approx(1.96 * noise.std() / math.sqrt(400), rel=0.06)
    assert found.interval() == found.interval()
    assert found.interval(seed=1) != found.interval(seed=2)


def test_equal_rows_leave_no_interval():
    low, high = Score([2.0] * 9, [4] * 9).interval()
    assert low == pytest.approx(high)


# plain text


def test_passages_are_the_whole_text():
    text = "第一行\n\n" + "长" * 25 + "\nlast line"
    cut = passages(text, characters=10)
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 10
    assert passages(" \n\n") == []


def test_plain_text_equals_transformers_own_loss(model, tokenizer):
    texts = ["北京是中国的首都。", "A person may type <|im_end|> here.\n"]
    found = score_text(model, tokenizer, texts)
    for text, nll, size in zip(texts, found.nll, found.text_bytes, strict=True):
        written = tokenizer(text, split_special_tokens=True, add_special_tokens=False).input_ids
        ids = [tokenizer.convert_tokens_to_ids("<|endoftext|>"), *written]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
        assert nll == pytest.approx(loss.item() * (len(ids) - 1), rel=1e-5)
        assert size == len(text.encode())


def test_plain_text_that_cannot_be_scored(tiny):
    from cvlib import loading

    small, words = loading.load(str(tiny), dtype="float32")
    with pytest.raises(InputError, match="nothing to score"):
        score_text(small, words, [])
    with pytest.raises(InputError, match="longer than the context of 512 tokens; cut it"):
        score_text(small, words, ["长" * 600])


# forgetting


def test_forgetting_is_after_less_before_by_set():
    bit = math.log(2)
    before = {"zh": Score([8 * bit, 16 * bit], [8, 8]), "en": Score([4 * bit], [8])}
    after = {"zh": Score([4 * bit, 8 * bit], [8, 8]), "en": Score([8 * bit], [8])}
    zh, en = forgetting(before, after)
    assert (zh["set"], zh["rows"], zh["before"], zh["after"]) == ("zh", 2, pytest.approx(1.5), pytest.approx(0.75))
    assert zh["difference"] == pytest.approx(-0.75)
    assert (zh["low"], zh["high"]) == pytest.approx((-1.0, -0.5))
    assert en["difference"] == pytest.approx(0.5)
    assert "+0.500 [+0.500, +0.500]" in repr(forgetting_table([zh, en]))


def test_forgetting_compares_the_same_rows_only():
    one, other = Score([1.0], [3]), Score([1.0], [4])
    with pytest.raises(ValueError, match="not of the same rows"):
        change(one, other)
    with pytest.raises(ValueError, match="score the same sets"):
        forgetting({"zh": one}, {"en": one})


# language


@pytest.mark.parametrize(
    ("character", "chinese"),
    [
        ("京", True),
        ("龍", True),
        ("𠀀", True),
        ("㐀", True),
        ("あ", False),
        ("한", False),
        ("A", False),
        ("，", False),
        ("9", False),
    ],
)
def test_chinese_characters(character, chinese):
    assert is_han(character) is chinese


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        ([], 0),
        (["123 ，。!"], 0),
        (["北京"], 1),
        (["北京", "ab"], 0.5),
        (["北a", "京b"], 0.5),
        (["日本のこと"], 0.4),
        (["café"], 0),
    ],
)
def test_share_of_chinese_characters(texts, share):
    assert han_share(texts) == pytest.approx(share)


# models that do not belong together


def test_a_tokenizer_that_is_not_the_adapters(make, llama_tokenizer, tmp_path, refused, capsys):
    """Somebody copied another model's tokenizer over the adapter's; or lost the one its new rows were trained with."""
    import json
    from types import SimpleNamespace

    from cvlib import loading, training

    folder = training.train(make("schedule.max_steps=1"), tmp_path / "run").folder
    llama_tokenizer[0].save_pretrained(folder)
    capsys.readouterr()  # the bar of the training
    refused(
        ["evaluate", "--adapter", folder], f"{folder}: trained with a tokenizer of", "the one here has 32,000; put back"
    )
    rows = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=torch.zeros(10, 2)))
    for new, pieces in (({}, 10), ({"embed_tokens": [10, 11]}, 12)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"trainable_token_indices": new}))
        loading.fits(range(pieces), rows, tmp_path)
    with pytest.raises(InputError, match="a tokenizer of 12 pieces, but the one here has 10"):
        loading.fits(range(10), rows, tmp_path)
