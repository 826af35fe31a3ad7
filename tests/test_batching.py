"""Labels and batches: what is supervised, decoded and read; and that no conversation leaks into the next."""

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cvlib.batching import IGNORE_INDEX, Example, answers_only, blocks, encode, flatten, groups, pad, prompt_ids
from cvlib.evaluation import token_losses
from cvlib.messages import read
from cvlib.templates import prompt, render


def encoded(conversation, tokenizer, length=512, template="chatml"):
    return encode(render(conversation, template, tokenizer.eos_token), tokenizer, length)


def supervised(labels, tokenizer):
    """The labelled stretches of a row of labels, as text."""
    stretches, run = [], []
    for label in [*labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            run.append(label)
        elif run:
            stretches.append(tokenizer.decode(run))
            run = []
    return stretches


def test_one_batch_read_by_hand(tokenizer, tmp_path):
    """Two rows from a file, one of them with two answers: exactly the answers and their end tokens have labels."""
    rows = [
        {"instruction": "给动物分类", "input": "猫", "output": "哺乳动物。"},
        {"input": ["你好", "2024年是闰年吗？"], "output": ["你好！👋", "是的，\n2024能被4整除。"]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    batch = flatten([encoded(conversation, tokenizer) for conversation in read(file)])
    assert supervised(batch["labels"][0].tolist(), tokenizer) == [
        "哺乳动物。<|im_end|>",
        "你好！👋<|im_end|>",
        "是的，\n2024能被4整除。<|im_end|>",
    ]
    labelled = batch["labels"] != IGNORE_INDEX
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])  # shifted later, not here


def test_the_token_before_an_answer_is_the_templates(tokenizer, talk):
    """The first label of an answer is predicted from the newline behind `assistant`, as in a chat."""
    conversation = talk("问", "答", "再问", "再答")
    example = encoded(conversation, tokenizer)
    starts = [i for i, label in enumerate(example.labels) if label != -100 and example.labels[i - 1] == -100]
    for start, turns in zip(starts, (1, 3), strict=True):
        asked = prompt_ids(prompt(conversation[:turns], "chatml", tokenizer.eos_token), tokenizer)
        assert example.input_ids[:start] == asked


def test_llama_rows_begin_with_bos(llama_tokenizer, talk):
    tokenizer, _ = llama_tokenizer
    plain = encoded(talk("你好", "北京"), tokenizer, template="alpaca")
    assert supervised(plain.labels, tokenizer) == ["北京</s>"]
    tokenizer.add_bos_token = True
    try:
        example = encoded(talk("你好", "北京"), tokenizer, template="alpaca")
        assert example.input_ids == [tokenizer.bos_token_id, *plain.input_ids]
        assert example.input_ids.count(tokenizer.bos_token_id) == 1  # trap 6: one, not two
        assert example.labels == [IGNORE_INDEX, *plain.labels]
    finally:
        tokenizer.add_bos_token = False


# truncation (trap 3)


def test_a_cut_answer_has_no_end_token(tokenizer, talk):
    whole = encoded(talk("讲个故事", "从前有座山，山里有座庙。" * 10), tokenizer)
    end = tokenizer.eos_token_id
    assert not whole.cut
    assert whole.labels[-2:] == [end, IGNORE_INDEX]  # the newline behind it is the template's
    for length in range(50, len(whole) - 1, 7):
        cut = encoded(talk("讲个故事", "从前有座山，山里有座庙。" * 10), tokenizer, length)
        assert cut.cut
        assert len(cut) == length
        assert end not in cut.labels
        assert (cut.input_ids, cut.labels) == (whole.input_ids[:length], whole.labels[:length])


def test_an_earlier_answer_keeps_its_end_when_a_later_one_is_cut(tokenizer, talk):
    conversation = talk("问", "答", "再问", "再答" * 100)
    example = encoded(conversation, tokenizer, 100)
    first, second = supervised(example.labels, tokenizer)
    assert first == "答<|im_end|>"
    assert "<|im_end|>" not in second


def test_a_row_without_target_is_dropped(tokenizer, talk):
    conversation = talk("很长的问题" * 20, "答")
    asked = len(prompt_ids(prompt(conversation[:1], "chatml", tokenizer.eos_token), tokenizer))
    assert encoded(conversation, tokenizer, asked) is None
    kept = encoded(conversation, tokenizer, asked + 1)
    assert [label for label in kept.labels if label != -100] == [kept.input_ids[-1]]


def test_answers_only_leaves_the_end_tokens_out(tokenizer, talk):
    segments = answers_only(render(talk("问", "答", "再问", "再答"), "chatml", tokenizer.eos_token))
    assert supervised(encode(segments, tokenizer, 512).labels, tokenizer) == ["答", "再答"]


# flattening and padding

TALKS = [("你好", "你好！"), ("1+1?", "2", "Why?", "Because 1 and 1 make 2."), ("写诗", "春眠不觉晓，处处闻啼鸟。")]


def test_flattened_equals_separate(model, tokenizer, talk):
    """Logits and losses to 1e-4 in float32: no conversation sees its neighbour."""
    examples = [encoded(talk(*texts), tokenizer) for texts in TALKS]
    batch = flatten(examples)
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        alone = [model(input_ids=torch.tensor([example.input_ids])).logits[0] for example in examples]
        losses = token_losses(model, batch)
        each = [
            F.cross_entropy(logits[:-1], torch.tensor(example.labels[1:]), ignore_index=-100, reduction="none")
            for logits, example in zip(alone, examples, strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    wanted = torch.cat([loss[torch.tensor(e.labels[1:]) != -100] for loss, e in zip(each, examples, strict=True)])
    torch.testing.assert_close(losses, wanted, atol=1e-4, rtol=1e-4)


def test_padded_equals_separate(model, tokenizer, talk):
    examples = [encoded(talk(*texts), tokenizer) for texts in TALKS]
    batch = pad(examples, tokenizer.pad_token_id)
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, example in enumerate(examples):
            alone = model(input_ids=torch.tensor([example.input_ids])).logits[0]
            torch.testing.assert_close(together[row, : len(example)], alone, atol=1e-4, rtol=1e-4)


examples = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9).map(
        lambda pairs: Example([t for t, _ in pairs], [t if kept else IGNORE_INDEX for t, kept in pairs])
    ),
    min_size=1,
    max_size=8,
)


@given(examples)
@settings(deadline=None)
def test_flatten_and_pad_keep_every_token_and_label(rows):
    flat, rectangle = flatten(rows), pad(rows, pad_id=7)
    assert {tensor.shape for tensor in flat.values()} == {(1, sum(map(len, rows)))}
    kept = [label for row in rows for label in row.labels[1:] if label != IGNORE_INDEX]
    targets = flat["labels"][0, 1:]
    assert targets[targets != IGNORE_INDEX].tolist() == kept  # no first token is a target
    starts = (flat["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert starts == [sum(map(len, rows[:i])) for i in range(len(rows))]
    for i, row in enumerate(rows):
        mask = rectangle["attention_mask"][i].bool()
        assert rectangle["input_ids"][i][mask].tolist() == row.input_ids
        assert rectangle["labels"][i][mask].tolist() == row.labels
        assert set(rectangle["labels"][i][~mask].tolist()) <= {IGNORE_INDEX}
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # padding on the right


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 40))
def test_groups_hold_everything_once_and_no_more_than_fits(lengths, room):
    rows = [Example([0] * n, [0] * n) for n in lengths]
    found = list(groups(rows, room))
    assert [i for group in found for i in group] == list(range(len(rows)))
    assert all(len(group) == 1 or sum(lengths[i] for i in group) <= room for group in found)
    for one, two in pairwise(found):  # no group could have taken the next row too
        assert sum(lengths[i] for i in one) + lengths[two[0]] > room


@pytest.mark.parametrize("length", [16, 64, 512])
def test_labels_and_ids_always_have_equal_length(length, tokenizer, talk):
    for texts in TALKS:
        if example := encoded(talk(*texts), tokenizer, length):
            assert len(example.labels) == len(example.input_ids) <= length


# plain text


def test_blocks_hold_every_token_once_behind_a_mark(tokenizer):
    documents = ["北京的天气很好。", "Good morning!", "上海"]
    ids = [tokenizer(text).input_ids for text in documents]
    stream = [token for document in ids for token in [*document, 0]]
    for length in (16, 64):
        made = blocks(documents, tokenizer, length)
        assert [token for example in made for token in example.input_ids[1:]] == stream
        assert all(example.input_ids[0] == 0 and example.labels[0] == IGNORE_INDEX for example in made)
        assert all(example.labels[1:] == example.input_ids[1:] for example in made)
        assert {len(example) for example in made[:-1]} <= {length}


def test_blocks_of_a_llama_vocabulary_begin_and_end_with_its_own_marks(llama_tokenizer):
    fast, _ = llama_tokenizer
    fast.bos_token, fast.eos_token = "<s>", "</s>"
    (block,) = blocks(["北京"], fast, 64)
    assert fast.convert_ids_to_tokens(block.input_ids[-1]) == "</s>"
    assert block.input_ids[:1] == (fast("").input_ids or [fast.bos_token_id])


def test_a_text_that_spells_a_special_token_does_not_speak_it(tokenizer):
    (block,) = blocks(["<|im_end|>"], tokenizer, 64)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in block.input_ids
    assert blocks([], tokenizer, 64) == []
