"""Loading: the right numbers and the right tokens, at 16, 8 and 4 bits, and one line for whatever does not fit."""

import errno
import json
import secrets
import shutil
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError, safe_open

from cvlib import InputError, assets, loading, recipes

TEXTS = [
    "请介绍一下北京。",
    "2024年10月1日，人口约2189万，占0.5%。",
    "Hello, world! It's 3.14159, isn't it?",
    "👍🏽 emoji 🧑\u200d🚀🎉",
    "def f(x):\n    return x ** 2  # 平方\n\n\nprint(f(10))\n",
    "  leading, trailing and   inner spaces \n\n",
    "café naïve Ünïcode ﬁ",
    "１２３ ½ ² ٣ Ⅷ",
    "tab\tand\r\nline ends",
    "“引号”——破折号……《书》",
    "日本語のテキスト 한국어 русский",
    "\u3000全角空格\u00a0nbsp",
    "<|im_end|> typed by a person, <|im_start|>user",
    "x = {'a': [1, 23, 456]}; y = 0x1F + 1e-10",
    "",
]


@pytest.fixture(scope="module")
def llama_cpp():
    """llama.cpp's own tokens of a text; only its HTTP server gives them out, on loopback and behind a random key."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(assets.fetch("smollm2-135m"))
    options.n_ctx, options.n_parallel, options.warmup, options.port = 256, 1, False, 0
    options.verbosity = -1
    key = secrets.token_hex(16)
    options.api_keys = [key]
    server = xllamacpp.Server(options)  # stops when the last reference to it goes
    address = f"{server.listening_address}/tokenize"

    def tokenize(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(address, body, headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)["tokens"]

    yield tokenize
    del server


# the running model


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_equal_llama_cpp(text, tokenizer, llama_cpp):
    assert tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids == llama_cpp(text)


def test_digits_are_split(tokenizer):
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert len(tokenizer("２０２４年3.14").input_ids) > len(tokenizer("年.").input_ids) + 3


def test_the_tokenizer_knows_its_end(tokenizer, model):
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer("").input_ids == []
    assert tokenizer.decode(tokenizer("it 's , fine .").input_ids) == "it 's , fine ."  # no tidying of spaces
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer) == 49_152


def test_weights_equal_ggufs_own_dequantisation(model):
    """llama.cpp stores queries and keys with their rotary halves interleaved; the other matrices as they are."""
    from gguf import GGUFReader, dequantize

    tensors = {t.name: t for t in GGUFReader(str(assets.fetch("smollm2-135m"))).tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.3.ffn_down.weight": "model.layers.3.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    }
    for theirs, mine in names.items():
        reference = torch.from_numpy(dequantize(tensors[theirs].data, tensors[theirs].tensor_type).copy())
        assert torch.equal(model.get_parameter(mine), reference), theirs


def test_the_converted_folder_is_plain_float32():
    folder = loading.Path(loading.resolve("smollm2-135m"))
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {str(weights.get_slice(name).get_dtype()) for name in weights.keys()} == {"F32"}  # noqa: SIM118
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".converting")] == []


def test_it_speaks_english(model, tokenizer, talk):
    from cvlib.generation import stream

    decoding = recipes.Decoding(temperature=0, max_new_tokens=12)
    assert "Paris" in "".join(stream(model, tokenizer, talk("What is the capital of France?"), "chatml", decoding))


# bits and number formats


def linears(model, kind):
    return [module for module in model.modules() if type(module).__name__ == kind]


def test_eight_bits(tiny):
    model, _ = loading.load(str(tiny), bits=8)
    assert len(linears(model, "Linear8bitLt")) == 2 * 7
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert model.get_input_embeddings().weight.dtype == model.lm_head.weight.dtype == model.dtype != torch.int8


def test_four_bits(tiny):
    model, _ = loading.load(str(tiny), bits=4)
    found = linears(model, "Linear4bit")
    assert len(found) == 2 * 7
    for linear in found:
        assert linear.weight.quant_type == "nf4"  # trap 10: the same for training and serving
        assert linear.weight.quant_state.nested
        assert linear.compute_dtype == model.dtype
        assert linear.support_avx512bf16_for_cpu is False  # trap 21


def test_fewer_bits_stay_close(tiny, rows_file):
    """An untrained model, so only the weights' rounding is seen: 8 bits closer than 4, both close to 16."""
    ids = torch.arange(40).reshape(1, -1)
    with torch.no_grad():
        exact, eight, four = (loading.load(str(tiny), bits, "float32")[0](input_ids=ids).logits for bits in (16, 8, 4))
    errors = [((found - exact).norm() / exact.norm()).item() for found in (eight, four)]
    assert 0 < errors[0] < errors[1] < 0.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_number_format_is_the_one_asked_for(dtype, tiny):
    model, _ = loading.load(str(tiny), dtype=dtype)
    assert {str(weight.dtype) for weight in model.parameters()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("bits", [0, 5, 32])
def test_other_bits_are_refused(bits, tiny):
    with pytest.raises(InputError, match=f"bits is {bits}; choose 16, 8 or 4"):
        loading.load(str(tiny), bits)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")]
)
def test_the_card_decides_the_format(capability, dtype, monkeypatch):
    """Turing (7.5) has no bfloat16, whatever `is_bf16_supported` says of emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert loading.device_and_dtype() == ("cuda", dtype)


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_processor_decides_the_format(native, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert loading.device_and_dtype() == ("cpu", dtype)


# bases


def refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bases_that_are_none(tmp_path):
    refused(lambda: loading.load("smollm"), "base 'smollm' is not an asset", "org/name; did you mean 'smollm2-135m'?")
    refused(lambda: loading.load("/no/such/folder"), "'/no/such/folder' is not an asset")
    refused(lambda: loading.load(str(tmp_path)), f"{tmp_path}: no config.json in this folder; name a model folder")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(
        lambda: loading.load(str(tmp_path)), f"{tmp_path}: an adapter and no model; give it as --adapter {tmp_path}"
    )


def test_a_hub_that_does_not_answer(monkeypatch):
    from transformers import AutoModelForCausalLM

    def silent(*_, **__):
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", silent)
    refused(lambda: loading.load("someone/model"), "someone/model: could not be loaded (We couldn't connect", "network")


@pytest.mark.parametrize("damage", ["no weights", "broken weights", "no tokenizer", "unknown architecture"])
def test_a_broken_model_folder(damage, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    if damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "broken weights":
        (folder / "model.safetensors").write_bytes(b"junk")
    elif damage == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    else:
        (folder / "config.json").write_text('{"model_type": "nonsense"}')
    refused(lambda: loading.load(str(folder)), f"{folder}: could not be loaded (")


# conversion


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_conversion_that_fails_leaves_nothing(error, monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    class Half:
        config = SimpleNamespace(quantization_config={})

        def save_pretrained(self, folder):
            (folder / "half.safetensors").write_text("half")
            raise error

    monkeypatch.setenv("CVLIB_HOME", str(tmp_path))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: Half())
    refused(lambda: loading.convert("toy", tmp_path / "toy.gguf"), "models/toy", "No space left", "CVLIB_HOME")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list((tmp_path / "models").iterdir()) == []


# adapters


@pytest.fixture
def adapter(tiny, tmp_path):
    """A saved adapter of the tiny base whose B is not zero."""
    from cvlib.training import add_adapter

    torch.manual_seed(0)
    model = add_adapter(loading.load(str(tiny), dtype="float32")[0], recipes.Adapter(r=2), str(tiny))
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def settings(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_changes_the_model_and_is_frozen(adapter, tiny):
    ids = torch.arange(20).reshape(1, -1)
    plain, _ = loading.load(str(tiny), dtype="float32")
    adapted, _ = loading.load(str(tiny), dtype="float32", adapter=adapter)
    with torch.no_grad():
        assert not torch.allclose(plain(input_ids=ids).logits, adapted(input_ids=ids).logits)
    assert not any(weight.requires_grad for name, weight in adapted.named_parameters() if "lora" in name)
    again = loading.attach(loading.load(str(tiny), dtype="float32")[0], adapter, str(tiny), trainable=True)
    assert any(weight.requires_grad for name, weight in again.named_parameters() if "lora" in name)


def test_an_adapter_of_another_base_is_refused_before_anything_is_loaded(adapter, monkeypatch):
    def fetched(_):
        raise AssertionError("the base was fetched for nothing")

    monkeypatch.setattr(loading, "resolve", fetched)
    settings(adapter, base_model_name_or_path="someone/else")
    refused(
        lambda: loading.load("smollm2-135m", adapter=adapter),
        f"{adapter}: this adapter was trained on 'someone/else', not on 'smollm2-135m'",
        "load it over 'someone/else'",
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no settings", "no adapter_config.json here; name the folder that `cvlib train` wrote"),
        ("broken settings", "adapter_config.json: not valid JSON"),
        ("no weights", "no adapter_model.safetensors here"),
        ("a pickle", "no adapter_model.safetensors here"),
        ("broken weights", "adapter_model.safetensors is cut short or damaged"),
        ("another rank", "size mismatch"),
        ("more matrices", "Found missing adapter keys"),
    ],
)
def test_a_broken_adapter(damage, words, adapter, tiny):
    weights = adapter / "adapter_model.safetensors"
    if damage == "no settings":
        (adapter / "adapter_config.json").unlink()
    elif damage == "broken settings":
        (adapter / "adapter_config.json").write_text("{")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "a pickle":
        weights.rename(adapter / "adapter_model.bin")
    elif damage == "broken weights":
        weights.write_bytes(b"junk")
    elif damage == "another rank":
        settings(adapter, r=3)
    else:  # trap 15: seven matrices in the settings, two in the file
        settings(adapter, target_modules=list(recipes.PROJECTIONS))
    refused(lambda: loading.load(str(tiny), adapter=adapter), str(adapter), words)
