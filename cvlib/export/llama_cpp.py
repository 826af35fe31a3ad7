"""A LLaMA folder in, one GGUF file out: settings, vocabulary (see `words`) and tensors, as llama.cpp reads them.

Two things differ from transformers:

* **Rotary halves.** To encode a position, transformers turns number i of a head together with number i + half,
  llama.cpp number 2i with number 2i + 1. So the rows of q and k change places (`interleave`); scores do not change.
* **Format.** f16 takes two bytes a number. q8_0 and q4_0 pack 32 neighbouring numbers of a row as whole numbers with
  one scale, 8.5 and 4.5 bits each. Vectors stay float32, and embeddings and head never take less than q8_0: their
  errors reach the answer undiluted.

`fill` goes back: the numbers of a GGUF file in a transformers model, so that the price of a format is measured in
bits per byte by the code that measures everything else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import gguf as library
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from cvlib import InputError, loading
from cvlib.export.merging import require_space, skeleton
from cvlib.export.words import describe_vocabulary
from cvlib.pieces import written
from cvlib.server import is_gguf

#: By name: the kind of matrices, the kind of embeddings and head, and the number by which the file says so.
FORMATS = {
    "f16": (Kind.F16, Kind.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (Kind.Q8_0, Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Kind.Q4_0, Kind.Q8_0, LlamaFileType.MOSTLY_Q4_0),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor on its way into the file: its name there, its shape, its kind, and how to read it in float32."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    read: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        """Size when packed, in whole blocks.

        >>> Tensor("blk.0.attn_q.weight", (576, 576), Kind.Q8_0, None).bytes / 576**2 * 8      # bits a number
        8.5
        """
        block, size = library.GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block * size

    def pack(self):
        """The numbers in their kind, a numpy array."""
        exact = self.read()
        if exact.shape != self.shape:
            raise InputError(f"{self.name}: {tuple(exact.shape)} in the file, {self.shape} by config.json; mend either")
        if not (exact.half() if self.kind == Kind.F16 else exact).isfinite().all():
            raise InputError(
                f"{self.name}: not finite as {self.kind.name.lower()}; train again or choose another quant"
            )
        return library.quantize(exact.numpy(), self.kind)


def gguf(folder: str | Path, out: str | Path, quant: str = "f16", force: bool = False) -> int:
    """Write a model folder of the LLaMA architecture as one GGUF file; returns its bytes.

    Args:
        folder: config, safetensors and tokenizer, as `merge` writes them; the name of an asset will do.
        quant: "f16", "q8_0" or "q4_0".
        force: replace `out` if it exists.

    Raises:
        InputError: another architecture, a tokenizer that llama.cpp has no name for, tensors that are missing, not
            finite or of a width that no block divides, no room, or `out` exists. Then nothing is written.
    """
    out, where = Path(out), Path(loading.resolve(str(folder)))
    if quant not in FORMATS:
        raise InputError(f"quant {quant!r} is unknown; choose one of {', '.join(FORMATS)}")
    refuse_file(out, force)
    if not where.is_dir():
        raise InputError(f"{folder}: not a folder here; write one with `cvlib export {folder} --to hf` first")
    tensors, config = plan(where, quant)
    writer = library.GGUFWriter(None, "llama")
    describe_model(writer, config, where, quant)
    describe_vocabulary(writer, loading.read_tokenizer(str(where)), config.vocab_size, where)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, "float32", tensor.bytes, raw_dtype=tensor.kind)
    size = sum(tensor.bytes for tensor in tensors)
    require_space(out, size)
    scaled = {"unit_scale": True, "leave": False}
    with written(out) as part, closing(writer), tqdm(total=size, desc=out.name, unit="B", **scaled) as bar:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.pack())
            bar.update(tensor.bytes)
    return out.stat().st_size


def refuse_file(out: Path, force: bool) -> None:
    """Refuse to write where something is, unless it is a GGUF file and `force` says that it may go."""
    if out.exists() and not force:
        raise InputError(f"{out}: exists already; name another file, or --force to replace it")
    if out.exists() and not is_gguf(out):
        raise InputError(f"{out}: no GGUF file, so force does not replace it; name another file")


def plan(folder: Path, quant: str):
    """Every tensor of the file in order, and the model's config. A tied head is the embedding once more: left out."""
    model = skeleton(folder, str(folder))
    config = model.config
    if config.model_type != "llama":
        raise InputError(f"{folder}: a {config.model_type} model; only the LLaMA architecture is written here")
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    files, tensors = stored(folder), rotary_factors(config, folder)
    for source, like in model.state_dict().items():
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if source not in files:
            raise InputError(f"{folder}: {source} is missing from its safetensors; copy or merge the model again")
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        kind = kind_of(source, like, quant)
        if like.shape[-1] % (block := library.GGML_QUANT_SIZES[kind][0]):
            raise InputError(f"{folder}: {source} is {like.shape[-1]} wide, no multiple of {block}; choose f16")
        tensors.append(
            Tensor(name, tuple(like.shape), kind, partial(read, files[source], source, heads(source, config)))
        )
    return tensors, config


def kind_of(source: str, like: torch.Tensor, quant: str) -> Kind:
    """How a tensor is written: vectors in float32, embeddings and head with their own number of bits."""
    matrix, table, _ = FORMATS[quant]
    if like.ndim == 1:
        return Kind.F32
    return table if source.split(".")[-2] in ("embed_tokens", "lm_head") else matrix


def room(base: str, quant: str) -> int:
    """Bytes of a base's numbers in a GGUF file, before anything is loaded."""
    weights = skeleton(loading.resolve(base), base).named_parameters()  # a tied head is there once
    return sum(Tensor(name, tuple(like.shape), kind_of(name, like, quant), None).bytes for name, like in weights)


def stored(folder: Path) -> dict[str, Path]:
    """In which safetensors file each tensor of a model folder lies."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file():
            return {name: folder / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}
        with safe_open(single, "pt") as weights:
            return dict.fromkeys(weights.keys(), single)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder}: no safetensors to read ({error}); copy or merge the model again") from None


def heads(source: str, config) -> int:
    """How many heads' rotary halves lie in this tensor: those of queries or of keys, else 0."""
    kinds = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return kinds.get(source.split(".")[-2], 0)


def read(file: Path, source: str, heads: int) -> torch.Tensor:
    """A tensor in float32, in llama.cpp's order."""
    try:
        with safe_open(file, "pt") as weights:
            exact = weights.get_tensor(source).float()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: {source} cannot be read ({error}); copy or merge the model again") from None
    return interleave(exact, heads) if heads else exact


def interleave(W: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k, (heads · 2 · half, …): rows i and i + half of each head become neighbours.

    >>> interleave(torch.arange(8), heads=2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return W.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(W.shape)


def separate(W: torch.Tensor, heads: int) -> torch.Tensor:
    """The way back.

    >>> separate(interleave(torch.arange(8), heads=2), heads=2).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return W.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(W.shape)


def rotary_factors(config, folder: Path) -> list[Tensor]:
    """What divides each rotary frequency of a context stretched by "linear" or "llama3" rules; else nothing."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rule = config.rope_parameters["rope_type"]
    if rule == "default":
        return []
    if rule not in ("linear", "llama3"):
        raise InputError(f"{folder}: rotary scaling {rule!r} is not written here; take llama.cpp's own converter")
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    factors = plain / LlamaRotaryEmbedding(config).inv_freq
    return [Tensor("rope_freqs.weight", tuple(factors.shape), Kind.F32, lambda: factors)]


def describe_model(writer, config, folder: Path, quant: str) -> None:
    """Shapes and constants; and how to draw, if the folder says so."""
    writer.add_type("model")
    writer.add_name(folder.name)
    writer.add_file_type(FORMATS[quant][2])
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    path = folder / "generation_config.json"
    draw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if draw.get("do_sample"):
        writer.add_sampling_temp(draw.get("temperature", 1.0))
        writer.add_sampling_top_k(draw.get("top_k", 50))
        writer.add_sampling_top_p(draw.get("top_p", 1.0))


@torch.no_grad()
def fill(model, path: str | Path) -> None:
    """Put the numbers of a GGUF file, unpacked, into a transformers model of the same shape, in place."""
    packed = {tensor.name: tensor for tensor in library.GGUFReader(path).tensors}
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for source, weight in model.named_parameters():
        tensor = packed[names.get_name(source, try_suffixes=(".weight", ".bias"))]
        numbers = torch.tensor(library.dequantize(tensor.data, tensor.tensor_type))
        count = heads(source, model.config)
        weight.copy_(separate(numbers, count) if count else numbers)
