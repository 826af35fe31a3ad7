"""One training step in, the bytes that it keeps for the backward pass out, tensor by tensor.

Backward, a product needs the factor it was multiplied by, unless the other one is frozen. That decides what costs:

* a frozen 16- or 4-bit matrix keeps nothing; bitsandbytes' int8 matrix keeps what it read all the same;
* LoRA's A and B keep what they read, in float32 unless autocast computes in 16 bits: the adapters have few weights
  but make most of the tensors;
* RMSNorm computes in float32 and keeps its input in it, twice the size of the stream it came from;
* attention (torch's fused kernels) keeps queries, keys, values and output, never the scores; the MLP keeps three of
  the widest tensors of the block.

The list is read off transformers' LLaMA block, peft's LoRA layers and bitsandbytes' products; the tests hold it,
to the byte, against what autograd holds on a CPU. Left out: the outlier columns of LLM.int8(), and attention kernels
that fall back to keeping scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from cvlib.recipes import Adapter
from cvlib.shapes import Shape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: What each matrix reads: one of four tensors of a block; in the order of computation.
READS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "first norm"),
    "o_proj": "attention",
    **dict.fromkeys(("gate_proj", "up_proj"), "second norm"),
    "down_proj": "product",
}


@dataclass(frozen=True)
class Step:
    """One forward and backward pass over a row of `tokens`, of which `labelled` carry a label."""

    tokens: int
    labelled: int
    packed: bool = False  # several conversations share the row, and attention takes each on its own
    bits: int = 16
    dtype: str = "bfloat16"
    device: str = "cuda"

    @property
    def element(self) -> int:
        """Bytes of a number in the model's own stream."""
        return BYTES[self.dtype]

    @property
    def autocast(self) -> bool:
        """On cards, float16 trains under autocast with a gradient scaler (`training.arguments`)."""
        return self.device == "cuda" and self.dtype == "float16"

    @property
    def adapter_element(self) -> int:
        """Bytes of a number inside an adapter: float32, or 16 bits under autocast."""
        return 2 if self.autocast else 4

    @property
    def converts(self) -> bool:
        """Whether peft copies what an adapter reads to float32; over quantised matrices it leaves that to autocast."""
        return self.element == 2 and not (self.autocast and self.bits < 16)


def block_saves(shape: Shape, adapter: Adapter, step: Step, first: bool = False) -> dict[str, int]:
    """Bytes one block keeps for its backward pass, by kind.

    In the `first` block of a model without checkpointing no gradient is needed before the first adapter.

    >>> saves = block_saves(Shape(1, 64, 160, 4, 4, 16, 96), Adapter(r=8, dropout=0), Step(tokens=32, labelled=1))
    >>> saves["norms"] == 2 * 4 * 32 * (64 + 1), saves["MLP"] == 3 * 2 * 32 * 160
    (True, True)
    """
    t, e, q, kv = step.tokens, step.element, shape.query_width, shape.key_width
    flows, reached = {}, not first  # whether a gradient goes back into each of the four tensors
    for name, source in READS.items():
        flows.setdefault(source, reached)
        reached = reached or name in adapter.targets
    gated = 3 if flows["second norm"] else 2 * ("gate_proj" in adapter.targets) + ("up_proj" in adapter.targets)
    return {
        "norms": 4 * t * _normalised(shape, adapter, first, flows),
        "attention": flows["attention"] * t * (2 * e * (q + kv) + 4 * shape.heads),  # and a float32 log-sum a head
        "MLP": e * t * shape.intermediate * gated,  # gate before and after SiLU, and up
        "adapters": sum(_adapter(shape, adapter, step, name, flows[READS[name]]) for name in adapter.targets),
        "shared inputs": _shared(shape, adapter, step, flows),
    }


def _normalised(shape: Shape, adapter: Adapter, first: bool, flows: dict[str, bool]) -> int:
    """Float32 numbers a token that the norms keep: what they read, and one root mean square a norm."""
    numbers = (shape.hidden + 1) * (flows["first norm"] + flows["second norm"])
    if shape.qk_norm:
        numbers += shape.heads * (shape.head_dim + 1) * (not first or "q_proj" in adapter.targets)
        numbers += shape.kv_heads * (shape.head_dim + 1) * (not first or "k_proj" in adapter.targets)
    return numbers


def _own_input(adapter: Adapter, step: Step, flows: bool) -> int:
    """Bytes an adapter keeps for each number it reads; 0 if that is a tensor of the block itself."""
    if not adapter.dropout:
        return step.adapter_element if step.converts else 0
    mask = 1 if step.device == "cuda" else (4 if step.converts else step.element)  # a CPU keeps factors, not flags
    return step.adapter_element + flows * mask


def _adapter(shape: Shape, adapter: Adapter, step: Step, name: str, flows: bool) -> int:
    """What A reads, what B reads, and autocast's 16-bit copies of both."""
    out, columns = shape.matrices[name]
    copies = step.autocast * 2 * adapter.r * (out + columns * flows)
    return step.tokens * (columns * _own_input(adapter, step, flows) + adapter.r * step.adapter_element) + copies


def _shared(shape: Shape, adapter: Adapter, step: Step, flows: dict[str, bool]) -> int:
    """Tensors of the block kept because an int8 matrix, or an adapter without a copy of its own, reads them."""
    read = {READS[name] for name in adapter.targets if not _own_input(adapter, step, False)}
    read |= {source for source in flows if step.bits == 8 and flows[source]}
    if flows["attention"] and not step.packed:
        read.discard("attention")  # its output is kept already; of a packed row, the parts are and not the whole
    widths = {source: shape.matrices[name][1] for name, source in READS.items()}
    return sum(step.element * step.tokens * widths[source] for source in read)


def workspace(shape: Shape, adapter: Adapter, step: Step) -> int:
    """Bytes a block needs beside what it keeps, at the worst of four moments, all in the MLP, its widest part.

    The end of the forward, with what down_proj's adapter read before dropout; up_proj's adapter, backward; SiLU,
    backward; a quantised matrix unpacked to 16 bits, beside the gradient it is multiplied by. The tensors as wide as
    the stream were counted in a run on a CPU; against its measured peak the sum is a few per cent off.
    """
    e, wide, narrow = step.element, step.tokens * shape.intermediate, step.tokens * shape.hidden
    down = "down_proj" in adapter.targets
    done = down * (_own_input(adapter, step, True) or e)  # what down_proj's adapter kept is freed first
    moments = {
        "forward": down * (wide * step.converts * (4 * bool(adapter.dropout) + e) + narrow * (4 + 5 * e)),
        "up": ("up_proj" in adapter.targets) * (wide * (2 * step.adapter_element - done) + narrow * (4 + 5 * e)),
        "SiLU": wide * (3 * e - done) + narrow * e,
        "unpacking": (step.bits < 16) * (wide * e + narrow * e + e * shape.hidden * shape.intermediate),
    }
    return max(moments.values())
