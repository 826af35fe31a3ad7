"""Recipe in, model and tokenizer out: 16, 8 or 4 bits by one argument.

Three things happen here and nowhere else:

* **Which number format.** bfloat16 where the hardware multiplies it (capability 8.0 and up; CPUs with AVX512-BF16),
  float16 on older cards such as the Turing T4 and RTX 2080Ti, float32 on other CPUs. We ask for the *capability*:
  `torch.cuda.is_bf16_supported()` also says yes where bfloat16 is only emulated.
* **GGUF to safetensors, once.** The running model travels as a GGUF file. transformers can read it, but drops the
  digit splitting of SmolLM2's tokenizer and leaves a quantisation config behind that no longer applies.
  We mend both and keep the result in the cache, in float32, so that every later rounding starts from the same values.
* **Evaluate, then train, and nothing trains (trap 21).** On CPUs with AVX512-BF16 the first 4-bit forward without
  autograd repacks the weights for a kernel that has no gradient. We switch that off before anybody can run a forward.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from cvlib import InputError, assets, choose
from cvlib.pieces import NORMAL, Model, fields


def device_and_dtype() -> tuple[str, str]:
    """The device to compute on and the 16-bit format its hardware multiplies, as names: `("cuda", "float16")`."""
    import torch

    if torch.cuda.is_available():
        return "cuda", "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    if torch.backends.mps.is_available():
        return "mps", "float16"
    return "cpu", "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def load(base: str, bits: int = 16, dtype: str = "auto", adapter: str | Path | None = None, device: str = "auto"):
    """A causal language model and its tokenizer, ready for inference; `training` makes it trainable.

    Args:
        base: an asset name, a hub id or a local folder.
        bits: 16 keeps the weights in `dtype`; 8 is LLM.int8() (Dettmers et al. 2022); 4 is NF4 with double
            quantisation (Dettmers et al. 2023). Embeddings, norms and the head stay in `dtype`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; `"auto"` is what the hardware multiplies.
        adapter: a folder written by `training` to lay over the base.
        device: where to put it; `"auto"` is the card if there is one.

    Raises:
        InputError: an unknown base, an impossible number of bits, or an adapter of another base.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from cvlib import attention

    here, native = device_and_dtype()
    compute = getattr(torch, native if dtype == "auto" else dtype)
    place = {"": here if device == "auto" else device}
    options = {"dtype": compute, "device_map": place, "quantization_config": quantization(bits, compute)}
    options["attn_implementation"] = attention.NAME
    if adapter:
        belongs(adapter, base)
    if base in assets.ASSETS and base not in assets.MODELS:
        raise InputError(f"{base}: {assets.find(base).what}, and no model; {choose(base, assets.MODELS)}")
    folder = resolve(base)
    try:
        model = quiet(AutoModelForCausalLM.from_pretrained, folder, **options)
        tokenizer = read_tokenizer(folder if not adapter or not has_tokenizer(adapter) else str(adapter))
    except (OSError, ValueError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{base}: could not be loaded ({reason}); name a model with its tokenizer, and check the network"
        ) from None
    keep_trainable(model)
    if adapter:
        fits(tokenizer, model, adapter)
    return (attach(model, adapter, base) if adapter else model), tokenizer


def fits(tokenizer, model, adapter: str | Path) -> None:
    """Refuse a tokenizer that is not the one an adapter was trained with, as far as its number of pieces shows it."""
    from cvlib import embeddings

    brought, rows = embeddings.rows_of(adapter), model.get_input_embeddings().weight.shape[0]
    pieces, most = len(tokenizer), max(brought, rows)
    if not brought <= pieces <= most:
        raise InputError(
            f"{adapter}: trained with a tokenizer of {brought or most:,} pieces, but the one here has {pieces:,}; "
            "put back the tokenizer files it was saved with"
        )


def quantization(bits: int, compute):
    """The one quantisation config of the book, the same for training and serving (trap 10); None for 16 bits."""
    from transformers import BitsAndBytesConfig

    if bits == 16:
        return None
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            # spread over several cards, all weights must look alike: four codes then sit in one 16-bit number
            **({"bnb_4bit_quant_storage": compute} if os.environ.get("ACCELERATE_USE_FSDP") == "true" else {}),
        )
    raise InputError(f"bits is {bits}; choose 16, 8 or 4")


def keep_trainable(model) -> None:
    """Forbid the 4-bit CPU repacking that has no gradient (trap 21). Call before the first forward."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def attach(model, adapter: str | Path, base: str, trainable: bool = False):
    """Lay an adapter folder over a base model, after checking that the two belong together.

    An adapter that brings rows for new pieces finds room for them: the model is grown to the size it was trained at.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from cvlib import embeddings

    belongs(adapter, base)
    rows = embeddings.rows_of(adapter)
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)  # the adapter fills them
    try:
        with warnings.catch_warnings():  # peft only warns when it finds nothing for a matrix (trap 15)
            warnings.filterwarnings("error", "Found missing adapter keys")
            return quiet(PeftModel.from_pretrained, model, str(adapter), is_trainable=trainable)
    except SafetensorError:
        raise InputError(f"{adapter}: adapter_model.safetensors is cut short or damaged; train it again") from None
    except (RuntimeError, IndexError, ValueError, UserWarning) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"{adapter}: its weights do not fit {base!r} ({reason}); train it again") from None


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer of its own, as adapters with new rows do."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def belongs(adapter: str | Path, base: str) -> None:
    """Refuse an adapter that has no weights or was trained on another base; costs nothing, so ask before loading."""
    made_for = read_adapter(adapter).get("base_model_name_or_path")
    if made_for != base:
        raise InputError(
            f"{adapter}: this adapter was trained on {made_for!r}, not on {base!r}; load it over {made_for!r}"
        )
    if not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise InputError(f"{adapter}: no adapter_model.safetensors here; name the folder that `cvlib train` wrote")


def read_adapter(folder: str | Path) -> dict:
    """The settings in an adapter folder's `adapter_config.json`."""
    path = Path(folder) / "adapter_config.json"
    if not path.parent.is_dir():
        raise InputError(f"{folder}: no such folder; name the one that `cvlib train` wrote")
    if not path.is_file():
        raise InputError(f"{folder}: no adapter_config.json here; name the folder that `cvlib train` wrote")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); train the adapter again or mend this file") from None


def resolve(base: str) -> str:
    """Where transformers finds `base`: a converted asset, a local folder, or the hub id itself."""
    if base in assets.ASSETS:
        path = assets.fetch(base)
        return str(convert(base, path) if path.suffix == ".gguf" else path)
    if Path(base).is_file():
        raise InputError(f"{base}: a file; name a model's folder (a GGUF file is for `cvlib chat` and `cvlib serve`)")
    if Path(base).is_dir():
        if not (Path(base) / "config.json").is_file():
            if (Path(base) / "adapter_config.json").is_file():
                raise InputError(f"{base}: an adapter and no model; give it as --adapter {base}")
            raise InputError(f"{base}: no config.json in this folder; name a model folder")
        return base
    if base.count("/") == 1 and not base.startswith(("/", ".")):
        return base
    raise InputError(
        f"base {base!r} is not an asset, a folder or a hub id like org/name; {choose(base, assets.MODELS)}"
    )


def read_tokenizer(folder: str):
    """The tokenizer of a model folder or hub id, also where a SentencePiece `tokenizer.model` is all there is."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(folder)
    if not (path / "tokenizer.model").is_file() or (path / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if (path / "tokenizer_config.json").is_file():
        found = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings |= {key: value.get("content") if isinstance(value, dict) else value for key, value in found.items()}
    if (path / "chat_template.jinja").is_file():
        settings["chat_template"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
    rules = from_sentencepiece(path / "tokenizer.model", settings["bos_token"] * settings.get("add_bos_token", True))
    wanted = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "model_max_length")
    chosen = {name: settings[name] for name in wanted if settings.get(name)}
    return PreTrainedTokenizerFast(tokenizer_object=rules, **chosen)


def from_sentencepiece(path: Path, begin: str = ""):
    """A SentencePiece BPE `.model` in the words of the tokenizers library, every text begun with the token `begin`.

    SentencePiece ranks pieces, tokenizers ranks pairs: so we list every pair that spells a piece, the best piece
    first. (transformers can do this too, with one more library; but it would cut a text that begins with a space
    otherwise than SentencePiece and llama.cpp do.)
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    model = Model.read_base(path)
    vocab = {piece.text: number for number, piece in enumerate(model.pieces)}
    merges = []
    for piece in sorted((piece for piece in model.pieces if piece.kind == NORMAL), key=lambda piece: -piece.score):
        pairs = ((piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text)))
        merges += [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    settings = next((value for number, value, _ in fields(model.proto) if number == 3), b"")
    invents_space = {number: value for number, value, _ in fields(settings)}.get(3, 1)
    rules = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = [normalizers.Prepend("▁")] if invents_space else []
    rules.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if invents_space else []
    rules.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if begin:
        rules.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, vocab[begin])]
        )
    return rules


def convert(name: str, gguf: Path) -> Path:
    """Turn a GGUF model into a folder of float32 safetensors with a mended tokenizer; the work is done once."""
    target = assets.home() / "models" / name
    if target.is_dir():
        return target
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = quiet(AutoModelForCausalLM.from_pretrained, **source, dtype=torch.float32)
        del model.config.quantization_config  # the weights are plain now;
        model.hf_quantizer = None  # transformers would refuse to save them otherwise
        model.save_pretrained(part)
        mend_tokenizer(**source).save_pretrained(part)
        if not target.is_dir():  # another process may have been quicker
            os.replace(part, target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target}: could not be written ({error}); make room or set CVLIB_HOME") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def mend_tokenizer(**source):
    """SmolLM2's tokenizer with its digit splitting back: 2024 is four tokens, as the model was trained."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def quiet(call, *args, **options):
    """Run a loader without its own progress bars and the deprecations libraries report of each other."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return call(*args, **options)
    finally:
        if shown:
            bars.enable_progress_bar()
