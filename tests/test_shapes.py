"""Sizes held against published counts, against transformers' own models, and against what bitsandbytes really holds."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cvlib import InputError, loading
from cvlib.recipes import PROJECTIONS, Adapter
from cvlib.shapes import SHAPES, Shape, adapter_parameters, parameters, shape_of, weight_bytes

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


# published


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("smollm2-135m", 134_515_008),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
    ],
)
def test_published_sizes(name, count):
    assert sum(parameters(SHAPES[name]).values()) == count


@pytest.mark.parametrize(
    ("name", "targets", "count"),
    [
        ("llama-7b", ["q_proj", "v_proj"], 4_194_304),
        ("llama-7b", PROJECTIONS, 19_988_480),
        ("llama-13b", ["q_proj", "v_proj"], 6_553_600),
    ],
)
def test_adapter_sizes_that_chinese_vicuna_published(name, targets, count):
    assert adapter_parameters(SHAPES[name], Adapter(r=8, targets=list(targets))) == count


# by hand


def test_one_matrix_in_three_formats():
    shape = Shape(layers=1, hidden=64, intermediate=128, heads=1, kv_heads=1, head_dim=64, vocab=10)
    small, large = 64 * 64, 64 * 128  # four of one, three of the other
    assert weight_bytes(shape, 16)[0] == 2 * (4 * small + 3 * large)
    assert weight_bytes(shape, 8)[0] == (4 * small + 3 * large) + 4 * (4 * 64 + 2 * 128 + 64)
    tables = 7 * 4 * (16 + 256 + 1)
    assert weight_bytes(shape, 4)[0] == 4 * (small // 2 + 64 + 4) + 3 * (large // 2 + 128 + 4) + tables
    others = 2 * (2 * 10 * 64 + 3 * 64) + 2 * 4 * 32  # embeddings and head, three norms, RoPE's frequencies twice
    assert {weight_bytes(shape, bits)[1] for bits in (16, 8, 4)} == {others}


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="choose 16, 8 or 4"):
        weight_bytes(SHAPES["llama-7b"], 3)


# against transformers and bitsandbytes


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
        {"model_type": "mistral", "head_dim": 32},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 24},
    ],
)
def test_parameters_are_those_of_the_model_transformers_builds(changes):
    settings = TINY | changes
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    assert sum(parameters(Shape.from_config(model.config.to_dict())).values()) == model.num_parameters()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_weight_bytes_are_those_of_the_real_model_in_memory(bits):
    model, _ = loading.load("smollm2-135m", bits, dtype="bfloat16")
    held = [*model.parameters(), *model.buffers()]
    for weight in model.parameters():
        held += scales(weight)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    assert sum(storages.values()) == sum(weight_bytes(SHAPES["smollm2-135m"], bits))


def scales(weight) -> list[torch.Tensor]:
    """What a quantised weight holds beside its codes."""
    if getattr(weight, "SCB", None) is not None:
        return [weight.SCB]
    state = getattr(weight, "quant_state", None)
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code] if state else []


def test_the_running_models_own_config_gives_its_shape():
    assert shape_of(loading.resolve("smollm2-135m")) == SHAPES["smollm2-135m"]


# refused


def test_a_base_without_a_shape_is_named(tmp_path):
    with pytest.raises(InputError, match="no shape known for base 'nobody/model'"):
        shape_of("nobody/model")
    for config, found in [({"model_type": "gpt2"}, "'gpt2'"), ({"model_type": "llama"}, "num_hidden_layers")]:
        Path(tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(InputError, match=found):
            shape_of(str(tmp_path))
