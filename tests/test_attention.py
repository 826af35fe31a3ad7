"""One triangle for each conversation: the same numbers as a mask over the whole row, and nothing across a border."""

import copy
import importlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cvlib import ROOT, adapters, attention, loading
from cvlib.batching import Example, flatten
from cvlib.evaluation import token_losses
from cvlib.recipes import Adapter

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "head_dim": 16}


def tiny(family="llama", kv_heads=2, **options):
    """A model with random weights, in float32, attention by conversation unless told otherwise."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, num_attention_heads=4, num_key_value_heads=kv_heads)
    return AutoModelForCausalLM.from_config(config, **{"attn_implementation": attention.NAME} | options)


def row(*lengths):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(96, (length,), generator=generator).tolist() for length in lengths]
    return flatten([Example(each, each) for each in ids])


def step(model, batch):
    """Losses of the row, and the gradient of every weight."""
    losses = token_losses(model, batch)
    losses.sum().backward()
    return losses.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lengths", [(7,), (5, 1, 9), (2, 2, 2, 2)])
def test_losses_and_gradients_are_those_of_a_mask(family, kv_heads, lengths):
    ours, theirs = tiny(family, kv_heads), tiny(family, kv_heads, attn_implementation="sdpa")
    (losses, gradients), (wanted, reference) = step(ours, row(*lengths)), step(theirs, row(*lengths))
    torch.testing.assert_close(losses, wanted)
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], atol=1e-5, rtol=1e-4)


def test_a_token_changes_nothing_in_its_neighbours_conversation():
    model, batch = tiny(), row(5, 4, 6)
    changed = copy.deepcopy(batch)
    changed["input_ids"][0, 6] = (changed["input_ids"][0, 6] + 1) % 96  # in the second conversation
    with torch.no_grad():
        before, after = token_losses(model, batch), token_losses(model, changed)
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[7:], after[7:])
    assert not torch.equal(before[4:7], after[4:7])


def test_no_kernel_is_called_with_more_than_one_conversation(monkeypatch):
    seen, whole = [], attention.sdpa_attention_forward

    def watched(module, query, key, value, mask, **options):
        seen.append((query.shape[2], key.shape[2], mask))
        return whole(module, query, key, value, mask, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    token_losses(tiny(), row(5, 4, 6))
    assert seen == [(length, length, None) for _ in range(3) for length in (5, 4, 6)]


def test_checkpointing_computes_the_same_again():
    """The names of the conversations must reach the second forward too, or it would be another function."""
    models = [tiny(), tiny()]
    for model, checkpointing in zip(models, (False, True), strict=True):
        torch.manual_seed(0)
        adapters.add_adapter(model, Adapter(dropout=0), "tiny", checkpointing).train()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(weight, 0.01)
    (losses, gradients), (wanted, reference) = (step(model, row(5, 9, 4)) for model in models)
    assert torch.equal(losses, wanted)
    assert gradients.keys() == reference.keys()
    assert gradients
    assert all(torch.equal(gradient, reference[name]) for name, gradient in gradients.items())


def test_generation_and_padded_batches_go_the_usual_way():
    ours, theirs = tiny().eval(), tiny(attn_implementation="sdpa").eval()
    prompts = {"input_ids": torch.tensor([[1, 2, 3, 4], [7, 7, 5, 6]]), "attention_mask": torch.ones(2, 4).long()}
    prompts["attention_mask"][1, :2] = 0  # padded on the left
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**prompts, **options), theirs.generate(**prompts, **options))


def test_every_loaded_model_attends_by_conversation():
    model, _ = loading.load("smollm2-135m")
    assert model.config._attn_implementation == attention.NAME


def test_the_prompted_model_of_study_06_takes_the_call_that_the_loss_makes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    study = importlib.import_module("06_lora")
    model = study.prepared(loading.load("smollm2-135m", dtype="float32")[0], {"method": "prompt tuning"})
    losses, gradients = step(model, row(7))
    assert losses.shape == (6,)
    assert any("prompt" in name and gradient.any() for name, gradient in gradients.items())
