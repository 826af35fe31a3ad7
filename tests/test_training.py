"""Training: every weight that should learn does, the loss is the answers' loss, and a run that cannot work says so."""

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers

from cvlib import InputError, loading, recipes, texts, training
from cvlib.batching import IGNORE_INDEX, flatten
from cvlib.evaluation import score, token_losses
from cvlib.messages import read, split
from cvlib.training import add_adapter, prepare, train, training_examples, training_rows

REPACKS = torch.cpu._is_avx512_bf16_supported() and not torch.cuda.is_available()


def trainable(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def gradients(model, tokenizer, rows_file):
    """Gradients of every trainable weight after one backward pass over two rows."""
    examples = prepare(read(rows_file)[:2], tokenizer, recipes.Recipe())
    model.train()
    token_losses(model, {name: part.to(model.device) for name, part in flatten(examples).items()}).mean().backward()
    return {name: weight.grad for name, weight in trainable(model).items()}


def wake(model):
    """Give every B a value: while it is zero, A's gradient is rightly zero."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model


# gradients (traps 14 and 21)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_every_trainable_weight_gets_a_gradient_also_after_an_evaluation(bits, checkpointing, tiny, rows_file):
    base, tokenizer = loading.load(str(tiny), bits)
    rows = read(rows_file)[:4]
    score(base, tokenizer, rows, "chatml")  # trap 21: this forward must not repack the weights
    seven = recipes.Adapter(dropout=0.0, targets=list(recipes.PROJECTIONS))
    model = wake(add_adapter(base, seven, str(tiny), checkpointing))
    score(model, tokenizer, rows, "chatml")
    found = gradients(model, tokenizer, rows_file)
    assert len(found) == 2 * 7 * 2  # layers × matrices × (A and B)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found.values())
    assert all(weight.dtype == torch.float32 for weight in trainable(model).values())


@pytest.mark.filterwarnings("ignore:bitsandbytes.*an autograd kernel was not registered")
@pytest.mark.skipif(not REPACKS, reason="bitsandbytes repacks 4-bit weights only on CPUs with AVX512-BF16")
def test_trap_21_without_keep_trainable_nothing_learns_and_the_guard_says_so(tiny, make, tmp_path, monkeypatch):
    """Trap 21 as it happens: evaluate, then train. The loss would print all the same."""
    monkeypatch.setattr(loading, "keep_trainable", lambda model: None)
    model, tokenizer = loading.load(str(tiny), 4)
    score(model, tokenizer, training_rows(make().data.train)[:4], "chatml")
    with pytest.raises(InputError, match=r"trainable parameters got no gradient \(first: .*lora"):
        train(make("bits=4", "dtype=auto"), tmp_path / "run", loaded=(model, tokenizer))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("older_kind", [False, True])
def test_trap_14_checkpointing_finds_something_to_differentiate(older_kind, tiny, rows_file):
    """The embeddings are frozen: unless their output asks for a gradient, torch's older kind hands none to anybody."""
    base, tokenizer = loading.load(str(tiny), dtype="float32")
    model = wake(add_adapter(base, recipes.Adapter(dropout=0.0), str(tiny), checkpointing=True))
    kind = {"use_reentrant": older_kind}
    loading.quiet(base.gradient_checkpointing_enable, gradient_checkpointing_kwargs=kind)
    assert base.get_input_embeddings()(torch.tensor([[1]])).requires_grad
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model, tokenizer, rows_file).values())


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_trap_08_saving_needs_no_second_copy_of_the_base(bits, tiny, make, tmp_path):
    """Quantised or not: what is allocated while saving is of the adapter's size, not of the base's."""
    from torch.profiler import ProfilerActivity, profile

    base, _ = loading.load(str(tiny), bits)
    model = wake(add_adapter(base, recipes.Adapter(r=1, targets=["q_proj"]), str(tiny)))
    held = sum(weight.numel() * weight.element_size() for weight in base.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        training.save(model, make(), tmp_path)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in seen.events())
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert allocated < held / 4
    assert written < held / 4


def test_adapters_of_a_float16_base_are_float32(tiny):
    """Their gradients are then float32, too: a scaler refuses to unscale float16 ones."""
    model = add_adapter(loading.load(str(tiny), dtype="float16")[0], recipes.Adapter(), str(tiny))
    assert model.dtype == torch.float16
    assert {weight.dtype for weight in trainable(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "device", "scaled"),
    [("float16", "cuda", True), ("float16", "cpu", False), ("bfloat16", "cuda", False), ("float32", "cuda", False)],
)
def test_only_float16_on_a_card_gets_a_gradient_scaler(dtype, device, scaled, make, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(
        training, "TrainingArguments", lambda **options: given.update(options) or SimpleNamespace(world_size=1, n_gpu=4)
    )
    model = SimpleNamespace(dtype=getattr(torch, dtype), device=torch.device(device))
    settings = training.arguments(make("report_to=tensorboard", "schedule.save_every=7"), tmp_path, model)
    assert given["fp16"] is scaled
    assert given["report_to"] == "tensorboard"
    assert (given["save_strategy"], given["save_steps"]) == ("steps", 7)
    assert settings._n_gpu == 1  # not a batch cut up for all the cards that one process sees


def test_checkpointing_changes_no_gradient(tiny, rows_file):
    found = []
    for checkpointing in (False, True):
        base, tokenizer = loading.load(str(tiny), dtype="float32")
        torch.manual_seed(0)
        model = wake(add_adapter(base, recipes.Adapter(dropout=0.0), str(tiny), checkpointing))
        found.append(gradients(model, tokenizer, rows_file))
        assert base.model.layers[0].gradient_checkpointing is checkpointing
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_the_guard_stops_at_a_weight_without_gradient(make, tmp_path, monkeypatch):
    def unused(*arguments):
        model = add_adapter(*arguments)
        model.spare = torch.nn.Parameter(torch.zeros(1))
        return model

    monkeypatch.setattr(training, "add_adapter", unused)
    with pytest.raises(InputError, match=r"1 trainable parameters got no gradient \(first: spare\)"):
        train(make(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("call", [1, 6])  # the first micro-batch, and the very last
def test_trap_09_the_guard_stops_at_a_loss_that_is_zero_or_not_finite(bad, call, make, tmp_path, monkeypatch):
    """One bad micro-batch is enough, even the last: its gradients are in the weights that would be saved."""
    calls = []

    def broken(model, batch):
        calls.append(1)
        of_this_step = {call} if bad else {call - (call + 1) % 2, call + call % 2}  # 0 in one half is no sum of 0
        return token_losses(model, batch) * (bad if len(calls) in of_this_step else 1)

    monkeypatch.setattr(training, "token_losses", broken)
    with pytest.raises(
        InputError, match=rf"the loss is (nan|inf|0\.0) at step {(call + 1) // 2}; lower schedule.learning_rate"
    ):
        train(make(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_finite_is_not_saved(make, tmp_path, tiny):
    model = wake(add_adapter(loading.load(str(tiny), dtype="float32")[0], recipes.Adapter(), str(tiny)))
    next(weight for name, weight in model.named_parameters() if "lora_B" in name).data[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        training.save(model, make(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_trap_07_an_adapter_of_zeros_is_not_saved(make, tmp_path):
    """Trap 7: a run of one step that is all warm-up has rate 0, so B stays zero. It is refused before it begins."""
    with pytest.raises(InputError, match="all 1 steps of this run are warm-up, from rate 0"):
        train(make("schedule.max_steps=1", "schedule.warmup_ratio=0.5"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    fresh = add_adapter(loading.load(make().base, dtype="float32")[0], recipes.Adapter(), make().base)
    with pytest.raises(InputError, match=r"every B of the adapter is zero.*warmup_ratio=0"):
        training.save(fresh, make(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# what is learnt


def test_what_the_model_is_given_is_answers_and_end_tokens(make, tmp_path, monkeypatch):
    """Trap 1: read the labels where the loss is computed, behind every collator, and decode them."""
    seen = []

    def spy(model, batch):
        row = batch["labels"][0].tolist()
        text = "".join("…" if label == IGNORE_INDEX else tokenizer.decode([label]) for label in row)
        seen.extend(part for part in text.split("…") if part)
        return token_losses(model, batch)

    tokenizer = loading.load(make().base)[1]
    monkeypatch.setattr(training, "token_losses", spy)
    recipe = make("schedule.max_steps=0", "schedule.epochs=1")
    train(recipe, tmp_path / "run")
    trained, held_out = split(read(recipe.data.train[0]))
    # the tokenizer of the tiny base spells a Chinese character in three bytes: put them together again
    wanted = sorted(row[1].content + "<|im_end|>" for row in trained)
    whole = [tokenizer.decode(tokenizer(text).input_ids) for text in wanted]
    assert wanted == whole
    assert len(seen) == len(trained) > 0 < len(held_out)
    assert all(part.endswith("<|im_end|>") for part in seen)
    assert {len(part) for part in seen} == {len(broken(text, tokenizer)) for text in wanted}


def broken(text, tokenizer):
    return "".join(tokenizer.decode([token]) for token in tokenizer(text).input_ids)


def test_held_out_rows_are_never_trained(make):
    recipe = make()
    trained = training_rows(recipe.data.train)
    everything = read(recipe.data.train[0])
    assert 0 < len(trained) < len(everything)
    assert trained == split(everything)[0]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n}，北京的天气很好。\n" for n in range(60)), encoding="utf-8")
    return path


def test_plain_text_is_learnt_token_by_token_and_held_out_lines_are_not(make, text_file, tmp_path, monkeypatch):
    seen, tokenizer = [], loading.load(make().base)[1]

    def spy(model, batch):
        labels = batch["labels"][0]
        seen.extend(labels[labels != IGNORE_INDEX].tolist())
        return token_losses(model, batch)

    monkeypatch.setattr(training, "token_losses", spy)
    text = ["data.train=[]", f"data.text=[{text_file}]", "data.max_length=64"]
    train(make(*text, "schedule.max_steps=0", "schedule.epochs=1"), tmp_path / "run")
    learnt, held_out = texts.split(texts.lines(str(text_file)))
    assert held_out
    wanted = [token for line in learnt for token in [*tokenizer(line).input_ids, 0]]
    assert Counter(seen) == Counter(wanted)


def test_rows_and_text_in_one_run(make, text_file):
    recipe = make(f"data.text=[{text_file}]", "data.max_length=128")
    examples = training_examples(recipe, loading.load(recipe.base)[1])
    rows = len(training_rows(recipe.data.train))
    assert {len(example) for example in examples[rows:-1]} == {128}
    assert len(examples) > rows + 1


def test_text_that_cannot_be_trained(make, tmp_path):
    only = tmp_path / "only.txt"
    only.write_text("22", encoding="utf-8")  # held out, see the doctest of texts.held_out
    with pytest.raises(InputError, match=r"only\.txt: every line falls into the held-out split"):
        train(make("data.train=[]", f"data.text=[{only}]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_first_loss_is_the_mean_over_the_steps_answers(make, tmp_path, monkeypatch):
    """Over all labelled tokens of both micro-batches, not a mean of two means."""
    losses = []

    def spy(model, batch):
        found = token_losses(model, batch)
        losses.append(found.detach())
        return found

    monkeypatch.setattr(training, "token_losses", spy)
    run = train(make("schedule.max_steps=1"), tmp_path / "run")
    assert len(losses) == 2
    assert run.losses[0] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)


def test_accumulation_is_one_big_batch(make, tmp_path):
    """8 rows at once, 2 × 4 and 4 × 2: the same losses and the same adapter."""
    runs = [train(make(f"schedule.micro_rows={n}"), tmp_path / str(n)) for n in (8, 4, 2)]
    for run in runs[1:]:
        assert run.losses == pytest.approx(runs[0].losses, rel=1e-5)
        for mine, theirs in zip(trainable(run.model).values(), trainable(runs[0].model).values(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-6)


def test_one_seed_one_run(make, tmp_path):
    """With dropout; also when the model was loaded before, or trained before."""
    noisy = "adapter.dropout=0.3"
    first = train(make(noisy), tmp_path / "1")
    loaded = loading.load(make().base, dtype="float32")
    torch.rand(5)
    runs = [train(make(noisy), tmp_path / "2"), train(make(noisy), tmp_path / "3", loaded)]
    assert [run.losses for run in runs] == [first.losses] * 2
    files = [(run.folder / "adapter_model.safetensors").read_bytes() for run in (first, *runs)]
    assert files[0] == files[1] == files[2]
    assert train(make(noisy, "schedule.seed=7"), tmp_path / "4").losses != first.losses


def test_the_loss_falls_and_the_base_stays(make, tmp_path):
    model, tokenizer = loading.load(make().base, dtype="float32")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    recipe = make("schedule.max_steps=12", "schedule.learning_rate=0.02", "adapter.r=16")
    run = train(recipe, tmp_path / "run", (model, tokenizer))
    assert run.losses[-1] < run.losses[0] - 0.2
    after = {name.replace("base_layer.", ""): weight for name, weight in model.named_parameters() if "lora" not in name}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# the schedule


def rates(run):
    return [step["learning_rate"] for step in run.steps]


def test_trap_13_three_steps_are_not_all_warm_up(make, tmp_path):
    """Trap 13: the warm-up is a share of the run, so a short run reaches its rate."""
    run = train(make("schedule.warmup_ratio=0.05", "schedule.learning_rate=0.01"), tmp_path / "run")
    assert rates(run) == pytest.approx([0, 0.01, 0.005])


def test_trap_13_a_hundred_warm_up_steps_on_a_run_of_three_are_refused(make, tmp_path):
    with pytest.raises(InputError, match=r"warmup_steps is 100, but the run has 3 steps; choose fewer"):
        train(make("schedule.warmup_steps=100"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    run = train(make("schedule.warmup_steps=1", "schedule.learning_rate=0.01"), tmp_path / "run")
    assert rates(run) == pytest.approx([0, 0.01, 0.005])


@pytest.mark.parametrize(
    ("card", "change", "words"),
    [
        (None, "schedule.optimizer=adamw_8bit", "but there is no NVIDIA card here; choose adamw"),
        (None, "schedule.optimizer=paged_adamw_8bit", "is 'paged_adamw_8bit', but"),
        ((7, 5), "dtype=bfloat16", "dtype is 'bfloat16', but this card only emulates it; choose auto"),
        ((7, 0), "bits=8", "bits is 8, but this card is older than Turing"),
    ],
)
def test_trap_09_what_the_machine_cannot_do_is_refused(card, change, words, make, tmp_path, monkeypatch):
    """Trap 9 among them: int8 on a card before Turing explodes, or says 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: card)
    with pytest.raises(InputError) as refusal:
        train(make(change), tmp_path / "run")
    assert words in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("card", "change"), [((8, 0), "dtype=bfloat16"), ((7, 5), "bits=8"), ((7, 0), "bits=4"), (None, "bits=8")]
)
def test_what_the_machine_can_do_is_not_refused(card, change, make, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: card)
    training.check_machine(make(change))


def test_epochs_count_the_training_rows(make, tmp_path):
    recipe = make("schedule.max_steps=0", "schedule.epochs=2", "schedule.learning_rate=0.01")
    run = train(recipe, tmp_path / "run")
    steps = 2 * -(-len(training_rows(recipe.data.train)) // 8)
    assert len(run.steps) == steps
    assert rates(run) == pytest.approx([0.01 * (1 - n / steps) for n in range(steps)])


def test_several_processes_share_a_step(make, monkeypatch, tmp_path, tiny):
    model = loading.load(str(tiny), dtype="float32")[0]
    recipe = make("schedule.batch_rows=16")
    assert training.arguments(recipe, tmp_path, model).gradient_accumulation_steps == 4
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"schedule.batch_rows is 16; choose a multiple of .* 4 × 3"):
        training.arguments(recipe, tmp_path, model)


# the run folder


def test_a_run_folder_is_all_a_chat_needs(make, tmp_path):
    recipe = make()
    run = train(recipe, tmp_path / "deep" / "run")
    names = sorted(path.name for path in run.folder.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "recipe.yaml"]
    assert recipes.load(run.folder / "recipe.yaml") == recipe
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.steps
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert run.adapter_bytes == (run.folder / "adapter_model.safetensors").stat().st_size > 1000
    assert run.seconds > 0
    assert [path.name for path in run.folder.parent.iterdir()] == ["run"]


def test_what_was_trained_is_what_is_loaded(make, tmp_path, rows_file):
    run = train(make("schedule.learning_rate=0.02"), tmp_path / "run")
    rows = read(rows_file)[:8]
    again, tokenizer = loading.load(make().base, dtype="float32", adapter=run.folder)
    base = loading.load(make().base, dtype="float32")[0]
    found = [score(model, tokenizer, rows, "chatml").nll for model in (run.model, again, base)]
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] != pytest.approx(found[0], rel=1e-4)
    assert not trainable(again)


def test_an_existing_folder_is_kept(make, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="run: exists already; name another folder"):
        train(make(), tmp_path / "run")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_a_run_that_is_stopped_leaves_nothing(error, make, tmp_path, monkeypatch):
    def stop(*_):
        raise error

    monkeypatch.setattr(training, "token_losses", stop)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        train(make(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_rows_that_cannot_be_trained(make, tmp_path, talk):
    with pytest.raises(InputError, match=r"data\.train and data\.text are empty"):
        train(make("data.train=[]"), tmp_path / "run")
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        train(make("data.train=[none.jsonl]"), tmp_path / "run")
    with pytest.raises(InputError, match=r"no answer fits into data\.max_length=16 tokens"):
        train(make("data.max_length=16"), tmp_path / "run")
    only = tmp_path / "only.jsonl"  # 1+1等于几？ is held out, see test_messages
    only.write_text('{"instruction": "1+1等于几？", "output": "2"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"only\.jsonl: every row falls into the held-out split"):
        train(make(f"data.train=[{only}]"), tmp_path / "run")


def test_rows_shipped_with_the_book_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert training.locate("data_samples/belle_zh.jsonl").is_file()
    assert training.locate("my.jsonl") == training.Path("my.jsonl")
    (tmp_path / "data_samples").mkdir()
    (tmp_path / "data_samples" / "belle_zh.jsonl").touch()  # the reader's own comes first
    assert training.locate("data_samples/belle_zh.jsonl") == training.Path("data_samples/belle_zh.jsonl")


def test_the_adapter_is_what_the_recipe_says(tiny):
    wanted = recipes.Adapter(r=4, alpha=6, dropout=0.2, targets=["k_proj", "down_proj"])
    model = add_adapter(loading.load(str(tiny))[0], wanted, "some/base")
    made = model.peft_config["default"]
    assert (made.r, made.lora_alpha, made.lora_dropout, made.target_modules) == (4, 6, 0.2, {"k_proj", "down_proj"})
    assert made.base_model_name_or_path == "some/base"
    assert {name.split(".")[-4] for name in trainable(model)} == {"k_proj", "down_proj"}
    assert dataclasses.asdict(wanted).keys() == {"r", "alpha", "dropout", "targets"}


def test_nothing_is_printed_by_the_trainer(make, tmp_path, capsys):
    """Standard output belongs to the result; the bar goes to standard error and ends its line."""
    train(make(), tmp_path / "run")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.endswith("\n")
    assert "Warning" not in shown.err
    assert "kernels" not in shown.err
    assert transformers.utils.logging.is_progress_bar_enabled()
