"""Export: what was merged answers as the adapter did, what was written for llama.cpp answers as transformers does."""

import importlib
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import urllib.request
from itertools import takewhile
from types import SimpleNamespace

import pytest
import torch
import yaml
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_loading import TEXTS, refused
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cvlib import (
    ROOT,
    adapters,
    assets,
    embeddings,
    evaluation,
    export,
    extension,
    loading,
    messages,
    recipes,
    vocabulary,
)
from cvlib.batching import prompt_ids
from cvlib.export import llama_cpp, merging, words
from cvlib.generation import tokens
from cvlib.recipes import Decoding
from cvlib.templates import TEMPLATES, prompt

#: <|endoftext|> and <|im_end|>: llama.cpp ends an answer at either, whatever the folder says.
ENDS = (0, 2)
IDS = torch.arange(40).reshape(1, -1)


@torch.no_grad()
def answers(model):
    return model.eval()(input_ids=IDS).logits


def reading(folder):
    return answers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """Writes an adapter of the tiny base with random numbers everywhere; returns its folder and its logits."""

    def write(name, seed=0, base=tiny, **options):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(name) / "adapter"
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        targets = options.pop("target_modules", list(recipes.PROJECTIONS))
        rows = options.pop("rows", None)
        if rows:
            options["trainable_token_indices"] = embeddings.trainable(model, rows)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
        model = loading.quiet(get_peft_model, model, config)
        for weight_name, weight in model.named_parameters():
            if weight.requires_grad and "magnitude" not in weight_name:
                torch.nn.init.normal_(weight, std=0.1)
        model.peft_config["default"].base_model_name_or_path = str(base)
        loading.quiet(model.save_pretrained, folder, save_embedding_layers=False)
        return folder, answers(model)

    return write


@pytest.fixture(scope="module")
def untied(tiny, tmp_path_factory):
    """The tiny model with a head of its own, biases, and a context stretched as LLaMA 3.1's."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(tiny, folder)
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    state["model"]["vocab"]["Ġt"], state["model"]["merges"] = 259, [["Ġ", "t"]]  # llama.cpp wants at least one
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    changes = {
        "vocab_size": 260,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "initializer_range": 0.3,
    }
    rope = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny, rope_parameters=rope, **changes))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    loading.quiet(model.save_pretrained, folder)
    return folder


# ------------------------------------------------------------------------------------------------------------- merge
KINDS = {
    "all-seven": {},
    "rslora": {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"use_dora": True},
    "new-rows": {"rows": [100, 200, 258], "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_answers_as_the_adapter_did(kind, adapter, tiny, tmp_path):
    folder, wanted = adapter(kind, **dict(KINDS[kind]))
    found = export.merge(str(tiny), [folder], tmp_path / "out", dtype="float32")
    assert torch.allclose(reading(tmp_path / "out"), wanted, atol=1e-4)
    assert not torch.allclose(reading(tiny), wanted, atol=1e-2)
    assert (found.change < 1e-4, found.same, found.bits) == (True, 1.0, 16)
    assert found.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


def test_new_rows_of_an_untied_model(adapter, untied, tmp_path):
    folder, wanted = adapter("untied-rows", base=untied, rows=[7, 258])
    export.merge(str(untied), [folder], tmp_path / "out", dtype="float32")
    assert torch.allclose(reading(tmp_path / "out"), wanted, atol=1e-3)


def test_two_adapters_add_up_to_the_sum_of_their_products(adapter, tiny, tmp_path):
    """By hand, W + s·B₁A₁ + s·B₂A₂ with s = 8 / 4; and every one of the seven matrices has moved (trap 15)."""
    one, two = adapter("one", 1)[0], adapter("two", 2, target_modules=["q_proj"])[0]
    export.merge(str(tiny), [one, two], tmp_path / "out", dtype="float32")
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny, tmp_path / "out"))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    for name, weight in base.items():
        wanted = weight.clone()
        for learnt in (first, second):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in learnt:
                wanted += 2 * learnt[f"{stem}.lora_B.weight"] @ learnt[f"{stem}.lora_A.weight"]
        assert torch.allclose(merged[name], wanted, atol=1e-5), name
        assert torch.equal(weight, wanted) != any(matrix in name for matrix in recipes.PROJECTIONS)


def test_the_sum_is_rounded_once_and_split_into_shards(adapter, tiny, tmp_path, monkeypatch):
    folder = adapter("rounded", 3)[0]
    monkeypatch.setattr(merging, "SHARD", "50KB")
    found = export.merge(str(tiny), [folder], tmp_path / "half", dtype="bfloat16")
    export.merge(str(tiny), [folder], tmp_path / "whole", dtype="float32")
    files = {kind: sorted((tmp_path / kind).glob("*.safetensors")) for kind in ("half", "whole")}
    half, whole = ({k: v for file in found for k, v in load_file(file).items()} for found in files.values())
    assert len(files["half"]) > 1
    assert half.keys() == whole.keys()
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)
    assert 0 < found.change < 1
    assert "merged in float32" in str(found)
    assert "stored as bfloat16" in str(found)
    assert export.gguf(tmp_path / "half", tmp_path / "half.gguf") == (tmp_path / "half.gguf").stat().st_size


def test_template_and_decoding_of_the_recipe_travel_with_the_model(adapter, tiny, tmp_path, talk):
    folder = adapter("recipe", 4, target_modules=["q_proj"])[0]
    recipe = recipes.Recipe(template="alpaca", bits=4, decoding=Decoding(temperature=0.3, top_k=7, max_new_tokens=99))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.as_dict()), encoding="utf-8")
    found = export.merge(str(tiny), [folder], tmp_path / "out")
    assert found.bits == 4
    assert "although trained over 4-bit ones" in str(found)
    model, tokenizer = loading.load(str(tmp_path / "out"))
    chosen = model.generation_config
    assert (chosen.do_sample, chosen.temperature, chosen.top_k, chosen.max_new_tokens) == (True, 0.3, 7, 99)
    assert chosen.eos_token_id == tokenizer.eos_token_id
    assert chosen.repetition_penalty in (None, 1.0)  # trap 18
    assert "### Instruction:" in tokenizer.chat_template
    fields = GGUFReader(written(tmp_path / "out", tmp_path)).fields
    assert fields["general.sampling.top_k"].contents() == 7
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_jinja_template_gives_the_renderers_tokens(name, talk, tokenizer):
    for conversation in (talk("你好"), talk("a\n\n", '"b"\\n', "  c"), talk("甲", system="{{ 乙 }}")):
        rows = [{"role": turn.role, "content": turn.content} for turn in conversation]
        jinja = merging.chat_template(name, tokenizer.eos_token)
        text = tokenizer.apply_chat_template(rows, chat_template=jinja, tokenize=False, add_generation_prompt=True)
        assert text == "".join(segment.text for segment in prompt(conversation, name, tokenizer.eos_token))


def test_what_cannot_be_merged(adapter, tiny, tmp_path, monkeypatch):
    folder = adapter("refused", 5, target_modules=["q_proj"])[0]
    out, base = tmp_path / "out", str(tiny)
    refused(lambda: export.merge("smollm2-135m", [folder], out), f"trained on {base!r}, not on 'smollm2-135m'")
    refused(lambda: export.merge(base, [folder], out, dtype="int8"), "dtype 'int8' is unknown; choose one of bfloat16")
    refused(lambda: export.merge(base, [folder], tiny), f"{tiny}: exists already", "force")
    (tmp_path / "letters").mkdir()
    refused(lambda: export.merge(base, [], tmp_path / "letters", force=True), "holds no model, so force does not")
    quantised = shutil.copytree(tiny, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (quantised / "config.json").write_text(json.dumps(config))
    refused(lambda: export.merge(str(quantised), [], out), "stored as gptq codes; name the 16-bit model")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(loading, "load", None)  # asked before anything is loaded
    count = sum(weight.numel() for weight in load_file(tiny / "model.safetensors").values())
    refused(lambda: export.merge(base, [folder], out), f"{2 * count:,} bytes needed on the way, 1,000 free")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letters", "quantised"]


def test_float16_ends_at_65504(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 70_000
    loading.quiet(model.save_pretrained, tmp_path / "wide")
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "wide")
    wide, out = str(tmp_path / "wide"), tmp_path / "out"
    refused(
        lambda: export.merge(wide, [], out, dtype="float16"), "layers.1.mlp.up_proj.weight is not finite as float16"
    )
    refused(lambda: export.gguf(wide, tmp_path / "x.gguf"), "blk.1.ffn_up.weight: not finite as f16")
    assert export.merge(wide, [], out).folder == out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "wide"]


def test_an_export_that_is_stopped_leaves_nothing(tiny, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", stop)
    monkeypatch.setattr(llama_cpp.library, "quantize", stop)
    for call in (lambda: export.merge(str(tiny), [], tmp_path / "out"), lambda: written(tiny, tmp_path)):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert list(tmp_path.iterdir()) == []


def test_a_killed_merge_leaves_no_model_and_the_next_one_cleans_up(tiny, tmp_path):
    code = "import os, sys, pathlib\nfrom cvlib.export.merging import complete\n"
    code += "with complete(pathlib.Path(sys.argv[1]), False, 0) as part:\n"
    code += "    (part / 'config.json').write_text('{}')\n    os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")]).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == [".out.part"]
    export.merge(str(tiny), [], tmp_path / "out")
    before = os.stat(tmp_path / "out" / "model.safetensors").st_mtime_ns
    export.merge(str(tiny), [], tmp_path / "out", force=True)
    assert os.stat(tmp_path / "out" / "model.safetensors").st_mtime_ns > before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -------------------------------------------------------------------------------------------------------------- GGUF
def written(folder, tmp_path, quant="f16"):
    export.gguf(folder, tmp_path / f"{quant}.gguf", quant)
    return tmp_path / f"{quant}.gguf"


def llama_cpp_server(path):
    """llama.cpp on loopback behind a random key, keeping keys and values in float32 as transformers does."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup, options.port = str(path), 256, 1, False, 0
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.cpuparams.n_threads, options.verbosity = 1, -1
    key = secrets.token_hex(16)
    options.api_keys = [key]
    server = xllamacpp.Server(options)  # stops when the last reference to it goes

    def ask(route, **body):
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{server.listening_address}/{route}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["tokens"]

    return ask


def same_words(ask, tokenizer, texts=TEXTS):
    for text in texts:
        wanted = tokenizer(text, split_special_tokens=True).input_ids
        assert ask("tokenize", content=text, add_special=True, parse_special=False) == wanted, text


def greedy(ask, model, prompts, count):
    """Both continuations of each prompt, up to the end token."""
    decoding = Decoding(temperature=0, repetition_penalty=1, max_new_tokens=count)
    ours = zip(*tokens(model, prompts, decoding), strict=True)
    for start, row in zip(prompts, ours, strict=True):
        theirs = ask("completion", prompt=start, n_predict=count, temperature=0, return_tokens=True, cache_prompt=False)
        yield tuple(list(takewhile(lambda token: token not in ENDS, row)) for row in (row, theirs))


def test_rows_of_q_and_k_change_places_by_hand():
    W = torch.tensor([[0.0], [1], [2], [3], [10], [11], [12], [13]])  # two heads of four rows: halves 0 1 | 2 3
    assert llama_cpp.interleave(W, 2).flatten().tolist() == [0, 2, 1, 3, 10, 12, 11, 13]


@pytest.mark.parametrize("which", ["tiny", "untied"])
def test_f16_holds_what_transformers_holds_in_float16(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    path = written(folder, tmp_path)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for weight in found.parameters():
        weight.data.zero_()
    export.fill(found, path)
    for name, weight in half.named_parameters():
        matrix = weight.ndim > 1
        assert not matrix or torch.equal(found.get_parameter(name), weight.float()), name
    tensors = {tensor.name for tensor in GGUFReader(path).tensors}
    assert ("output.weight" in tensors, "rope_freqs.weight" in tensors) == (which == "untied",) * 2


def test_llama_cpp_runs_an_untied_model_with_biases_and_a_stretched_context(untied, tmp_path):
    """100 tokens of prompt, so that the rotary factors matter."""
    model, tokenizer = loading.load(str(untied), dtype="float32")
    ask = llama_cpp_server(written(untied, tmp_path))
    same_words(ask, tokenizer)
    prompts = [[(7 * n + shift) % 250 + 3 for n in range(100)] for shift in range(3)]
    for ours, theirs in greedy(ask, model, prompts, 12):
        assert ours == theirs
        assert len(ours) > 3


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
def test_blocks_of_32_share_a_scale(quant, tiny, tmp_path):
    """By hand, against the largest of a block: half a step of 1/127, or one of 1/8 at the far end of q4_0's −8 … 7; and
    what the scale, a float16, itself rounds: 2⁻¹¹ of any number."""
    path = written(tiny, tmp_path, quant)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == quant.upper()
    assert (kinds["token_embd.weight"], kinds["blk.0.attn_norm.weight"]) == ("Q8_0", "F32")
    exact, found = (AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32) for _ in range(2))
    export.fill(found, path)
    W, Q = (model.get_parameter("model.layers.1.mlp.down_proj.weight").detach() for model in (exact, found))
    most = W.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
    error = (W - Q).unflatten(-1, (-1, 32)).abs() / most
    assert 0 < error.max() < {"q8_0": 0.5 / 127, "q4_0": 1 / 8}[quant] + 2**-11
    bits = sum(tensor.n_bytes for tensor in GGUFReader(path).tensors if tensor.name == "blk.0.ffn_up.weight") * 8
    assert bits / (128 * 64) == {"q8_0": 8.5, "q4_0": 4.5}[quant]


# vocabularies


def wearing(tokenizer_files, folder):
    """A tiny random model that has a row for each piece of a tokenizer."""
    folder.mkdir(exist_ok=True)
    for file in tokenizer_files:
        shutil.copy(file, folder / ("tokenizer.model" if ".model" in file.name else file.name))
    size = len(loading.read_tokenizer(str(folder)))
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=-(-size // 64) * 64, tie_word_embeddings=True, **shape)
    loading.quiet(LlamaForCausalLM(config).save_pretrained, folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "pairs.txt"
    rows = json.loads(assets.fetch("hsk-sentences").read_bytes())[:1500]
    path.write_text("\n".join(f"{row['chinese']}\n{row['translation']['en']}" for row in rows), encoding="utf-8")
    return path


def llama_3(path, text):
    """A small byte-level vocabulary with LLaMA 3's first cut, whole words taken straight from the list."""
    rules = Tokenizer(models.BPE(ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(words.LLAMA_3), "isolated")
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    rules.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rules.train([str(text)], trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<|begin|>", eos_token="<|end|>")
    tokenizer.save_pretrained(path.parent / "llama-3")
    return list((path.parent / "llama-3").iterdir())


@pytest.mark.parametrize("kind", ["llama", "llama-extended", "llama-merged", "smollm-extended", "llama-3"])
def test_llama_cpp_cuts_as_transformers_does(kind, pairs, tmp_path):
    base, out = assets.fetch("mistral-v1-tokenizer"), tmp_path / "grown.model"
    files = [out]
    if kind == "llama":
        files = [base]
    elif kind == "llama-extended":
        extension.extend(base, [pairs], out, 300)
    elif kind == "llama-merged":
        vocabulary.train([pairs], tmp_path / "zh.model", 2000)
        vocabulary.merge(base, tmp_path / "zh.model", out, scores="zero")
    elif kind == "smollm-extended":
        extension.extend(loading.resolve("smollm2-135m"), [pairs], tmp_path / "grown", 300)
        files = list((tmp_path / "grown").iterdir())
    else:
        files = llama_3(tmp_path / "tokenizer.json", pairs)
    folder = wearing(files, tmp_path / "model")
    tokenizer = loading.read_tokenizer(str(folder))
    same_words(llama_cpp_server(written(folder, tmp_path)), tokenizer, [*TEXTS, pairs.read_text("utf-8")[:3000]])


def test_an_adapter_with_new_rows_becomes_one_file_with_a_grown_vocabulary(tiny, pairs, tmp_path):
    """Continued BPE → rows and LoRA → merged folder → GGUF: llama.cpp cuts and answers with the new pieces."""
    extension.extend(tiny, [pairs], tmp_path / "grown", 60)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    new = embeddings.grow(model, embeddings.spelt(tmp_path / "grown", tiny), "random")
    model = adapters.add_adapter(model, recipes.Adapter(r=4, alpha=8, targets=["q_proj"]), str(tiny), new=new)
    for weight in (weight for weight in model.parameters() if weight.requires_grad):
        torch.nn.init.normal_(weight, std=0.3)
    loading.quiet(model.save_pretrained, tmp_path / "adapter", save_embedding_layers=False)
    for file in (tmp_path / "grown").iterdir():
        shutil.copy(file, tmp_path / "adapter")
    wanted = answers(model)

    export.merge(str(tiny), [tmp_path / "adapter"], tmp_path / "merged", dtype="float32")
    assert torch.allclose(reading(tmp_path / "merged"), wanted, atol=1e-4)
    merged, tokenizer = loading.load(str(tmp_path / "merged"), dtype="float32", device="cpu")
    assert merged.get_input_embeddings().weight.shape[0] == len(tokenizer) == len(new) + new.start
    path = written(tmp_path / "merged", tmp_path)
    export.fill(merged, path)
    ask = llama_cpp_server(path)
    same_words(ask, tokenizer, [*TEXTS, pairs.read_text("utf-8")[:1000]])
    prompts = [tokenizer("我们中国人 how are you").input_ids, tokenizer("他们喜欢").input_ids]
    assert any(token in new for start in prompts for token in start)
    for ours, theirs in greedy(ask, merged, prompts, 16):
        assert ours == theirs
        assert ours


def test_what_the_file_says_of_the_vocabulary(tiny, tmp_path):
    fields = GGUFReader(written(tiny, tmp_path)).fields
    found = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}
    assert (found["model"], found["pre"]) == ("gpt2", "gpt-2")
    assert (found["bos_token_id"], found["eos_token_id"], found["padding_token_id"]) == (1, 2, 2)
    assert found["add_bos_token"] is found["add_eos_token"] is found["add_space_prefix"] is False
    assert found["tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert found["token_type"][:4] == [3, 3, 3, 1]  # control, and text
    assert (found["llama.attention.head_count"], found["llama.attention.head_count_kv"]) == (4, 2)
    assert found["llama.vocab_size"] == len(found["tokens"])


def test_a_sentencepiece_vocabulary_keeps_its_kinds_and_begins_with_bos(tmp_path):
    folder = wearing([assets.fetch("mistral-v1-tokenizer")], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 32_064}
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 32_000
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    loading.quiet(model.save_pretrained, folder)
    fields = GGUFReader(written(folder, tmp_path)).fields
    found = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}
    assert (found["model"], found["add_bos_token"], found["add_space_prefix"]) == ("llama", True, True)
    assert found["tokens"][:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert found["token_type"][:4] == [2, 3, 3, 6]  # unknown, control, single byte
    assert (found["tokens"][32_063], found["token_type"][32_063]) == ("[PAD32063]", 5)


def test_a_sentencepiece_file_alone_cuts_as_sentencepiece_does(tmp_path):
    from sentencepiece import SentencePieceProcessor

    path = assets.fetch("mistral-v1-tokenizer")
    shutil.copy(path, tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer, reference = loading.read_tokenizer(str(tmp_path)), SentencePieceProcessor(model_file=str(path))
    for text in TEXTS:
        assert tokenizer(text, split_special_tokens=True).input_ids == [1, *reference.encode(text)], text
    assert tokenizer.decode(tokenizer("你好 world", add_special_tokens=False).input_ids) == "你好 world"


# what is refused


def changed(tiny, tmp_path, **changes):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_another_architecture(tiny, tmp_path):
    folder = changed(tiny, tmp_path, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    refused(lambda: written(folder, tmp_path), f"{folder}: a qwen2 model; only the LLaMA architecture")


def test_rules_that_llama_cpp_has_no_name_for(tiny, tmp_path):
    folder = changed(tiny, tmp_path)
    state = json.loads((folder / "tokenizer.json").read_text())
    for change, shown in (
        ({"normalizer": {"type": "NFC"}}, "its first cut (NFC + ByteLevel) is none of gpt-2, smollm"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "(Whitespace)"),
        ({"model": state["model"] | {"ignore_merges": True}}, "(ByteLevel)"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}, "added_tokens": []}, "a Unigram tokenizer"),
    ):
        (folder / "tokenizer.json").write_text(json.dumps(state | change))
        refused(lambda: written(folder, tmp_path), str(folder), shown)
    folder = changed(
        folder, tmp_path / "more", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    refused(lambda: written(folder, tmp_path), "rotary scaling 'dynamic'")


def test_weights_that_do_not_fit(tiny, tmp_path, monkeypatch):
    refused(lambda: written(tiny, tmp_path, "q5_k"), "quant 'q5_k' is unknown; choose one of f16, q8_0, q4_0")
    refused(lambda: written("someone/model", tmp_path), "someone/model: not a folder here")
    refused(lambda: export.gguf(tiny, tiny), f"{tiny}: exists already", "force")
    fewer = changed(tiny, tmp_path, vocab_size=200)
    refused(lambda: written(fewer, tmp_path), "259 pieces but 200 rows")
    more = changed(tiny, tmp_path / "more", vocab_size=384)
    refused(lambda: written(more, tmp_path), "token_embd.weight: (259, 64) in the file, (384, 64) by config.json")
    deeper = changed(tiny, tmp_path / "deeper", num_hidden_layers=3)
    refused(lambda: written(deeper, tmp_path), "model.layers.2.self_attn.q_proj.weight is missing")
    (deeper / "model.safetensors").unlink()
    refused(lambda: written(deeper, tmp_path), f"{deeper}: no safetensors to read")
    narrow = LlamaConfig(
        vocab_size=259, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    loading.quiet(LlamaForCausalLM(narrow).save_pretrained, tmp_path / "narrow")
    refused(lambda: written(tmp_path / "narrow", tmp_path, "q8_0"), "is 48 wide, no multiple of 32; choose f16")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(lambda: written(tiny, tmp_path), "bytes needed on the way, 1,000 free")
    assert list(tmp_path.rglob("*gguf*")) == []


def test_the_command_asks_for_room_first_and_clears_up_after_one_that_was_killed(tiny, tmp_path, monkeypatch, run):
    """A GGUF needs the merged model in float32 beside it: said in bytes before anything is loaded."""
    order = ["export", tiny, "--to", "gguf", "--quant", "q8_0", "-o", tmp_path / "a.gguf"]
    (tmp_path / ".a.gguf.merging" / "a").mkdir(parents=True)  # what a killed export leaves
    code, out, _ = run(*order)
    assert code == 0
    assert "q8_0; it answers as base and adapters do: no logit moved by more than" in out
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    needed = 2 * export.room(str(tiny), "f16") + export.room(str(tiny), "q8_0")
    sizes = {tensor.name: tensor.n_bytes for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    assert export.room(str(tiny), "q8_0") == sum(sizes.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(loading, "load", None)
    code, _, err = run(*order[:-1], tmp_path / "deep" / "b.gguf")
    assert (code, f"{needed:,} bytes needed on the way, 1,000 free" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


# the running model


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return written("smollm2-135m", tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def filled(real):
    """The running model in float32, its numbers replaced by those of the f16 file."""
    model = loading.load("smollm2-135m", dtype="float32", device="cpu")[0].eval()
    export.fill(model, real)
    return model


def test_the_real_file_holds_the_real_weights(real, filled, model):
    for name, weight in model.named_parameters():
        wanted = weight.half().float() if weight.ndim > 1 else weight
        assert torch.equal(filled.get_parameter(name), wanted), name


def test_llama_cpp_answers_as_transformers_does(real, filled, tokenizer, talk):
    """Token for token over 64 tokens: English, Chinese, emoji, digits; and the prompts' own tokens."""
    ask = llama_cpp_server(real)
    same_words(ask, tokenizer)
    asked = ["What is gravity?", "请介绍一下北京。", "🎉👍🏽 and then? 🧑\u200d🚀", "Count: 2024, 3.14159, 42, 1e-10,"]
    prompts = [prompt_ids(prompt(talk(text), "chatml", tokenizer.eos_token), tokenizer) for text in asked]
    for text, (ours, theirs) in zip(asked, greedy(ask, filled, prompts, 64), strict=True):
        assert theirs == ours, text
        assert len(ours) > 8


def test_the_price_of_a_format_in_bits_per_byte(filled, tokenizer, tmp_path):
    """Short held-out rows of both languages. These weights were on another 4-bit grid before, so q4_0 is dear."""
    rows = []
    for name in ("belle_zh", "alpaca_en"):
        held_out = messages.split(messages.read(ROOT / f"data_samples/{name}.jsonl"))[1]
        rows += sorted(held_out, key=lambda row: sum(len(turn.content) for turn in row))[:4]

    def price():
        return evaluation.score(filled, tokenizer, rows, "chatml").bits_per_byte

    exact, found = price(), {}
    for quant in ("q8_0", "q4_0"):  # the last test that needs the f16 numbers
        export.fill(filled, written("smollm2-135m", tmp_path, quant))
        found[quant] = abs(price() / exact - 1)
    assert found["q8_0"] < 0.01
    assert found["q8_0"] < found["q4_0"] < 0.3


def test_the_stored_study_of_formats_is_what_the_weights_say_again(monkeypatch):
    """One cell of `benchmarks/12_inference.py` afresh, and what the chapter says of all of them."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    study = importlib.import_module("12_inference")
    rows = json.loads((ROOT / "benchmarks/results/12-inference.json").read_text(encoding="utf-8"))["rows"]
    name = "minilm, never quantised"
    stored = {row["arm"]: row["error"] for row in rows if row.get("checkpoint") == name}
    again = study.weight_errors(name, study.inside_blocks(assets.fetch("minilm"), "encoder.layer"))
    assert {row["arm"]: row["error"] for row in again} == pytest.approx(stored, abs=1e-5)
    found = {(row["arm"], row["language"]): row for row in rows if row["measurement"] == "bits per byte"}
    assert {arm for arm, _ in found} == set(study.ARMS)
    for row in found.values():
        assert len(row["nll"]) == len(row["bytes"]) == study.HELD_OUT
        assert sum(row["nll"]) / math.log(2) / sum(row["bytes"]) == pytest.approx(row["bpb"], abs=1e-4)
