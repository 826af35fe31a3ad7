"""Runs that are stopped: whatever happens, what is there is whole, and going on gives what would have been."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

from cvlib import ROOT, InputError, callbacks, checkpoints, extension, loading, recipes, training
from cvlib.training import train

NOISY = ("schedule.max_steps=6", "schedule.save_every=1", "adapter.dropout=0.3", "schedule.scheduler=cosine")


@pytest.fixture(scope="session")
def recipe_file(tiny, rows_file, tmp_path_factory):
    """Six noisy steps on the tiny base, a checkpoint after each, as a file for other processes."""
    path = tmp_path_factory.mktemp("recipe") / "noisy.yaml"
    schedule = {"max_steps": 6, "batch_rows": 8, "micro_rows": 4, "warmup_ratio": 0.2, "save_every": 1}
    recipe = {"base": str(tiny), "dtype": "float32", "adapter": {"dropout": 0.3}, "data": {"train": [str(rows_file)]}}
    path.write_text(yaml.safe_dump(recipe | {"schedule": schedule}), encoding="utf-8")
    return path


def command(*arguments, launcher=("-m", "cvlib")):
    """`cvlib train` as a process of its own."""
    line = [sys.executable, *launcher, "train", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=environment, **pipes)


def weights(run):
    return (run / "adapter_model.safetensors").read_bytes()


def losses(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["step"], row["loss"], row["learning_rate"], row["tokens"]) for row in rows]


@pytest.fixture(scope="session")
def whole(recipe_file, tmp_path_factory):
    """The run that nobody interrupts."""
    return train(recipes.load(recipe_file), tmp_path_factory.mktemp("whole") / "run").folder


def stopped(recipe, out, step, monkeypatch, **options):
    """A run in this process that is asked to stop after a step."""

    def ask(self, args, state, control, **_):
        self.asked = state.global_step == step
        return original(self, args, state, control)

    original = callbacks.Keeper.on_step_end
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Keeper, "on_step_end", ask)
        with pytest.raises(KeyboardInterrupt, match=f"saved after step {step}; go on with cvlib train --resume {out}"):
            train(recipe, out, **options)
    return checkpoints.unfinished(out)


# going on exactly


@pytest.mark.parametrize("step", [1, 4])
def test_resumed_is_uninterrupted_to_the_bit(step, recipe_file, whole, tmp_path, monkeypatch):
    recipe = recipes.load(recipe_file)
    work = stopped(recipe, tmp_path / "run", step, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["run.unfinished"]
    assert len(losses(work)) == step
    run = train(recipe, tmp_path / "run", resume=True)
    assert weights(run.folder) == weights(whole)
    assert losses(run.folder) == losses(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sorted(path.name for path in run.folder.iterdir()) == sorted(path.name for path in whole.iterdir())


def until(condition, process, seconds=120):
    """Wait for a condition, or for the end of the process."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def test_killed_twice_then_resumed_is_uninterrupted_to_the_bit(recipe_file, whole, tmp_path):
    """kill -9 gives no time to tidy up: first while saving, then at a moment drawn by chance."""
    out, work = tmp_path / "run", tmp_path / "run.unfinished"
    process = command(recipe_file, "-o", out)
    until((work / "checkpoint-2" / "adapter_model.safetensors").exists, process)  # its mark is not there yet
    process.kill()
    process.communicate()
    process = command("--resume", out)
    until(lambda: len((work / "metrics.jsonl").read_text().splitlines()) > 2, process)
    time.sleep(random.uniform(0, 1))
    process.kill()
    process.communicate()
    if not out.exists():
        train(recipes.load(recipe_file), out, resume=True)
    assert weights(out) == weights(whole)
    assert losses(out) == losses(whole)


def test_a_run_that_is_being_trained_is_left_alone(recipe_file, whole, refused, tmp_path):
    """The lock ends with its process, so a killed run can be resumed at once."""
    out, work = tmp_path / "run", tmp_path / "run.unfinished"
    process = command(recipe_file, "-o", out)
    until((work / "checkpoint-2" / checkpoints.MARK).exists, process)
    process.send_signal(signal.SIGSTOP)
    for asked in (["--resume", out], [recipe_file, "-o", out]):
        refused(["train", *asked], f"{work}: another process is training it; wait for its end or stop it")
    process.kill()
    process.communicate()
    assert weights(train(recipes.load(recipe_file), out, resume=True).folder) == weights(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_ctrl_c_saves_and_says_how_to_go_on(recipe_file, whole, run, tmp_path):
    out, work = tmp_path / "run", tmp_path / "run.unfinished"
    process = command(recipe_file, "-o", out)
    until((work / "metrics.jsonl").exists, process)
    process.send_signal(signal.SIGINT)
    said, bar = process.communicate()
    assert process.returncode == 130
    assert said == ""
    assert bar.splitlines()[-1].endswith(f"go on with cvlib train --resume {out}")
    assert "Traceback" not in bar
    assert checkpoints.newest(work)
    assert not out.exists()
    code, said, _ = run("train", "--resume", out)
    assert (code, said.startswith("6 steps over")) == (0, True)
    assert weights(out) == weights(whole)


# which checkpoint


def test_only_a_marked_checkpoint_is_picked(tmp_path):
    for step in (9, 50, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert checkpoints.newest(tmp_path) is None
    for step in (9, 50):
        checkpoints.mark(tmp_path / f"checkpoint-{step}")
    assert checkpoints.newest(tmp_path).name == "checkpoint-50"
    (tmp_path / "checkpoint-50" / "trainer_state.json").write_text("damaged since")
    assert checkpoints.newest(tmp_path).name == "checkpoint-9"


def test_a_damaged_checkpoint_costs_its_steps_and_not_the_run(recipe_file, whole, tmp_path, monkeypatch):
    """Its files have other sizes than when it was marked: the run goes on from the one before."""
    work = stopped(recipes.load(recipe_file), tmp_path / "run", 5, monkeypatch)
    (work / "checkpoint-5" / "optimizer.pt").write_bytes(b"cut")
    assert checkpoints.newest(work).name == "checkpoint-4"
    run = train(recipes.load(recipe_file), tmp_path / "run", resume=True)
    assert weights(run.folder) == weights(whole)
    assert losses(run.folder) == losses(whole)


def test_a_half_written_checkpoint_is_removed_and_two_whole_ones_kept(recipe_file, whole, tmp_path, monkeypatch):
    recipe = recipes.load(recipe_file)
    work = stopped(recipe, tmp_path / "run", 4, monkeypatch)
    marked = sorted(path.parent.name for path in work.glob(f"checkpoint-*/{checkpoints.MARK}"))
    assert marked == ["checkpoint-3", "checkpoint-4"]
    (work / "checkpoint-4" / checkpoints.MARK).unlink()
    (work / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    assert checkpoints.reopen(tmp_path / "run", recipe).name == "checkpoint-3"
    assert not (work / "checkpoint-4").exists()
    assert len(losses(work)) == 3
    assert weights(train(recipe, tmp_path / "run", resume=True).folder) == weights(whole)


def test_the_mark_is_written_last_and_reaches_the_disk(recipe_file, tmp_path, monkeypatch):
    """Every file of the checkpoint is synced before the mark has its name."""
    synced, there = [], []

    def spy(path):
        synced.append(path.name)
        if path.suffix == ".part":
            there.append(({found.name for found in path.parent.iterdir()} - {path.name}, set(synced)))
        original(path)

    original = checkpoints.sync
    monkeypatch.setattr(checkpoints, "sync", spy)
    train(recipes.load(recipe_file, ["schedule.max_steps=2"]), tmp_path / "run")
    ((files, before),) = there
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= files
    assert checkpoints.MARK not in files
    assert files <= before


def test_metrics_are_cut_back_also_behind_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste', encoding="utf-8")
    assert checkpoints.cut(path, 2) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert checkpoints.cut(tmp_path / "none.jsonl", 2) == []


def test_a_run_without_a_checkpoint_begins_again(recipe_file, whole, tmp_path):
    recipe, out = recipes.load(recipe_file), tmp_path / "run"
    examples = training.training_examples(recipe, loading.read_tokenizer(recipe.base))
    checkpoints.begin(out, recipe, {"data": checkpoints.fingerprint(examples), "processes": 1, "init": None})
    assert weights(train(recipe, out, resume=True).folder) == weights(whole)


def test_without_a_checkpoint_it_begins_again_from_the_same_adapter(make, tmp_path):
    first = train(make("schedule.learning_rate=0.02"), tmp_path / "first").folder
    whole = train(make(), tmp_path / "whole", init=first)
    examples = training.training_examples(make(), whole.tokenizer)
    about = {"data": checkpoints.fingerprint(examples), "processes": 1, "init": str(first)}
    checkpoints.begin(tmp_path / "run", make(), about)
    assert weights(train(make(), tmp_path / "run", resume=True).folder) == weights(whole.folder)


def test_new_rows_go_on_exactly_too(make, tiny, tmp_path, monkeypatch):
    """The checkpoint holds them and the tokenizer they belong to; two rates go on beside each other."""
    text = tmp_path / "text.txt"
    text.write_text("北京的天气很好，上海的天气也很好。\n" * 30, encoding="utf-8")
    grown = extension.extend(tiny, [text], tmp_path / "grown", 8).path
    recipe = make(*NOISY, f"growth.tokenizer={grown}", "growth.learning_rate=0.01", "schedule.max_steps=4")
    whole = train(recipe, tmp_path / "whole").folder
    stopped(recipe, tmp_path / "run", 2, monkeypatch)
    assert weights(train(recipe, tmp_path / "run", resume=True).folder) == weights(whole)
    assert loading.has_tokenizer(tmp_path / "run")


# misuse (trap 11)


def test_trap_11_resume_refuses_another_plan_and_names_init_adapter(make, rows_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stopped(make(*NOISY), out, 2, monkeypatch)
    for change, key in (("schedule.max_steps=9", "schedule.max_steps is 9"), ("adapter.r=4", "adapter.r is 4")):
        with pytest.raises(InputError, match=rf"{key}, but .* was begun with .*--init-adapter {out}"):
            train(make(*NOISY, change), out, resume=True)
    kept = rows_file.read_text(encoding="utf-8")
    rows_file.write_text(kept + '{"instruction": "天空是什么颜色？", "output": "蓝色。"}\n' * 9, encoding="utf-8")
    try:
        with pytest.raises(InputError, match=r"its rows have changed since it was begun.*--init-adapter"):
            train(make(*NOISY), out, resume=True)
    finally:
        rows_file.write_text(kept, encoding="utf-8")
    assert checkpoints.newest(checkpoints.unfinished(out))


def test_trap_11_init_adapter_refuses_an_unfinished_run_and_names_resume(make, tmp_path, monkeypatch):
    work = stopped(make(*NOISY), tmp_path / "run", 2, monkeypatch)
    for init in (tmp_path / "run", work, work / "checkpoint-2"):
        with pytest.raises(InputError, match=r"this run is not complete; go on with cvlib train --resume .*run$"):
            train(make(), tmp_path / "next", init=init)
    with pytest.raises(InputError, match="an interrupted run; go on with cvlib train --resume"):
        train(make(*NOISY), tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.unfinished"]


@pytest.mark.parametrize("left", ["run", "run.unfinished"])
def test_clear_leaves_nothing_that_a_new_run_would_refuse(left, tmp_path):
    (tmp_path / left / "checkpoint-2").mkdir(parents=True)
    checkpoints.clear(tmp_path / "run")
    checkpoints.clear(tmp_path / "run")  # nothing there is no error
    checkpoints.refuse_taken(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_resume_refuses_what_is_no_interrupted_run(make, run, refused, tmp_path, capsys):
    done = train(make("schedule.max_steps=1"), tmp_path / "done").folder
    capsys.readouterr()
    refused(["train", "--resume", done], "this run is complete", f"--init-adapter {done}")
    refused(["train", "--resume", tmp_path / "none"], "no interrupted run")
    refused(["train"], "no recipe; choose one of")
    code, _, err = run("train", "smollm2-cpu", "--resume", done, "--init-adapter", done)
    assert code == 2
    assert "not allowed with" in err


def test_another_number_of_processes_is_refused(make, tmp_path, monkeypatch):
    stopped(make(*NOISY), tmp_path / "run", 2, monkeypatch)
    about = json.loads((tmp_path / "run.unfinished" / "run.json").read_text())
    with pytest.raises(InputError, match="begun on 1 processes, now there are 2"):
        checkpoints.refuse_changed(tmp_path / "run", about | {"processes": 2})


# several processes


def test_trap_12_two_processes_are_one_at_the_same_effective_batch(make, tmp_path, recipe_file):
    """Both must deal from one shuffled pack, or rows are repeated and lost."""
    path = tmp_path / "quiet.yaml"
    path.write_text(yaml.safe_dump(make("schedule.max_steps=3").as_dict()), encoding="utf-8")
    alone = train(make("schedule.max_steps=3"), tmp_path / "alone").folder
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "cvlib")
    both = command(path, "-o", tmp_path / "both", launcher=launcher)
    said, bar = both.communicate(timeout=500)
    assert both.returncode == 0, bar
    assert said.count("3 steps over") == 1
    mine, theirs = losses(tmp_path / "both"), losses(alone)
    assert [row[1] for row in mine] == pytest.approx([row[1] for row in theirs], rel=1e-5)
    assert [(row[0], row[2:]) for row in mine] == [(row[0], row[2:]) for row in theirs]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "both", "quiet.yaml"]


def test_processes_that_did_not_join_are_refused(make, tmp_path, tiny, monkeypatch):
    """torchrun without use_cpu trains as many copies, in silence."""
    model = loading.load(str(tiny), dtype="float32")[0]
    monkeypatch.setattr(checkpoints, "processes", lambda: 2)
    with pytest.raises(InputError, match="2 processes were started, but torch joined 1"):
        training.arguments(make(), tmp_path, model)


def test_the_fsdp_config_is_one_that_accelerate_reads():
    """Not run here: it needs several cards. Its keys and values are at least accelerate's own."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType
    from accelerate.utils.constants import FSDP_AUTO_WRAP_POLICY, FSDP_SHARDING_STRATEGY, FSDP_STATE_DICT_TYPE

    config = load_config_from_file(str(recipes.FOLDER / "accelerate" / "fsdp-qlora.yaml"))
    fsdp = config.fsdp_config
    assert config.distributed_type == DistributedType.FSDP
    assert fsdp["fsdp_sharding_strategy"] in FSDP_SHARDING_STRATEGY
    assert fsdp["fsdp_auto_wrap_policy"] in FSDP_AUTO_WRAP_POLICY
    assert fsdp["fsdp_state_dict_type"] in FSDP_STATE_DICT_TYPE
    assert recipes.load("llama-13b-4bit-2080ti", ["schedule.optimizer=adamw"]).bits == 4
