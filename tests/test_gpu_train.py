"""`benchmarks/gpu_train.py`: the way, rehearsed on a tiny shape; and what a card has measured, if one has."""

import importlib.util
import json
import sys

import pytest
import torch

from cvlib import ROOT

STORED = ROOT / "benchmarks" / "results" / "gpu-train.json"


@pytest.fixture
def gpu_train(monkeypatch):
    """The benchmark as a module, with one recipe and one answer of its list."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    about = importlib.util.spec_from_file_location("gpu_train", ROOT / "benchmarks" / "gpu_train.py")
    module = importlib.util.module_from_spec(about)
    about.loader.exec_module(module)
    monkeypatch.setattr(module, "CASES", module.CASES[:1])
    monkeypatch.setattr(module, "ANSWERS", module.ANSWERS[:1])
    monkeypatch.setattr(module, "WRITTEN", 2)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so_in_one_line(gpu_train, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_train.py"])
    assert gpu_train.main() == 2
    assert capsys.readouterr().err == "gpu_train.py: no CUDA card here; run it where there is one, or try --rehearse\n"


def test_the_rehearsal_goes_the_whole_way(gpu_train):
    card = gpu_train.Card(rehearse=True)
    made = list(gpu_train.training(card, [], lambda: False))
    assert [(row["card"], row["length"]) for row in made] == [("2080ti", 16), ("2080ti", 32), ("t4", 16), ("t4", 32)]
    assert all(row["fits"] and row["tokens_per_second"] > 0 for row in made)
    recipe = gpu_train.recipes.load("chinese-vicuna-7b-8bit")
    for row in made:  # the last micro-batch before memory runs out, not one more and not one less
        room = gpu_train.CARDS[row["card"]] - card.context
        needed = [
            gpu_train.predicted(gpu_train.TINY, recipe, row["most_rows"] + more, row["length"]) for more in (0, 1)
        ]
        assert needed[0] <= room / 10_000 < needed[1]
    assert list(gpu_train.training(card, made, lambda: False)) == []  # what is there is not measured again
    assert list(gpu_train.training(card, [], lambda: True)) == []
    (answer,) = gpu_train.answering(card, [], lambda: False)
    assert answer["fits"]
    assert answer["tokens"] == gpu_train.PROMPT + 2


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 47, 63, 64, 100])
def test_doubling_and_halving_finds_the_limit(gpu_train, limit):
    tried = []
    assert gpu_train.most(lambda rows: tried.append(rows) or rows <= limit) == min(limit, gpu_train.MOST)
    assert len(tried) == len(set(tried)) <= 13


def test_the_built_model_is_the_one_that_loading_makes(gpu_train, tmp_path):
    """Random weights, but the layers, formats and sizes of a model that was loaded and quantised."""
    from cvlib import loading
    from cvlib.shapes import weight_bytes

    card = gpu_train.Card(rehearse=True)
    for bits in (8, 4):
        built = gpu_train.build(gpu_train.TINY, bits, card)
        loading.quiet(gpu_train.LlamaForCausalLM(built.config).save_pretrained, tmp_path)
        loaded = loading.quiet(
            gpu_train.LlamaForCausalLM.from_pretrained,
            tmp_path,
            dtype=torch.float32,
            quantization_config=loading.quantization(bits, torch.float32),
        )
        kinds = [{name: (type(p), p.dtype, p.shape) for name, p in m.named_parameters()} for m in (built, loaded)]
        assert kinds[0] == kinds[1]
        assert sum(p.nbytes for p in built.parameters()) < sum(weight_bytes(gpu_train.TINY, bits, 4))


@pytest.mark.skipif(not STORED.is_file(), reason="no card has measured yet")
def test_measured_peaks_are_those_predicted():
    rows = json.loads(STORED.read_text(encoding="utf-8"))["rows"]
    assert any(row["fits"] for row in rows)
    for row in rows:
        if row["fits"]:
            assert row["peak"] == pytest.approx(row["predicted"], rel=0.05), row
