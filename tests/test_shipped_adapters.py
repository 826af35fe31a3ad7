"""Each shipped adapter still does what its study recorded."""

import json

import pytest

from cvlib import ROOT, evaluation, loading, messages, recipes

SHIPPED = sorted((ROOT / "data_samples" / "adapters").glob("*/adapter_config.json"))
STUDIES = {"smollm2-zh": "00-first-light"}


def test_every_adapter_names_its_study_and_is_small():
    assert {path.parent.name for path in SHIPPED} == set(STUDIES)
    for path in SHIPPED:
        assert sum(file.stat().st_size for file in path.parent.iterdir()) <= 10e6
        assert (path.parent / "recipe.yaml").is_file()


@pytest.mark.parametrize("folder", [path.parent for path in SHIPPED], ids=lambda folder: folder.name)
def test_adapter_scores_as_recorded(folder):
    """The shipped weights are the study's, rounded to 16 bits: bits per byte within 1 % of the recorded run."""
    study = json.loads((ROOT / f"benchmarks/results/{STUDIES[folder.name]}.json").read_text(encoding="utf-8"))
    recipe = recipes.load(folder / "recipe.yaml")
    recorded = next(row["after"]["zh"] for row in study["rows"] if row["seed"] == recipe.schedule.seed)
    rows = messages.split(messages.read(ROOT / "data_samples/belle_zh.jsonl"))[1]
    model, tokenizer = loading.load(recipe.base, recipe.bits, adapter=folder)
    assert evaluation.score(model, tokenizer, rows, recipe.template).bits_per_byte == pytest.approx(recorded, rel=0.01)
    assert recorded < 0.9 * study["before"]["zh"]
