"""A model's shape in, its parameters and the bytes of its weights out; nothing is loaded.

Ten numbers of a config.json decide how large a LLaMA-shaped model is. Almost all of it is seven matrices a block, and
only those are quantised; embeddings, norms and the head stay in 16 bits. So "a 7B model in 4 bits" is not 3.5 GB: the
scales add an eighth of a bit to every weight, and a vocabulary of 32,000 half a gigabyte to the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from cvlib import InputError, choose
from cvlib.recipes import Adapter

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Shape:
    """The numbers that decide a model's size, after the keys of transformers' config.json."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False  # the head is the embedding matrix
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3 normalises each head's queries and keys

    @classmethod
    def from_config(cls, config: dict) -> Shape:
        """Read a config.json; InputError for a model that is built differently."""
        family, heads = config.get("model_type"), config.get("num_attention_heads")
        if family not in FAMILIES:
            raise InputError(f"model_type is {family!r}; sizes are known for {', '.join(FAMILIES)}")
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The seven projections of a block as (out, in): all that is quantised, and all that LoRA may adapt."""
        q, kv, h, f = self.query_width, self.key_width, self.hidden, self.intermediate
        attention = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
        return attention | {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}


_LLAMA_7B = Shape(32, 4096, 11008, 32, 32, 128, 32000)
_LLAMA_13B = Shape(40, 5120, 13824, 40, 40, 128, 32000)
_SMOLLM2 = Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True)
#: Published shapes: Touvron et al. 2023, table 2; for the others the config.json of the repository of that name.
SHAPES = {
    "llama-7b": _LLAMA_7B,
    "llama-13b": _LLAMA_13B,
    "openlm-research/open_llama_7b": _LLAMA_7B,
    "openlm-research/open_llama_7b_v2": _LLAMA_7B,
    "openlm-research/open_llama_13b": _LLAMA_13B,
    "Qwen/Qwen2.5-7B-Instruct": Shape(28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True),
    "Qwen/Qwen2.5-0.5B-Instruct": Shape(24, 896, 4864, 14, 2, 64, 151936, tied=True, qkv_bias=True),
    "smollm2-135m": _SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2,
}


def shape_of(base: str) -> Shape:
    """The shape of a recipe's base: a name in `SHAPES`, or a local folder with a config.json.

    >>> shape_of("smollm2-135m").kv_heads
    3
    """
    if base in SHAPES:
        return SHAPES[base]
    path = Path(base) / "config.json"
    if not path.is_file():
        raise InputError(f"no shape known for base {base!r}; {choose(base, SHAPES)} (or name a model folder)")
    try:
        return Shape.from_config(json.loads(path.read_text(encoding="utf-8")))
    except (InputError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: {error}; name the folder of a LLaMA-shaped model") from None


def parameters(shape: Shape) -> dict[str, int]:
    """Weights by kind; their sum is the model's published size.

    >>> sum(parameters(SHAPES["llama-7b"]).values())
    6738415616
    """
    biases = shape.qkv_bias * (shape.query_width + 2 * shape.key_width)
    norms = 2 * shape.hidden + shape.qk_norm * 2 * shape.head_dim
    return {
        "embeddings": shape.vocab * shape.hidden,
        "matrices": shape.layers * sum(out * width for out, width in shape.matrices.values()),
        "norms and biases": shape.layers * (norms + biases) + shape.hidden,
        "head": 0 if shape.tied else shape.vocab * shape.hidden,
    }


def adapter_parameters(shape: Shape, adapter: Adapter) -> int:
    """LoRA's A (r, in) and B (out, r), over all blocks.

    >>> adapter_parameters(SHAPES["llama-7b"], Adapter(r=8, targets=["q_proj", "v_proj"]))    # Chinese-Vicuna's
    4194304
    """
    return shape.layers * adapter.r * sum(sum(shape.matrices[name]) for name in adapter.targets)


def weight_bytes(shape: Shape, bits: int, element: int = 2) -> tuple[int, int]:
    """Bytes of the blocks' matrices as bitsandbytes holds them, and of everything that is not quantised.

    * 16: `element` bytes a weight (4 where the computation is float32).
    * 8: one byte a weight, and a float32 absmax a row (Dettmers et al. 2022).
    * 4: half a byte a weight, one byte of absmax per 64 weights, a float32 per 256 of those (Dettmers et al. 2023),
      and each matrix's own tables: 16 and 256 float32 levels and an offset.

    >>> [round(weight_bytes(SHAPES["llama-7b"], bits)[0] / 1e9, 2) for bits in (16, 8, 4)]
    [12.95, 6.48, 3.34]
    """
    counts = parameters(shape)
    others = element * (sum(counts.values()) - counts["matrices"]) + 4 * shape.head_dim  # RoPE's frequencies, twice
    return shape.layers * sum(_held(out, columns, bits, element) for out, columns in shape.matrices.values()), others


def _held(out: int, columns: int, bits: int, element: int) -> int:
    """Bytes of one matrix with its scales."""
    n = out * columns
    if bits == 16:
        return element * n
    if bits == 8:
        return n + 4 * out
    if bits == 4:
        blocks = ceil(n / 64)
        return ceil(n / 2) + blocks + 4 * ceil(blocks / 256) + 4 * (16 + 256 + 1)
    raise ValueError(f"bits is {bits}; choose 16, 8 or 4")
