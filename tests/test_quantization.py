"""cvlib.quantization: worked by hand, there and back, and equal to bitsandbytes on the real model's weights."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cvlib import assets
from cvlib import quantization as q

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
from bitsandbytes import functional as bnb  # noqa: E402


@pytest.fixture(scope="module")
def smol():
    """Every matrix of one block of the running model, 3.5 million weights."""
    from gguf import GGUFReader, dequantize

    tensors = GGUFReader(assets.fetch("smollm2-135m")).tensors
    block = [t for t in tensors if t.name.startswith("blk.7.") and len(t.shape) == 2]
    return [torch.tensor(dequantize(t.data, t.tensor_type)) for t in block]


@pytest.fixture(scope="module")
def minilm():
    """Every matrix of one block of a model that was never quantised, 1.8 million weights."""
    from safetensors import safe_open

    with safe_open(assets.fetch("minilm"), "pt") as file:
        names = [n for n in file.keys() if "layer.3." in n and n.endswith("weight")]  # noqa: SIM118
        return [w for n in names if (w := file.get_tensor(n)).dim() == 2]


@pytest.fixture(scope="module", params=["smol", "minilm"])
def weights(request):
    return request.getfixturevalue(request.param)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_int8_by_hand_per_tensor_row_and_column():
    x = torch.tensor([[1.0, -2.0], [0.5, 127.0]])
    assert q.quantize_int8(x, dim=())[0].tolist() == [[1, -2], [0, 127]]  # 0.5 is a tie: to even
    assert q.quantize_int8(x, dim=-1)[0].tolist() == [[64, -127], [0, 127]]
    assert q.quantize_int8(x, dim=0)[0].tolist() == [[127, -2], [64, 127]]
    assert q.quantize_int8(x, dim=-1)[1].shape == (2, 1)
    assert q.quantize_int8(x, dim=0)[1].shape == (1, 2)


def test_nearest_chooses_the_nearest_level():
    x = torch.linspace(-1, 1, 4001)
    for levels in (q.nf4_levels(), q.fp4_levels(), q.dynamic_levels()):
        chosen = levels[q.nearest(x, levels).int()]
        torch.testing.assert_close((chosen - x).abs(), (levels - x[:, None]).abs().amin(dim=1), atol=1e-7, rtol=0)


def test_nf4_has_an_exact_zero_and_equal_steps_in_probability():
    levels = q.nf4_levels().double()
    assert levels[7] == 0
    assert levels[0] == -1
    assert levels[15] == 1
    sigma = torch.special.ndtri(torch.tensor(0.9677083, dtype=torch.float64))
    for half, steps in ((levels[7:], 8), (levels[:8], 7)):
        probability = torch.special.ndtr(half * sigma).diff()
        torch.testing.assert_close(probability, torch.full_like(probability, 0.4677083 / steps), atol=1e-6, rtol=0)


def test_bits_per_parameter_equal_the_bytes_that_are_stored():
    weight = torch.randn(256, 1024)  # 4,096 blocks: 16 blocks of scales
    for double in (False, True):
        stored = q.Weight4bit.of(weight, double=double).nbytes - (4 if double else 0)  # less the one mean
        assert stored * 8 / weight.numel() == q.bits_per_parameter(4, 64, double)
    assert round(q.bits_per_parameter(4, 64) - q.bits_per_parameter(4, 64, double=True), 2) == 0.37
    assert q.bits_per_parameter(8, 576) == 8 + 32 / 576


def test_outlier_column_costs_the_others_their_precision_unless_kept_apart():
    torch.manual_seed(0)
    x, w = torch.randn(16, 64), torch.randn(32, 64)
    x[:, 5] *= 40
    wq = q.quantize_int8(w)
    exact = x @ q.dequantize_int8(*wq).T
    kept = (q.llm_int8(x, *wq) - exact).abs().mean()
    lost = (q.llm_int8(x, *wq, threshold=1e9) - exact).abs().mean()
    assert kept < lost / 10


# --- there and back ---------------------------------------------------------------------------------------------------

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)  # huge, denormal, ±0
TENSORS = st.lists(FLOATS, min_size=1, max_size=300).map(torch.tensor)
SHAPED = arrays(np.float32, array_shapes(min_dims=1, max_dims=4, max_side=9), elements=FLOATS).map(torch.from_numpy)


@settings(deadline=None)
@given(TENSORS, st.sampled_from(["nf4", "fp4"]), st.sampled_from([2, 3, 64]), st.booleans())
def test_4bit_error_is_at_most_half_the_widest_gap(x, kind, block_size, negate):
    x = -x if negate else x
    levels = q.LEVELS[kind]()
    back = q.Weight4bit.of(x, kind, block_size, double=False).values()
    assert back.shape == x.shape
    padded = torch.nn.functional.pad(x, (0, -len(x) % block_size)).view(-1, block_size)
    absmax = padded.abs().amax(dim=1).repeat_interleave(block_size)[: len(x)]
    half_gap = levels.sort().values.diff().max() / 2
    assert ((back.double() - x).abs() <= half_gap.double() * absmax * (1 + 1e-5) + q.TINY).all()
    assert (back[x == 0] == 0).all()


@settings(deadline=None)
@given(SHAPED, st.sampled_from([(), -1, 0]))
def test_int8_error_is_at_most_half_a_step(x, dim):
    codes, absmax = q.quantize_int8(x, dim)
    back = q.dequantize_int8(codes, absmax)
    assert codes.shape == back.shape == x.shape
    assert ((back.double() - x).abs() <= absmax.double() / 254 * (1 + 1e-5)).all()


@settings(deadline=None)
@given(SHAPED, st.sampled_from([1, 7, 64]), st.booleans())
def test_any_shape_comes_back_in_its_shape_and_zeros_as_zeros(x, block_size, double):
    x = x / 2**14 if double else x  # the mean of all scales must not overflow
    weight = q.Weight4bit.of(x, block_size=block_size, double=double)
    back = weight.values()
    assert back.shape == x.shape
    assert back.isfinite().all()
    assert (back[x == 0] == 0).all()
    assert len(weight.scales[0]) == -(-x.numel() // block_size)  # the last block may be short


@given(st.lists(st.integers(0, 15), max_size=99))
def test_pack_and_unpack(codes):
    codes = torch.tensor(codes, dtype=torch.uint8)
    packed = q.pack(codes)
    assert len(packed) == (len(codes) + 1) // 2
    assert torch.equal(q.unpack(packed, len(codes)), codes)


@settings(deadline=None)
@given(st.lists(st.floats(2**-10, 2**10, width=32), min_size=1, max_size=600).map(torch.tensor))
def test_scales_come_back_within_the_widest_gap_of_their_levels(absmax):
    back = q.dequantize_scales(*q.quantize_scales(absmax))
    furthest = (absmax - absmax.mean()).abs().max()
    assert ((back - absmax).abs() <= furthest * 0.0072 + 1e-6 * absmax.max()).all()


def test_second_quantisation_of_nf4_values_changes_nothing():
    once = q.Weight4bit.of(torch.randn(64, 64), double=False).values()
    assert torch.equal(q.Weight4bit.of(once, double=False).values(), once)


@pytest.mark.parametrize("shape", [(1,), (63,), (65,), (3, 5), (2, 3, 7), (576, 65)])
@pytest.mark.parametrize("double", [False, True])
def test_any_shape_and_dtype_keeps_its_shape(shape, double):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert q.Weight4bit.of(torch.randn(shape).to(dtype), double=double).values().shape == shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quantize", [q.quantize_int8, q.Weight4bit.of, q.quantize_scales])
def test_nan_and_infinity_are_refused(bad, quantize):
    x = torch.ones(100)
    x[3] = bad
    with pytest.raises(ValueError, match="values are NaN or infinite"):
        quantize(x)
    with pytest.raises(ValueError, match="empty"):
        quantize(x[:0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_input_is_not_taken_for_an_outlier(bad):
    x = torch.ones(2, 8)
    x[1, 3] = bad
    with pytest.raises(ValueError, match="1 values are NaN or infinite"):
        q.llm_int8(x, *q.quantize_int8(torch.ones(4, 8)))


def test_impossible_formats_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^block_size is 0; take 1 or more"):
        q.quantize_blocks(torch.ones(4), q.nf4_levels(), 0)
    with pytest.raises(ValueError, match=r"^'nf3' is no 4-bit format; choose from nf4, fp4$"):
        q.Weight4bit.of(torch.ones(4), "nf3")


def test_float64_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="1 values are NaN or infinite"):
        q.quantize_int8(torch.tensor([1.0, 1e300], dtype=torch.float64))


def test_zeros_stay_zero():
    zeros = torch.zeros(3, 130)
    assert torch.equal(q.Weight4bit.of(zeros).values(), zeros)
    assert torch.equal(q.dequantize_int8(*q.quantize_int8(zeros)), zeros)


# --- equal to bitsandbytes --------------------------------------------------------------------------------------------


def test_tables_are_equal_to_the_last_bit():
    assert torch.equal(q.nf4_levels(), bnb.get_4bit_type("nf4", "cpu"))
    assert torch.equal(q.fp4_levels(), bnb.get_4bit_type("fp4", "cpu"))
    assert torch.equal(q.dynamic_levels(), bnb.create_dynamic_map())
    paper = q.nf4_levels(1 - (1 / 32 + 1 / 30) / 2)
    assert (paper != q.nf4_levels()).sum() == 12
    torch.testing.assert_close(paper, q.nf4_levels(), atol=3e-7, rtol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_codes_scales_and_values_are_equal(weights, kind):
    for w in weights:
        ours = q.Weight4bit.of(w, kind, double=False)
        packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=kind)
        assert torch.equal(ours.packed, packed.flatten())
        assert torch.equal(ours.scales[0], state.absmax)
        assert torch.equal(ours.values(), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(3, 100), (1, 66), (7, 64)])
def test_4bit_equal_when_the_last_block_is_short(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = q.Weight4bit.of(w, double=False)
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(ours.values(), bnb.dequantize_4bit(packed, state).view(shape))


def test_double_quantised_scales_are_equal_up_to_the_librarys_lookup_table(weights):
    levels, total, differ, unexplained = q.dynamic_levels(), 0, 0, 0
    for w in weights:
        ours = q.Weight4bit.of(w)
        codes, absmax, mean = ours.scales
        _, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
        theirs = state.absmax.flatten()
        assert torch.equal(mean, state.offset)
        assert torch.equal(absmax, state.state2.absmax)
        # On the CPU the library looks codes up in a table of 65,536 evenly spaced values between −1 and 1.
        scale = q.quantize_blocks(w, q.nf4_levels())[1] - mean
        scaled = scale / absmax.repeat_interleave(256)[: len(scale)]
        in_table = q.nearest(((scaled + 1) * 32767.5).round() / 32767.5 - 1, levels)
        total, differ = total + len(codes), differ + (codes != theirs).sum().item()
        unexplained += (in_table != theirs).sum().item()
    assert 0 < differ < 0.003 * total
    assert unexplained < differ / 20


def test_int8_codes_scales_and_values_are_equal(weights):
    for w in weights:
        codes, absmax = q.quantize_int8(w.half())
        theirs, stats, _ = bnb.int8_vectorwise_quant(w.half())
        assert torch.equal(codes, theirs)
        assert torch.equal(absmax.flatten(), stats)
        assert torch.equal(q.dequantize_int8(codes, absmax), bnb.int8_vectorwise_dequant(theirs, stats))


def test_int8_product_is_equal_but_for_the_librarys_constant(smol):
    wq, w_absmax = q.quantize_int8(smol[0].half())
    xq, x_absmax = q.quantize_int8(torch.randn(40, smol[0].shape[1]))
    theirs = torch.ops.bitsandbytes.int8_scaled_mm(xq, wq, x_absmax.flatten(), w_absmax.flatten(), dtype=torch.float32)
    ours = q.int8_matmul(xq, x_absmax, wq, w_absmax)
    assert ((theirs - ours).abs() <= 2e-5 * ours.abs()).all()
    torch.testing.assert_close(theirs / (6.200124e-05 * 127**2), ours, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 40])
def test_outlier_decomposition_is_equal(smol, rows):
    w = next(w for w in smol if w.shape == (576, 576))
    wq, w_absmax = q.quantize_int8(w.half())
    x = torch.randn(rows, 576, generator=torch.Generator().manual_seed(0)).half()
    x[:, 7] *= 20  # a whole column, one lone entry, and a column where only some reach 6
    x[0, 100] = 9
    x[:, 200] *= 3
    x[-1, 300] = 6  # exactly at the threshold
    xq, stats, columns = bnb.int8_vectorwise_quant(x.clone(), threshold=6.0)
    theirs = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x.float(), xq, wq, stats, w_absmax.flatten(), columns)[0]
    ours = q.llm_int8(x, wq, w_absmax)
    assert ((ours - theirs).abs() <= 2e-5 * ours.abs().max()).all()
    assert not torch.allclose(ours, q.llm_int8(x, wq, w_absmax, threshold=1e9), rtol=1e-3)
