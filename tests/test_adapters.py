"""Adapters that can be trained: fresh, continued, and with rows for a grown tokenizer's pieces."""

import pytest
import torch

from cvlib import InputError, adapters, embeddings, export, extension, loading
from cvlib.training import train


@pytest.fixture
def grown(tiny, tmp_path):
    """The tiny base's tokenizer with eight Chinese pieces more: its folder."""
    (tmp_path / "text.txt").write_text("北京的天气很好，上海的天气也很好。\n" * 30, encoding="utf-8")
    return extension.extend(tiny, [tmp_path / "text.txt"], tmp_path / "grown", 8).path


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


# going on from an adapter


def test_init_takes_the_weights_and_begins_anew(make, tmp_path):
    first = train(make("schedule.learning_rate=0.02"), tmp_path / "first")
    again = train(make("schedule.learning_rate=1e-9", "adapter.dropout=0"), tmp_path / "again", init=first.folder)
    before, after = weights(first.model), weights(again.model)
    assert set(before) == set(after)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6)
    assert [step["step"] for step in again.steps] == [1, 2, 3]
    fresh = train(make("schedule.learning_rate=1e-6"), tmp_path / "fresh")
    assert again.losses[0] < fresh.losses[0] - 0.01  # it starts where the first run ended


def test_init_obeys_the_recipes_dropout(make, tiny, tmp_path):
    folder = train(make(), tmp_path / "run").folder
    recipe = make("adapter.dropout=0.25")
    model = adapters.continue_adapter(loading.load(str(tiny))[0], folder, recipe.adapter, recipe.base)
    rates = {module.p for name, module in model.named_modules() if ".lora_dropout." in name}
    assert rates == {0.25}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("adapter.r=4", "its adapter.r is 8, the recipe says 4; make them the same"),
        ("adapter.targets=[q_proj]", "its adapter.targets is ['q_proj', 'v_proj'], the recipe says ['q_proj']"),
        ("base=smollm2-135m", "this adapter was trained on"),
    ],
)
def test_init_refuses_another_shape(change, words, make, tmp_path):
    folder = train(make(), tmp_path / "run").folder
    with pytest.raises(InputError) as refusal:
        train(make(change), tmp_path / "again", init=folder)
    assert words in str(refusal.value)
    assert not (tmp_path / "again").exists()


def test_init_refuses_what_is_no_adapter(make, tmp_path):
    with pytest.raises(InputError, match="no adapter_config"):
        train(make(), tmp_path / "again", init=tmp_path)


# grown tokenizers


def test_new_rows_are_trained_saved_and_loaded(make, tiny, grown, tmp_path):
    run = train(make(f"growth.tokenizer={grown}", "growth.learning_rate=0.01"), tmp_path / "run")
    before = loading.load(str(tiny), dtype="float32")[0].get_input_embeddings().weight
    old = len(before)
    after = run.model.merge_and_unload().get_input_embeddings().weight
    assert len(after) == old + 8
    assert torch.equal(after[:old], before)
    loaded, tokenizer = loading.load(str(tiny), dtype="float32", adapter=run.folder)
    assert len(tokenizer) == old + 8
    (rows,) = (weight for name, weight in loaded.named_parameters() if "trainable_tokens" in name)
    assert torch.equal(rows, after[old:])
    starts = torch.stack([before[ids].mean(0) for ids in embeddings.spelt(grown, tiny)])
    assert not torch.equal(rows, starts)


def test_new_rows_learn_from_plain_text(make, grown, tmp_path):
    """The road of Chinese-LLaMA: grow, then plain text. The rows of pieces that occur move, and so does the adapter."""
    text = ["data.train=[]", f"data.text=[{tmp_path / 'text.txt'}]", "data.max_length=32"]
    (tmp_path / "text.txt").write_text("".join(f"北京的天气很好{n}\n" for n in range(40)), encoding="utf-8")
    run = train(make(*text, f"growth.tokenizer={grown}", "growth.learning_rate=0.01"), tmp_path / "run")
    still = train(make(*text, f"growth.tokenizer={grown}", "growth.learning_rate=1e-12"), tmp_path / "still")
    (rows,), (start,) = (
        [weight for name, weight in weights(one.model).items() if "trainable_tokens" in name] for one in (run, still)
    )
    assert ((rows - start).abs().amax(1) > 1e-3).any()
    assert loading.has_tokenizer(run.folder)


def test_init_goes_on_with_the_rows_and_their_tokenizer(make, grown, tmp_path):
    first = train(make(f"growth.tokenizer={grown}", "growth.learning_rate=0.01"), tmp_path / "first")
    recipe = make("growth.learning_rate=1e-9", "schedule.learning_rate=1e-9")
    again = train(recipe, tmp_path / "again", init=first.folder)
    assert len(again.tokenizer) == len(first.tokenizer) == 259 + 8
    for name, weight in weights(first.model).items():
        torch.testing.assert_close(weights(again.model)[name], weight, rtol=0, atol=1e-6)
    assert loading.has_tokenizer(again.folder)


def test_a_grown_adapter_merges_into_a_model_with_its_rows(make, tiny, grown, tmp_path):
    run = train(make(f"growth.tokenizer={grown}", "growth.learning_rate=0.01"), tmp_path / "run")
    export.merge(str(tiny), [run.folder], tmp_path / "merged", dtype="float32")
    model, tokenizer = loading.load(str(tmp_path / "merged"), dtype="float32")
    ids = tokenizer("北京的天气", return_tensors="pt").input_ids
    assert ids.max() >= len(loading.read_tokenizer(str(tiny)))  # a new piece
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, run.model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_rows_learn_at_their_own_rate(make, tiny, grown):
    recipe = make(f"growth.tokenizer={grown}")
    model, _ = loading.load(str(tiny), dtype="float32")
    new = adapters.grow(model, recipe)
    tuned = adapters.add_adapter(model, recipe.adapter, recipe.base, new=new)
    groups = adapters.two_rates(tuned, 0.25, 0.5).param_groups
    assert [group["lr"] for group in groups] == [0.25, 0.5]
    assert [weight.shape for weight in groups[1]["params"]] == [(8, model.config.hidden_size)]
    assert len(groups[0]["params"]) == 2 * 2 * model.config.num_hidden_layers


def test_a_base_on_the_hub_lends_its_tokenizer(make, tiny, grown, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *about, **which: asked.append(about) or str(tiny))
    model, _ = loading.load(str(tiny), dtype="float32")
    assert len(adapters.grow(model, make(f"growth.tokenizer={grown}", "base=org/name"))) == 8
    assert asked == [("org/name",)]


@pytest.mark.parametrize(("kind", "bits", "paged"), [("adamw_8bit", 8, False), ("paged_adamw_8bit", 8, True)])
def test_eight_bit_optimisers_keep_both_rates(kind, bits, paged, make, tiny, grown):
    recipe = make(f"growth.tokenizer={grown}")
    model, _ = loading.load(str(tiny), dtype="float32")
    tuned = adapters.add_adapter(model, recipe.adapter, recipe.base, new=adapters.grow(model, recipe))
    made = adapters.two_rates(tuned, 0.25, 0.5, 0.125, kind)
    assert [(group["lr"], group["weight_decay"]) for group in made.param_groups] == [(0.25, 0.125), (0.5, 0.125)]
    assert (made.args.optim_bits, made.is_paged) == (bits, paged)


def test_init_refuses_a_growth_it_was_not_trained_with(make, grown, tmp_path):
    plain = train(make(), tmp_path / "plain").folder
    with pytest.raises(InputError, match="was not trained with it; leave it empty"):
        train(make(f"growth.tokenizer={grown}"), tmp_path / "again", init=plain)
    (tmp_path / "more.txt").write_text("学习中文的人很多。\n" * 30, encoding="utf-8")
    other = extension.extend(make().base, [tmp_path / "more.txt"], tmp_path / "other", 8).path
    rich = train(make(f"growth.tokenizer={grown}"), tmp_path / "rich").folder
    with pytest.raises(InputError, match="was not trained with it; leave it empty"):
        train(make(f"growth.tokenizer={other}"), tmp_path / "again", init=rich)
    assert not (tmp_path / "again").exists()
    train(make(f"growth.tokenizer={grown}"), tmp_path / "again", init=rich)


def test_a_tokenizer_that_did_not_grow_from_the_base(make, tiny, tmp_path):
    with pytest.raises(InputError, match="holds no piece that"):
        train(make(f"growth.tokenizer={tiny}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
