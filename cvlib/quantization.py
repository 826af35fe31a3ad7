"""Tensor ↔ small codes and scales: int8 by absmax, LLM.int8() outliers, NF4 and FP4 blocks, double quantisation.

Every scheme here is one idea used twice. Divide a group of numbers by its largest absolute value (`absmax`), so that
all lie in [−1, 1]; then write down, for each, the number of the nearest *level* in a short fixed list:

    code = nearest(x / absmax, levels)          x ≈ levels[code] · absmax

Schemes differ in the levels (255 even steps for int8, 16 normal quantiles for NF4, 16 tiny floats for FP4) and in how
many numbers share one absmax (a tensor, a row, a block of 64). Operations come in bitsandbytes' order, so that codes
equal the library's: in float32 x · (1/m) and x / m round differently. Left out: fast kernels.
Sources: LLM.int8() arXiv 2208.07339; QLoRA arXiv 2305.14314; the 8-bit levels for scales arXiv 2110.02861.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

TINY = 1e-36  # no absmax is smaller: a group of zeros divides safely, and 127 / TINY still fits in float32


def largest(x: Tensor, dim: int | tuple = ()) -> Tensor:
    """Largest absolute value over `dim` (all by default), kept as a dimension of length 1 so that it broadcasts.

    Refused (ValueError): an empty x; NaN or infinity, since one bad number would erase its whole group.

    >>> largest(torch.tensor([[1.0, -4.0], [2.0, 3.0]]), dim=0)
    tensor([[2., 4.]])
    """
    if x.numel() == 0:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} is empty; there is nothing to quantise")
    if bad := int((~x.isfinite()).sum()):
        raise ValueError(f"{bad} values are NaN or infinite in float32; mend them first")
    return x.abs().amax(dim, keepdim=True).clamp(min=TINY)


# --- int8: 255 even steps ---------------------------------------------------------------------------------------------


def quantize_int8(x: Tensor, dim: int | tuple = -1) -> tuple[Tensor, Tensor]:
    """Absmax int8: codes in −127 … 127, and the float32 absmax of each group, shaped to broadcast against x.

    `dim` says what shares a scale: −1, each row its own; 0, each column; (), one for the whole tensor.

    >>> quantize_int8(torch.tensor([[0.5, -2.0, 1.0]]))
    (tensor([[  32, -127,   64]], dtype=torch.int8), tensor([[2.]]))
    """
    x = x.float()
    absmax = largest(x, dim)
    return (x * (127 / absmax)).round().to(torch.int8), absmax


def dequantize_int8(q: Tensor, absmax: Tensor) -> Tensor:
    """The float32 values the codes stand for, each within half a step, absmax / 254, of what was quantised."""
    return q / 128 * absmax * (128 / 127)  # q / 128 is exact; q · absmax could overflow


def int8_matmul(xq: Tensor, x_absmax: Tensor, wq: Tensor, w_absmax: Tensor) -> Tensor:
    """x Wᵀ from codes (time, in) and (out, in): an integer product, then one multiplication by both scales.

    Scales may vary only along what survives the product: rows of x (time, 1), rows of W (out, 1), its output features.

    >>> xq, wq = torch.tensor([[127, -127]], dtype=torch.int8), torch.tensor([[127, 0]], dtype=torch.int8)
    >>> int8_matmul(xq, torch.tensor([[3.0]]), wq, torch.tensor([[2.0]]))      # (3, −3) · (2, 0)
    tensor([[6.]])
    """
    total = xq.double() @ wq.double().T  # float64 holds every integer below 2⁵³: exact, on any device
    return total.float() * (x_absmax * w_absmax.reshape(-1)) / 127**2  # (..., out)


def llm_int8(x: Tensor, wq: Tensor, w_absmax: Tensor, threshold: float = 6.0) -> Tensor:
    """x Wᵀ by LLM.int8(): columns of x that hold an outlier stay in floating point, the rest is multiplied in int8.

    An outlier is an entry of x (time, in) of size `threshold` or more. As in bitsandbytes its column meets the
    dequantised int8 weight: no second copy of W is kept.

    >>> x, w = torch.tensor([[0.1, -0.2, 60.0]]), quantize_int8(torch.ones(1, 3))   # in steps of 60/127 two are 0
    >>> f"{llm_int8(x, *w).item():.4f}", f"{llm_int8(x, *w, threshold=99).item():.4f}"
    ('59.9008', '60.0000')
    """
    largest(x := x.float())  # refuses NaN and infinity, which would pass as an outlier
    is_outlier = x.abs() >= threshold
    columns = is_outlier.any(dim=0)  # (in,)
    xq, x_absmax = quantize_int8(x.masked_fill(is_outlier, 0))
    xq[:, columns] = 0
    return int8_matmul(xq, x_absmax, wq, w_absmax) + x[:, columns] @ dequantize_int8(wq, w_absmax)[:, columns].T


# --- levels: short lists of numbers in [−1, 1] ------------------------------------------------------------------------


def nf4_levels(offset: float = 0.9677083) -> Tensor:
    """NormalFloat4: 16 quantiles of the normal distribution, 8 above zero, an exact zero, 7 below, scaled to [−1, 1].

    `offset` is the outermost probability. QLoRA's rule, 1 − ½(1/32 + 1/30), gives 0.96770833…; bitsandbytes typed
    seven digits of it and steps in float32, which decides the last bits of the table.

    >>> nf4_levels()[[0, 6, 7, 8, 15]]
    tensor([-1.0000, -0.0911,  0.0000,  0.0796,  1.0000])
    """
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in torch.linspace(offset, 0.5, 9)[:-1].tolist()]
    below = [-quantile(p) for p in torch.linspace(offset, 0.5, 8)[:-1].tolist()]
    levels = torch.tensor(sorted([*below, 0.0, *above]))
    return levels / levels.max()


def fp4_levels() -> Tensor:
    """4-bit floats in the order of their codes: sign, two exponent bits e, one mantissa bit m, divided by the largest.

    Exponents run downwards, (1 + m/2)·2^(4−e) for e = 1, 2, 3; e = 0 holds zero and one very small number, 1/16.

    >>> (fp4_levels()[:8] * 12).tolist()
    [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    """
    positive = [m / 16 if e == 0 else (1 + m / 2) * 2 ** (4 - e) for e in range(4) for m in (0, 1)]
    return torch.tensor(positive + [-value for value in positive]) / 12


def dynamic_levels() -> Tensor:
    """256 levels for scales: seven decades, each with twice the steps of the one below; they end at exactly 1.

    >>> len(dynamic_levels()), dynamic_levels()[[0, 127, 128, 255]]
    (256, tensor([-9.9297e-01,  0.0000e+00,  5.5000e-07,  1.0000e+00]))
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(levels))


LEVELS = {"nf4": nf4_levels, "fp4": fp4_levels}


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Code (uint8) of the level nearest each x: which of the midpoints between sorted levels does x exceed?

    >>> nearest(torch.tensor([-0.9, 0.2, 0.6]), torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0, 1, 2], dtype=torch.uint8)
    """
    ordered, order = levels.to(x.device).sort(stable=True)  # FP4's codes are not in the order of their values
    midpoints = (ordered[:-1] + ordered[1:]) / 2
    return order.to(torch.uint8)[torch.bucketize(x, midpoints)]


# --- blocks: 64 neighbours share one absmax ---------------------------------------------------------------------------


def quantize_blocks(x: Tensor, levels: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Codes of the flattened x, and one absmax for every `block_size` neighbours (the last block may be shorter).

    >>> quantize_blocks(torch.tensor([1.0, -2.0, 30.0]), torch.tensor([-1.0, 0.0, 1.0]), block_size=2)
    (tensor([1, 0, 2], dtype=torch.uint8), tensor([ 2., 30.]))
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; take 1 or more, usually 64")
    flat = x.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax = largest(blocks, dim=-1)
    codes = nearest(blocks * (1 / absmax), levels)
    return codes.flatten()[: len(flat)], absmax.flatten()


def dequantize_blocks(codes: Tensor, absmax: Tensor, levels: Tensor, block_size: int = 64) -> Tensor:
    """Flat float32 values: each code's level times the absmax of its block.

    >>> dequantize_blocks(torch.tensor([1, 0, 2]), torch.tensor([2.0, 30.0]), torch.tensor([-1.0, 0.0, 1.0]), 2)
    tensor([ 0., -2., 30.])
    """
    return levels.to(codes.device)[codes.int()] * absmax.repeat_interleave(block_size)[: len(codes)]


def pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first in the upper half; an odd count is padded with code 0.

    >>> [f"{byte:08b}" for byte in pack(torch.tensor([1, 15, 7], dtype=torch.uint8)).tolist()]
    ['00011111', '01110000']
    """
    even = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    return even[::2] << 4 | even[1::2]


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes that `pack` packed."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten()[:count]


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: 8-bit codes of the scales, an absmax for every 256, and the mean they are taken around."""
    mean = absmax.mean()  # scales are all positive: without it, half of the signed levels would never be used
    return *quantize_blocks(absmax - mean, dynamic_levels(), block_size=256), mean


def dequantize_scales(codes: Tensor, absmax: Tensor, mean: Tensor) -> Tensor:
    """The scales, nearly: they come back within about one part in a hundred.

    >>> dequantize_scales(*quantize_scales(torch.tensor([1.0, 2.0, 6.0])))
    tensor([0.9914, 2.0039, 6.0000])
    """
    return dequantize_blocks(codes, absmax, dynamic_levels(), block_size=256) + mean


@dataclass(frozen=True)
class Weight4bit:
    """A weight at rest: packed codes, the scales of its blocks, and what is needed to read them.

    >>> w = Weight4bit.of(torch.ones(8, 64), double=False)
    >>> w.nbytes, w.values().shape                                          # 512 codes in 256 bytes, 8 scales of 4
    (288, torch.Size([8, 64]))
    """

    packed: Tensor  # (⌈n / 2⌉,) uint8
    scales: tuple[Tensor, ...]  # (absmax,), float32, one per block; or the three parts of `quantize_scales`
    shape: torch.Size
    kind: str
    block_size: int

    @classmethod
    def of(cls, weight: Tensor, kind: str = "nf4", block_size: int = 64, double: bool = True) -> Weight4bit:
        """Quantise to `kind` ("nf4" or "fp4"); `double` quantises the scales, too."""
        if kind not in LEVELS:
            raise ValueError(f"{kind!r} is no 4-bit format; choose from {', '.join(LEVELS)}")
        codes, absmax = quantize_blocks(weight, LEVELS[kind](), block_size)
        return cls(pack(codes), quantize_scales(absmax) if double else (absmax,), weight.shape, kind, block_size)

    def values(self) -> Tensor:
        """The float32 weight these codes stand for, in its own shape."""
        absmax = self.scales[0] if len(self.scales) == 1 else dequantize_scales(*self.scales)
        codes = unpack(self.packed, self.shape.numel())
        return dequantize_blocks(codes, absmax, LEVELS[self.kind](), self.block_size).view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(part.nbytes for part in (self.packed, *self.scales))


def bits_per_parameter(bits: int, block_size: int, double: bool = False) -> float:
    """Bits one weight costs with its share of the scales (the one mean of a double-quantised tensor left out).

    >>> bits_per_parameter(4, 64), bits_per_parameter(4, 64, double=True)
    (4.5, 4.126953125)
    """
    return bits + (8 + 32 / 256 if double else 32) / block_size
