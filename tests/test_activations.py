"""What a step keeps: by hand for one block, then against what autograd saves in real models with real adapters."""

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cvlib import attention
from cvlib.activations import Step, block_saves
from cvlib.evaluation import token_losses
from cvlib.recipes import PROJECTIONS, Adapter
from cvlib.shapes import Shape
from cvlib.training import add_adapter

QV, ALL = ["q_proj", "v_proj"], list(PROJECTIONS)


def tiny(dtype=torch.bfloat16, model_type="llama", **changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    config = AutoConfig.for_model(
        model_type, **sizes | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16} | changes
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).to(dtype)


def batch(tokens: int, labelled: int, rows: int = 1, vocab: int = 96) -> dict[str, torch.Tensor]:
    """One flattened row of `rows` conversations; the last `labelled` tokens have a label."""
    ids = torch.randint(vocab, (1, tokens))
    labels = torch.full((1, tokens), -100)
    labels[0, tokens - labelled :] = ids[0, tokens - labelled :]
    return {"input_ids": ids, "labels": labels, "position_ids": (torch.arange(tokens) % (tokens // rows))[None]}


def saved_bytes(model, inputs) -> int:
    """Bytes of all storages that autograd saves in a forward pass, the model's own weights left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that the address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_losses(model.train(), inputs).sum()
    return sum(storage.nbytes() for storage in kept.values())


def predicted(shape: Shape, adapter: Adapter, step: Step) -> int:
    """All blocks, the rotary tables, and what the loss keeps."""
    blocks = [sum(block_saves(shape, adapter, step, first=layer == 0).values()) for layer in range(shape.layers)]
    loss = 4 * step.tokens * (shape.hidden + 1) + step.labelled * (4 * shape.vocab + 16) + 4
    return sum(blocks) + 2 * step.element * step.tokens * shape.head_dim + loss


def test_one_block_by_hand():
    shape = Shape(layers=1, hidden=8, intermediate=24, heads=2, kv_heads=1, head_dim=4, vocab=10)
    saves = block_saves(shape, Adapter(r=2, dropout=0.1, targets=QV), Step(tokens=5, labelled=1))
    assert saves == {
        "norms": 2 * (5 * 8 * 4 + 5 * 4),  # float32 inputs and root mean squares
        "attention": 5 * 2 * (8 + 4 + 4 + 8) + 5 * 2 * 4,  # queries, keys, values, output; a log-sum for each head
        "MLP": 3 * 5 * 24 * 2,
        "adapters": 2 * (5 * 8 * (4 + 1) + 5 * 2 * 4),  # q and v: input after dropout, its mask, what B reads
        "shared inputs": 0,
    }


def test_int8_matrices_keep_what_they_read_and_nf4_ones_do_not():
    shape = Shape(layers=1, hidden=8, intermediate=24, heads=2, kv_heads=1, head_dim=4, vocab=10)
    kept = {bits: block_saves(shape, Adapter(), Step(5, 1, bits=bits))["shared inputs"] for bits in (16, 8, 4)}
    assert kept == {16: 0, 8: 2 * 5 * (8 + 8 + 24), 4: 0}


def test_a_packed_row_keeps_no_more_for_each_token_however_long_it_is():
    shape = Shape(layers=1, hidden=8, intermediate=24, heads=2, kv_heads=1, head_dim=4, vocab=10)
    sums = [sum(block_saves(shape, Adapter(), Step(t, 1, packed=True)).values()) for t in (64, 128)]
    assert sums[1] == 2 * sums[0]


cases = [
    *itertools.product([QV, ALL, ["k_proj"], ["o_proj", "down_proj"]], [0.0, 0.05], [1], ["bfloat16"], ["llama"]),
    *itertools.product([QV, ALL], [0.0, 0.05], [2], ["bfloat16"], ["llama", "qwen3"]),  # packed
    *itertools.product([ALL, ["o_proj", "down_proj"]], [0.0, 0.05], [1], ["float32"], ["llama"]),
    *itertools.product([["gate_proj"], ["up_proj"]], [0.05], [1], ["bfloat16"], ["llama"]),
    *itertools.product([QV, ["k_proj", "gate_proj"]], [0.05], [1], ["bfloat16"], ["qwen2", "qwen3"]),
]


@pytest.mark.parametrize(("targets", "dropout", "rows", "dtype", "family"), cases)
def test_saved_tensors_are_those_autograd_saves(targets, dropout, rows, dtype, family):
    adapter, inputs = Adapter(r=8, dropout=dropout, targets=targets), batch(48, 32, rows)
    model = add_adapter(tiny(getattr(torch, dtype), family), adapter, "tiny")
    step = Step(48, int((inputs["labels"] >= 0).sum()), rows > 1, dtype=dtype, device="cpu")
    shape = Shape.from_config(model.config.to_dict())
    assert predicted(shape, adapter, step) == saved_bytes(model, inputs)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 4}, {"hidden_size": 128, "num_hidden_layers": 5}])
@pytest.mark.parametrize(("tokens", "labelled"), [(24, 24), (192, 10)])
def test_so_they_are_at_other_shapes_and_lengths(changes, tokens, labelled):
    adapter, inputs = Adapter(r=4, targets=ALL), batch(tokens, labelled)
    model = add_adapter(tiny(**changes), adapter, "tiny")
    step = Step(tokens, int((inputs["labels"][0, 1:] >= 0).sum()), device="cpu")
    assert predicted(Shape.from_config(model.config.to_dict()), adapter, step) == saved_bytes(model, inputs)


def test_so_they_are_under_autocast_as_on_a_turing_card():
    adapter, inputs = Adapter(r=8, dropout=0, targets=ALL), batch(48, 32)
    model = add_adapter(tiny(torch.float16), adapter, "tiny")
    with torch.autocast("cpu", torch.float16):
        measured = saved_bytes(model, inputs)
    assert predicted(Shape.from_config(model.config.to_dict()), adapter, Step(48, 32, dtype="float16")) == measured
