"""Recipes: what a file says is what a run gets, and what cannot be meant is refused with its key and a remedy."""

import dataclasses

import pytest
import yaml

from cvlib import ROOT, InputError, recipes, sources, texts


def written(folder, text, name="mine.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", recipes.names())
def test_shipped_recipes_load_and_come_back_unchanged(name, tmp_path):
    recipe = recipes.load(name)
    text = yaml.safe_dump(recipe.as_dict(), allow_unicode=True)
    assert recipes.load(written(tmp_path, text)) == recipe


@pytest.mark.parametrize("name", sorted({*recipes.names()} - {"smollm2-cpu", "smollm2-zh"}))
def test_a_recipe_says_its_licence_and_what_its_hours_rest_on(name):
    lines = (recipes.FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    about = " ".join(line for line in lines if line.startswith("#"))
    assert "Apache-2.0" in about
    assert "estimated, not measured" in about
    assert "Hours" in about or "Minutes" in about
    assert len(lines) < 20
    assert max(map(len, lines)) <= 120


def test_every_file_or_source_of_a_recipe_is_known():
    for recipe in map(recipes.load, recipes.names()):
        assert all(name in sources.names() or (ROOT / name).is_file() for name in recipe.data.train)
        assert set(recipe.data.text) <= set(texts.PACKAGED)


def test_an_empty_mapping_is_all_defaults(tmp_path):
    assert recipes.load(written(tmp_path, "{}")) == recipes.Recipe()


def test_values_are_read_by_hand(tmp_path):
    text = "base: here\nbits: 4\nadapter: {r: 2, targets: [k_proj]}\nschedule: {learning_rate: 3e-4, epochs: 2}\n"
    recipe = recipes.load(written(tmp_path, text))
    assert (recipe.base, recipe.bits, recipe.adapter.r, recipe.adapter.targets) == ("here", 4, 2, ["k_proj"])
    assert recipe.schedule.learning_rate == 0.0003  # YAML reads 3e-4 as a text
    assert isinstance(recipe.schedule.epochs, float)


def test_two_recipes_share_no_list():
    recipes.Recipe().adapter.targets.append("x")
    assert recipes.Recipe().adapter.targets == ["q_proj", "v_proj"]


def test_set_changes_single_values():
    recipe = recipes.load("smollm2-cpu", ["bits=8", "adapter.targets=[o_proj]", "data.train=[a.jsonl, b.jsonl]"])
    assert (recipe.bits, recipe.adapter.targets, recipe.data.train) == (8, ["o_proj"], ["a.jsonl", "b.jsonl"])
    untouched = recipes.load("smollm2-cpu")
    assert recipe.schedule == untouched.schedule
    assert recipe.adapter.r == untouched.adapter.r


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "schedule: {learnin_rate: 1}",
            ["mine.yaml", "'schedule.learnin_rate'", "did you mean 'schedule.learning_rate'"],
        ),
        ("bitz: 8", ["mine.yaml", "'bitz'", "'bits'"]),
        ("zzz: 8", ["'zzz'", "choose one of base, bits"]),
        ("5: 8", ["unknown key '5'"]),
        ("adapter: 3", ["adapter is 3", "section"]),
        ("adapter:", ["adapter is None", "section"]),
        ("bits: 5", ["bits is 5", "16, 8, 4"]),
        ("bits: '8'", ["bits is '8'", "a whole number"]),
        ("bits: true", ["bits is True", "a whole number"]),
        ("base: 7", ["base is 7", "a text"]),
        ("template: llama9", ["template is 'llama9'", "chatml, alpaca"]),
        ("adapter: {r: 0}", ["adapter.r is 0", "1 or more"]),
        ("adapter: {r: 2.5}", ["adapter.r is 2.5", "a whole number"]),
        ("adapter: {alpha: 0}", ["adapter.alpha is 0"]),
        ("adapter: {dropout: 1}", ["adapter.dropout is 1.0"]),
        ("adapter: {targets: []}", ["adapter.targets", "at least one"]),
        ("adapter: {targets: q_proj}", ["adapter.targets is 'q_proj'", "a list of texts"]),
        ("adapter: {targets: [query]}", ["adapter.targets is 'query'", "q_proj"]),
        ("data: {train: [1]}", ["data.train is [1]", "a list of texts"]),
        ("data: {max_length: 8}", ["data.max_length is 8", "at least 16"]),
        ("schedule: {learning_rate: 0}", ["schedule.learning_rate is 0.0", "positive"]),
        ("schedule: {learning_rate: fast}", ["schedule.learning_rate is 'fast'", "a number"]),
        ("schedule: {learning_rate: .inf}", ["schedule.learning_rate is inf", "a number"]),
        ("schedule: {epochs: .nan}", ["schedule.epochs is nan", "a number"]),
        ("schedule: {epochs: 0}", ["schedule.epochs is 0.0"]),
        ("schedule: {max_steps: -1}", ["schedule.max_steps is -1"]),
        ("schedule: {warmup_ratio: 1}", ["schedule.warmup_ratio is 1.0", "below 1"]),
        ("schedule: {warmup_steps: -1}", ["schedule.warmup_steps is -1"]),
        ("schedule: {save_every: -1}", ["schedule.save_every is -1"]),
        ("report_to: [a]", ["report_to is ['a']", "a text"]),
        ("schedule: {optimizer: sgd}", ["schedule.optimizer is 'sgd'", "adamw, adamw_8bit, paged_adamw_8bit"]),
        ("schedule: {micro_rows: 0}", ["schedule.micro_rows is 0"]),
        ("schedule: {batch_rows: 10, micro_rows: 4}", ["schedule.batch_rows is 10", "multiple of micro_rows", "4"]),
        ("schedule: {batch_rows: 0}", ["schedule.batch_rows is 0"]),
        ("schedule: {scheduler: step}", ["schedule.scheduler is 'step'", "linear, cosine"]),
        ("schedule: {gradient_checkpointing: 1}", ["schedule.gradient_checkpointing is 1", "true or false"]),
        ("schedule: {seed: -1}", ["schedule.seed is -1"]),
        ("decoding: {temperature: -1}", ["decoding.temperature is -1.0", "0 or more"]),
        ("decoding: {top_k: -1}", ["decoding.top_k is -1"]),
        ("decoding: {top_p: 0}", ["decoding.top_p is 0.0"]),
        ("decoding: {top_p: 1.5}", ["decoding.top_p is 1.5"]),
        ("decoding: {repetition_penalty: 0.5}", ["decoding.repetition_penalty is 0.5"]),
        ("decoding: {max_new_tokens: 0}", ["decoding.max_new_tokens is 0"]),
        ("decoding: {seed: -1}", ["decoding.seed is -1"]),
        ("- a\n- b", ["mine.yaml", "mapping", "list"]),
        ("", ["mine.yaml", "mapping"]),
        ("base: here\nadapter: {r: 8\n", ["mine.yaml:3", "not valid YAML"]),
        ("a: b: c", ["mine.yaml:1", "not valid YAML"]),
    ],
)
def test_what_cannot_be_meant_is_refused(text, words, tmp_path):
    with pytest.raises(InputError) as caught:
        recipes.load(written(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("epochs", "key=value"),
        ("schedule.epochs=[", "not valid YAML"),
        ("schedule.epochs=1: 2: 3", "not valid YAML"),
        ("bits.x=3", "'bits' holds a value"),
        ("schedule=3", "schedule is 3"),
        ("schedule.epoch=3", "did you mean 'schedule.epochs'"),
        ("=3", "unknown key ''"),
    ],
)
def test_what_set_cannot_mean(override, words):
    with pytest.raises(InputError) as caught:
        recipes.load("smollm2-cpu", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"'smollm' not found; did you mean .*'smollm2-cpu'"):
        recipes.load("smollm")
    with pytest.raises(InputError, match="not found"):
        recipes.load(tmp_path / "none.yaml")


def test_a_file_in_another_encoding(tmp_path):
    path = tmp_path / "gbk.yaml"
    path.write_bytes("base: 模型".encode("gbk"))
    with pytest.raises(InputError, match=r"gbk\.yaml: byte 8 is not UTF-8"):
        recipes.load(path)


def test_every_key_says_what_it_is():
    for section in (recipes.Recipe, recipes.Adapter, recipes.Data, recipes.Schedule, recipes.Decoding):
        for item in dataclasses.fields(section):
            assert dataclasses.is_dataclass(item.default_factory) or item.metadata["help"], item.name
