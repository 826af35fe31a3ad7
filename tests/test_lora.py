"""LoRA held from three sides: by hand, there and back, and against peft (with finite differences for the gradients)."""

import copy
import math
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cvlib import lora, recipes

QV = ["q_proj", "v_proj"]
shapes = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda oi: st.tuples(st.just(oi[0]), st.just(oi[1]), st.integers(1, min(oi)))
)


def trained_layer(out=6, inp=5, r=2, dtype=torch.float32, kind=lora.LoRALinear, seed=0, **options):
    """A layer whose B is no longer zero."""
    torch.manual_seed(seed)
    layer = kind(nn.Linear(inp, out, dtype=dtype), r, 4, **options)
    nn.init.normal_(layer.B, std=0.1)
    return layer


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=4, num_key_value_heads=2))


# by hand


def test_two_by_two_by_hand():
    base = nn.Linear(2, 2, bias=False)
    layer = lora.LoRALinear(base, r=1, alpha=3)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.B.copy_(torch.tensor([[2.0], [0.5]]))
    # x = (1, 2): W x = (5, 11); A x = -1; s B (A x) = 3 · (-2, -0.5)
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [5 - 6, 11 - 1.5]
    assert layer.delta().tolist() == [[6.0, -6.0], [1.5, -1.5]]


def test_scales():
    base = nn.Linear(8, 8)
    assert lora.LoRALinear(base, 4, 16).s == 4
    assert lora.LoRALinear(base, 4, 16, rslora=True).s == 8


@pytest.mark.parametrize("r", [0, -1, 6])
def test_a_rank_that_saves_nothing_is_refused(r):
    with pytest.raises(ValueError, match="from 1 to 5"):
        lora.LoRALinear(nn.Linear(5, 9), r, 8)


@pytest.mark.parametrize("alpha", [0, -8, math.nan, math.inf])
def test_a_scale_that_cannot_learn_is_refused(alpha):
    with pytest.raises(ValueError, match="take a finite number above 0"):
        lora.LoRALinear(nn.Linear(5, 9), 2, alpha)


def test_the_projections_are_those_of_the_recipes():
    assert lora.PROJECTIONS is recipes.PROJECTIONS
    with pytest.raises(ValueError, match="no projection is called 'qkv'; choose from q_proj"):
        lora.parameter_count(tiny_llama().config, 8, ["q_proj", "qkv"])


def test_parameter_counts_of_the_published_adapters():
    seven = SimpleNamespace(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    thirteen = SimpleNamespace(num_hidden_layers=40, hidden_size=5120, intermediate_size=13824, num_attention_heads=40)
    assert lora.parameter_count(seven, 8, QV) == 4_194_304
    assert lora.parameter_count(seven, 8) == 19_988_480
    assert lora.parameter_count(thirteen, 8, QV) == 6_553_600


@pytest.mark.parametrize("targets", [QV, lora.PROJECTIONS, ["down_proj"]])
def test_the_formula_counts_what_attach_makes(targets):
    model = tiny_llama()  # grouped-query attention: k and v are half as wide
    wrapped = lora.attach(model, targets, r=3, alpha=6)
    assert wrapped == 2 * len(targets)
    assert lora.trainable(model) == lora.parameter_count(model.config, 3, targets)


def test_only_the_adapter_learns():
    model = tiny_llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    lora.attach(model, QV, r=2, alpha=4)
    ids = torch.arange(12).reshape(2, 6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(
        torch.equal(before[n], after[n.replace("q_proj.", "q_proj.base.").replace("v_proj.", "v_proj.base.")])
        for n in before
    )
    assert all(layer.B.count_nonzero() for layer in lora.adapters(model).values())


def test_a_missing_target_is_named():
    with pytest.raises(ValueError, match="'query_key_value'; this model has down_proj"):
        lora.attach(tiny_llama(), ["q_proj", "query_key_value"], r=2, alpha=4)


def test_dropout_acts_in_training_only():
    layer, x = trained_layer(dropout=0.5), torch.randn(64, 5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# there and back


@given(shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_untrained_changes_nothing(shape, dtype, seed):
    torch.manual_seed(seed)
    out, inp, r = shape
    x = torch.randn(3, inp, dtype=dtype)
    for kind, tolerance in ((lora.LoRALinear, 0), (lora.DoRALinear, 1e-6)):
        layer = kind(nn.Linear(inp, out, dtype=dtype), r, 8)
        y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, layer.base(x), rtol=tolerance, atol=tolerance)


@given(shapes, st.floats(1e-40, 1e30), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_merge_then_unmerge_within_two_roundings(shape, size, seed):
    out, inp, r = shape
    layer = trained_layer(out, inp, r, seed=seed)
    with torch.no_grad():  # from denormal to huge
        layer.base.weight.mul_(size)
        layer.B.mul_(size)
    W, delta = layer.base.weight.detach().clone(), layer.delta()
    assert layer.merge() == 0.0  # float32: the sum is stored as computed
    torch.testing.assert_close(layer.base.weight.double(), W.double() + delta.double(), rtol=1e-6, atol=1e-44)
    layer.unmerge()
    room = 2 * torch.finfo(torch.float32).eps * (W.abs().double() + delta.abs().double()) + 3e-45
    assert ((layer.base.weight.double() - W.double()).abs() <= room).all()


@pytest.mark.parametrize("kind", [lora.LoRALinear, lora.DoRALinear])
def test_merged_model_gives_the_same_answers(kind):
    model, ids = tiny_llama(), torch.arange(20).reshape(2, 10)
    plain = {name for name, _ in model.named_modules()}
    lora.attach(model, lora.PROJECTIONS, r=2, alpha=4, kind=kind)
    for layer in lora.adapters(model).values():
        nn.init.normal_(layer.B, std=0.1)
    expected = model(ids).logits
    costs = lora.merge(model)
    assert len(costs) == 14  # all seven projections of both layers, not just q and v
    assert {name for name, _ in model.named_modules()} == plain
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_zero_update_costs_nothing_and_bf16_costs_something():
    layer = lora.LoRALinear(nn.Linear(64, 64, dtype=torch.bfloat16), 4, 8)
    W = layer.base.weight.detach().clone()
    assert layer.merge() == 0.0
    assert torch.equal(layer.base.weight, W)
    layer.unmerge()
    nn.init.normal_(layer.B, std=1e-3)
    cost = layer.merge()
    exact = (W.float() + layer.delta()).double()
    by_hand = (layer.base.weight.double() - exact).norm() / layer.delta().double().norm()
    assert cost == pytest.approx(by_hand.item(), rel=1e-4)
    assert 0.05 < cost < 1.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_a_sum_that_is_not_finite_is_refused_and_the_weight_kept(bad):
    layer = trained_layer(dtype=torch.float16)
    W = layer.base.weight.detach().clone()
    with torch.no_grad():
        layer.B[0, 0] = bad  # 1e6 is fine in float32 and not in float16
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        layer.merge()
    assert torch.equal(layer.base.weight, W)
    assert not layer.merged


def test_merging_twice_or_out_of_turn_is_refused():
    layer = trained_layer()
    with pytest.raises(ValueError, match="not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(ValueError, match="merged already"):
        layer.merge()
    dora = trained_layer(kind=lora.DoRALinear)
    dora.merge()
    with pytest.raises(ValueError, match="reload"):
        dora.unmerge()


def test_a_quantised_base_runs_and_will_not_merge():
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(64, 64, bias=False)
    base = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    base.load_state_dict(plain.state_dict())
    base.to("cpu")
    base.support_avx512bf16_for_cpu = False
    layer = lora.LoRALinear(base, 4, 8)
    x = torch.randn(2, 64)
    layer(x).square().sum().backward()
    assert layer.B.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"uint8 codes; load it in 16 or 32 bits"):
        layer.merge()


# the gradients


@pytest.mark.parametrize("options", [{}, {"rslora": True}])
def test_gradients_by_formula_and_by_finite_differences(options):
    layer, x = trained_layer(dtype=torch.float64, **options), torch.randn(7, 5, dtype=torch.float64)
    target = torch.randn(7, 6, dtype=torch.float64)
    F.mse_loss(layer(x), target).backward()
    G = 2 * (layer(x) - target).detach() / target.numel()  # dL/dy
    torch.testing.assert_close(layer.B.grad, layer.s * G.T @ x @ layer.A.T, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(layer.A.grad, layer.s * layer.B.T @ G.T @ x, rtol=1e-12, atol=1e-15)

    def loss_of(A, B):
        return F.mse_loss(torch.func.functional_call(layer, {"A": A, "B": B}, (x,)), target)

    assert torch.autograd.gradcheck(loss_of, (layer.A.detach().requires_grad_(), layer.B.detach().requires_grad_()))


# equality with peft (s = 12 / 4: a power of two would hide a different order of operations)


def to_peft(model, **options):
    """The same adapter in peft: A, B (and DoRA's m) copied in."""
    twin = copy.deepcopy(model)
    own = lora.adapters(twin)
    for name, layer in own.items():
        twin.set_submodule(name, layer.base)
    twin = peft.get_peft_model(twin, peft.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, **options))
    for name, layer in own.items():
        there = twin.base_model.model.get_submodule(name)
        there.lora_A["default"].weight.data.copy_(layer.A)
        there.lora_B["default"].weight.data.copy_(layer.B)
    return twin


def three_steps(model, groups, ids):
    """Losses and final (A, B) of three AdamW steps; groups: parameters, or optimiser groups."""
    optimizer, losses = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("kind", "options", "peft_options", "tolerance"),
    [
        (lora.LoRALinear, {}, {}, 0.0),
        (lora.LoRALinear, {"rslora": True}, {"use_rslora": True}, 0.0),
        (lora.DoRALinear, {}, {"use_dora": True}, 1e-6),
    ],
    ids=["lora", "rslora", "dora"],
)
def test_three_adamw_steps_equal_peft(kind, options, peft_options, tolerance):
    ours, ids = tiny_llama(), torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))
    lora.attach(ours, lora.PROJECTIONS, r=4, alpha=12, kind=kind, **options)
    theirs = to_peft(ours, target_modules=list(lora.PROJECTIONS), **peft_options)
    mine = three_steps(ours, [p for p in ours.parameters() if p.requires_grad], ids)
    assert mine == pytest.approx(
        three_steps(theirs, [p for p in theirs.parameters() if p.requires_grad], ids), rel=tolerance
    )
    for name, layer in lora.adapters(ours).items():
        there = theirs.base_model.model.get_submodule(name)
        pairs = [(layer.A, there.lora_A["default"].weight), (layer.B, there.lora_B["default"].weight)]
        if kind is lora.DoRALinear:
            pairs.append((layer.m, there.lora_magnitude_vector["default"].weight))
        for a, b in pairs:
            assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_dora_stretches_rows_and_leaves_the_bias_alone():
    layer, x = trained_layer(kind=lora.DoRALinear), torch.randn(3, 5)
    with torch.no_grad():
        layer.m.copy_(torch.arange(1.0, 7.0))  # each row of the adapted weight must come out this long
    rows = F.normalize(layer.base.weight + layer.delta(), dim=1) * layer.m[:, None]
    torch.testing.assert_close(layer(x), x @ rows.T + layer.base.bias)
    layer.merge()
    torch.testing.assert_close(layer.base.weight, rows)


def test_lora_plus_equals_peft():
    from peft.optimizers import create_loraplus_optimizer

    ours, ids = tiny_llama(), torch.arange(24).reshape(2, 12)
    lora.attach(ours, QV, r=4, alpha=12)
    theirs = to_peft(ours, target_modules=QV)
    mine = three_steps(ours, lora.plus_groups(ours, lr=1e-3, ratio=16), ids)
    there = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    groups = [{"params": g["params"], "lr": g["lr"]} for g in there.param_groups if g["params"]]
    assert mine == three_steps(theirs, groups, ids)


def test_half_precision_base_equals_peft():
    ours, ids = tiny_llama().bfloat16(), torch.arange(24).reshape(2, 12)
    lora.attach(ours, QV, r=4, alpha=12)
    for layer in lora.adapters(ours).values():
        assert layer.A.dtype == torch.float32
        nn.init.normal_(layer.B, std=0.1)
    assert torch.equal(ours(ids).logits, to_peft(ours, target_modules=QV)(ids).logits)


# arithmetic on adapters


def test_arithmetic_on_adapters_equals_arithmetic_on_updates():
    first, second = ({"a": trained_layer(seed=s), "b": trained_layer(seed=s + 5)} for s in (0, 1))
    one, two = lora.detach(nn.ModuleDict(first)), lora.detach(nn.ModuleDict(second))
    del two["b"]  # an adapter need not touch every layer
    total = lora.combine((1.0, one), (-0.5, two))
    A, B = total["a"]
    assert A.shape[0] == 4  # the ranks add up
    torch.testing.assert_close(B @ A, first["a"].delta() - 0.5 * second["a"].delta())
    torch.testing.assert_close(total["b"][1] @ total["b"][0], first["b"].delta())
    model = nn.ModuleDict({"a": copy.deepcopy(first["a"].base), "b": nn.Linear(5, 6)})
    W = model["a"].weight.detach().clone()
    lora.add_to(model, lora.combine((3.0, one), (-1.0, one)))
    torch.testing.assert_close(model["a"].weight, W + 2 * first["a"].delta())


@given(st.lists(st.tuples(shapes.map(lambda s: s[2]), st.floats(-4, 4)), min_size=1, max_size=4), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_a_sum_has_all_ranks_and_is_the_sum(terms, seed):
    gen = torch.Generator().manual_seed(seed)
    parts = [(w, {"a": (torch.randn(r, 7, generator=gen), torch.randn(5, r, generator=gen))}) for r, w in terms]
    A, B = lora.combine(*parts)["a"]
    assert A.shape[0] == B.shape[1] == sum(r for r, _ in terms)
    expected = sum(w * part["a"][1].double() @ part["a"][0].double() for w, part in parts)
    torch.testing.assert_close((B @ A).double(), expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_another_model_are_refused_in_one_line():
    small, wide = ({"a": (torch.ones(2, n), torch.ones(3, 2))} for n in (5, 6))
    with pytest.raises(ValueError, match=r"^a: updates of shapes \[\(3, 5\), \(3, 6\)\] cannot be added.*$"):
        lora.combine((1.0, small), (1.0, wide))
    model = nn.ModuleDict({"a": nn.Linear(5, 3)})
    W = model["a"].weight.detach().clone()
    for name, adapter in {"a": wide, "b": {"b": small["a"]}}.items():
        with pytest.raises(ValueError, match=f"^{name}: the shapes do not fit: .*the model's W .*take an adapter of"):
            lora.add_to(model, adapter)
    with pytest.raises(ValueError, match="the shapes do not fit"):  # B and A do not even fit each other
        lora.add_to(model, {"a": (torch.ones(2, 5), torch.ones(3, 1))})
    with pytest.raises(ValueError, match="not finite"):
        lora.add_to(model, lora.combine((math.inf, small)))
    assert torch.equal(model["a"].weight, W)


def test_arithmetic_equals_pefts_cat():
    ours = tiny_llama()
    lora.attach(ours, QV, r=4, alpha=12)
    for layer in lora.adapters(ours).values():
        nn.init.normal_(layer.B, std=0.1)
    theirs = to_peft(ours, target_modules=QV)
    theirs.add_weighted_adapter(["default", "default"], [1.0, 0.5], "sum", combination_type="cat")
    total = lora.combine((1.0, lora.detach(ours)), (0.5, lora.detach(ours)))
    for name, (A, B) in total.items():
        torch.testing.assert_close(B @ A, theirs.base_model.model.get_submodule(name).get_delta_weight("sum"))


def test_an_empty_adapter_is_not_kept():
    model = tiny_llama()
    lora.attach(model, QV, r=2, alpha=4)
    with pytest.raises(ValueError, match="never trained"):
        lora.detach(model)


def test_dora_is_not_detached_without_its_lengths():
    with pytest.raises(ValueError, match="not a product"):
        lora.detach(nn.ModuleDict({"q_proj": trained_layer(kind=lora.DoRALinear)}))
