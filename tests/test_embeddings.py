"""Rows for new pieces: where they start, that only they learn, and that an adapter folder brings them along."""

import json

import peft
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cvlib import InputError, embeddings, extension, loading

TEXT = "北京的天气很好，上海的天气也很好。\n我们学习中文，北京的老师教我们中文。\n" * 30


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """The running model's tokenizer with a few Chinese pieces: its folder."""
    folder = tmp_path_factory.mktemp("grown")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return extension.extend(loading.resolve("smollm2-135m"), [folder / "text.txt"], folder / "tokenizer", 24).path


@pytest.fixture(scope="module")
def sub_pieces(grown):
    return embeddings.spelt(grown, loading.resolve("smollm2-135m"))


@pytest.fixture
def small():
    """Makes a LLaMA of a few thousand weights, tied or not."""

    def make(tied: bool):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        special = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": tied}
        return LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes, **special))

    return make


def test_spelt_is_how_the_old_tokenizer_cut_the_piece(grown, sub_pieces, tokenizer):
    new = AutoTokenizer.from_pretrained(grown)
    assert len(sub_pieces) == len(new) - len(tokenizer) == 24
    whole = [n for n in range(len(tokenizer), len(new)) if "�" not in new.decode([n])]
    assert len(whole) > 10
    for number in whole:
        assert sub_pieces[number - len(tokenizer)] == tokenizer(new.decode([number]))["input_ids"]


def test_spelt_for_sentencepiece(tmp_path):
    from cvlib import assets

    base = assets.fetch("mistral-v1-tokenizer")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    made = extension.extend(base, [tmp_path / "text.txt"], tmp_path / "grown.model", 8)
    from sentencepiece import SentencePieceProcessor

    old = SentencePieceProcessor(model_file=str(base))
    for piece, ids in zip(made.added, embeddings.spelt(made.path, base), strict=True):
        assert old.decode(ids) == piece


def test_spelt_refuses_what_did_not_grow(grown):
    base = loading.resolve("smollm2-135m")
    with pytest.raises(InputError, match="holds no piece"):
        embeddings.spelt(base, base)
    with pytest.raises(InputError, match="does not begin with the pieces"):
        embeddings.spelt(base, grown)


@pytest.mark.parametrize("tied", [True, False])
def test_starts_by_hand(small, tied):
    for start in embeddings.STARTS:
        model = small(tied)
        old = [matrix.weight.detach().clone() for matrix in embeddings.matrices(model)]
        assert len(old) == 2 - tied
        assert embeddings.grow(model, [[1, 2, 3], [7]], start) == range(10, 12)
        assert model.config.vocab_size == 12
        for before, matrix in zip(old, embeddings.matrices(model), strict=True):
            assert torch.equal(matrix.weight[:10], before)
            if start == "mean":
                torch.testing.assert_close(matrix.weight[10], (before[1] + before[2] + before[3]) / 3)
                assert torch.equal(matrix.weight[11], before[7])
            if start == "zero":
                assert not matrix.weight[10:].any()
            if start == "random":
                assert 0.005 < matrix.weight[10:].std() < 0.05


def test_random_goes_by_the_seed(small):
    rows = []
    for seed in (0, 0, 1):
        embeddings.grow(model := small(True), [[0]], "random", seed)
        rows.append(model.get_input_embeddings().weight[10])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_grow_refuses(small):
    with pytest.raises(InputError, match="start is 'median'; choose one of mean, random, zero"):
        embeddings.grow(small(True), [[0]], "median")
    with pytest.raises(InputError, match="spelt by id 10, but the model has 10 rows"):
        embeddings.grow(small(True), [[10]])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_only_the_new_rows_learn(small, tied, lora):
    model = small(tied)
    new = embeddings.grow(model, [[1, 2], [3]])
    before = [matrix.weight.detach().clone() for matrix in embeddings.matrices(model)]
    rows = embeddings.trainable(model, new)
    assert set(rows) == ({"embed_tokens"} if tied else {"embed_tokens", "lm_head"})
    if lora:
        tuned = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows)
        )
    else:
        config = peft.TrainableTokensConfig(target_modules=list(rows), token_indices=list(new))
        tuned = peft.get_peft_model(model, config)
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    ids = torch.tensor([[1, 10, 11, 3, 10]])
    for _ in range(3):
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    states = [state["exp_avg"] for state in optimizer.state.values()]
    assert not any(state.shape[0] in (10, 12) for state in states)  # nothing as tall as the vocabulary
    assert sum(state.shape == (2, 16) for state in states) >= len(before)
    merged = tuned.merge_and_unload()
    for was, matrix in zip(before, embeddings.matrices(merged), strict=True):
        assert torch.equal(matrix.weight[:10], was[:10])
        assert not torch.equal(matrix.weight[10:], was[10:])


def test_an_adapter_folder_brings_its_rows(small, tmp_path):
    model = small(True)
    new = embeddings.grow(model, [[1, 2], [3]])
    rows = embeddings.trainable(model, new)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "trainable_tokens" in name:
                weight.fill_(0.5)
    tuned.save_pretrained(tmp_path, save_embedding_layers=False)
    assert embeddings.rows_of(tmp_path) == 12
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * 10 * 16 * 4  # not the whole matrix
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["trainable_token_indices"] = "all"
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="trainable_token_indices is 'all'; train the adapter again"):
        embeddings.rows_of(tmp_path)
