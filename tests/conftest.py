"""What the unit tests share: the real model in float32, its tokenizer, a tiny model where only training is tested."""

import signal

import pytest
import torch

from cvlib import assets, loading, recipes
from cvlib.__main__ import main
from cvlib.messages import Message


def conversation(*texts, system=None):
    """Texts as turns: user, assistant, user, …"""
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return [Message("system", system), *turns] if system else turns


@pytest.fixture(autouse=True, scope="session")
def keyboard():
    """Python's own answer to Ctrl-C, here and in the programs that tests start: a shell's `&` takes it away."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def talk():
    return conversation


@pytest.fixture(scope="session")
def tokenizer():
    """The running model's tokenizer; the weights are not loaded for it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(loading.resolve("smollm2-135m"))


@pytest.fixture(scope="session")
def model():
    """The running model in float32, in evaluation mode. Tests must leave it as they found it."""
    return loading.load("smollm2-135m", dtype="float32")[0].eval()


@pytest.fixture(scope="session")
def base():
    """A real LLaMA-family SentencePiece model to grow."""
    return assets.fetch("mistral-v1-tokenizer")


@pytest.fixture(scope="session")
def llama_tokenizer():
    """A LLaMA-family vocabulary as transformers' fast tokenizer, and as SentencePiece reads it itself."""
    import sentencepiece
    from transformers import LlamaTokenizer

    reference = sentencepiece.SentencePieceProcessor(model_file=str(assets.fetch("mistral-v1-tokenizer")))
    vocab = {reference.id_to_piece(i): i for i in range(len(reference))}
    merges = []
    for piece in sorted(vocab, key=lambda piece: -reference.get_score(vocab[piece])):  # the best score merges first
        parts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += sorted((pair for pair in parts if pair[0] in vocab and pair[1] in vocab), key=lambda p: vocab[p[0]])
    return LlamaTokenizer(vocab=vocab, merges=merges), reference


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a random LLaMA of two layers with a byte-level vocabulary of its own; it trains in seconds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    names = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[2], "unk_token": special[0]}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=len(words.get_vocab()), bos_token_id=1, eos_token_id=2, **shape, **heads)
    loading.quiet(LlamaForCausalLM(config).save_pretrained, folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """Forty short Chinese rows in BELLE's shape."""
    import json

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"instruction": f"{n}加{n}等于几？", "input": "", "output": f"等于{2 * n}。"} for n in range(40)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make(tiny, rows_file):
    """A recipe on the tiny base: three steps of eight rows, no dropout, no warm-up."""

    def recipe(*overrides):
        always = [f"base={tiny}", f"data.train=[{rows_file}]", "dtype=float32", "adapter.dropout=0"]
        steps = ["schedule.max_steps=3", "schedule.batch_rows=8", "schedule.micro_rows=4", "schedule.warmup_ratio=0"]
        return recipes.load("smollm2-cpu", [*always, *steps, *overrides])

    return recipe


@pytest.fixture
def run(capsys):
    """Run a command in this process: exit code, standard output, standard error."""

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.fixture
def refused(run):
    """The command refuses: code 2, nothing on standard output, one line with all the words."""

    def call(arguments, *words):
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("cvlib")
        assert "Traceback" not in err
        for word in words:
            assert str(word) in err

    return call
