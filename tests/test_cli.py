"""The command line: one line and exit code 2 for what cannot be used, and `--json` that a program can read."""

import io
import json
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cvlib import InputError, assets, mixture, recipes
from cvlib.__main__ import main, parser
from cvlib.commands import data, machine, train

GOOD = '{"instruction": "问题%d", "output": "好"}\n'
COMMANDS = [["doctor"], ["assets"], ["memory"], ["train"], ["evaluate"], ["export"], ["chat"], ["serve"]]
COMMANDS += [["vocab", action] for action in ("train", "merge", "extend", "audit", "fertility")]
COMMANDS += [["data", action] for action in ("check", "mix")]


@pytest.fixture(scope="module")
def trained(tiny, rows_file, tmp_path_factory):
    """A run of three steps on the tiny base, made by the command line: its folder and what was printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    recipe = folder.parent / "mine.yaml"
    recipe.write_text(f"base: {tiny}\ndata: {{train: ['{rows_file}']}}\nadapter: {{dropout: 0.0}}\n", encoding="utf-8")
    options = ["--set", "schedule.max_steps=3", "--set", "schedule.batch_rows=8", "--set", "schedule.micro_rows=4"]
    command = [sys.executable, "-m", "cvlib", "train", str(recipe), *options, "-o", str(folder), "--json"]
    return folder, subprocess.run(command, capture_output=True, text=True)


# the whole way


def test_train_as_a_program_sees_it(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["folder"], found["steps"]) == (str(folder), 3)
    assert found["adapter_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert "Warning" not in done.stderr
    assert "kernels" not in done.stderr


def test_evaluate(trained, rows_file, run):
    folder, _ = trained
    code, out, _ = run("evaluate", "--adapter", folder, "--rows", rows_file, "--limit", 3, "--answers", 2, "--json")
    assert code == 0
    (found,) = json.loads(out)["sets"]
    assert found["file"] == str(rows_file)
    assert found["rows"] == 3
    assert found["low"] <= found["bits_per_byte"] <= found["high"]
    assert 0 <= found["han_share"] <= 1
    assert len(found["said"]) == 2
    code, out, _ = run("evaluate", "--adapter", folder, "--rows", rows_file, "--limit", 3)
    assert re.search(rf"{rows_file} +3 +{found['bits_per_byte']:.3f} \[\S+ \S+\]$", out.strip())
    code, out, _ = run("evaluate", "--adapter", folder, "--rows", rows_file, "--limit", 3, "--answers", 2)
    for question, answer in found["said"]:
        assert f"\n\n> {question}\n{answer}" in out
    assert re.search(rf"{rows_file} +3 +{found['bits_per_byte']:.3f} \[", out)


def test_chat(trained, run, monkeypatch):
    folder, _ = trained
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n/exit\n"))
    code, out, err = run("chat", "--adapter", folder, "--set", "max_new_tokens=3", "--json")
    assert code == 0
    turns = json.loads(out)["messages"]  # the prompt and the transcript went to standard error
    assert [turn["role"] for turn in turns] in (["user", "assistant"], [])  # a random model may say nothing at all
    assert "/help" in err
    assert "> " in err
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    code, out, err = run("chat", "--adapter", folder, "--set", "max_new_tokens=3")
    assert code == 0
    assert "> " in out


def test_export(trained, run, refused, tmp_path):
    folder, _ = trained
    code, out, _ = run("export", "--adapter", folder, "--to", "hf", "-o", tmp_path / "merged", "--json")
    assert code == 0
    assert json.loads(out)["folder"] == str(tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").is_file()
    refused(["export", "--adapter", folder, "--to", "hf", "-o", tmp_path / "merged"], "exists already", "--force")
    code, out, _ = run("export", "--adapter", folder, "--to", "gguf", "-o", tmp_path / "deep/zh.gguf")
    assert code == 0
    assert "zh.gguf: " in out
    assert (tmp_path / "deep/zh.gguf").read_bytes()[:4] == b"GGUF"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["zh.gguf"]
    refused(["export", "--to", "hf", "-o", tmp_path / "none"], "nothing to export; name a model, or --adapter DIR")
    packed = ["export", "--adapter", folder, "--to", "hf", "--quant", "q8_0", "-o", tmp_path / "none"]
    refused(packed, "--quant q8_0 is a GGUF format; leave it out, or choose --to gguf")
    (tmp_path / "file").write_text("no folder")
    below = ["export", "--adapter", folder, "--to", "hf", "-o", tmp_path / "file" / "none"]
    refused(below, f"{tmp_path / 'file'}: File exists; name another place")


def test_a_reader_who_has_enough_is_no_error():
    listing = subprocess.Popen(
        [sys.executable, "-m", "cvlib", "assets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    listing.stdout.close()  # as `| head` does
    assert (listing.stderr.read(), listing.wait()) == ("", 0)


def test_doctor_and_assets(run):
    code, out, _ = run("doctor", "--json")
    assert code == 0
    assert {"name", "value", "mend"} == set(json.loads(out)[0])
    code, out, _ = run("doctor")
    assert "processor" in out
    code, out, _ = run("assets", "--json")
    assert {"smollm2-135m", "china-law"} <= {row["name"] for row in json.loads(out)}
    code, out, _ = run("assets", "smollm2-135m", "--json")
    assert json.loads(out)["smollm2-135m"].endswith(".gguf")
    code, out, _ = run("assets")
    assert re.search(r"✓ smollm2-135m .* MB +Apache-2.0", out)


# rows that cannot be used


@pytest.mark.parametrize(
    ("content", "place", "words"),
    [
        (GOOD * 16 + '{"instruction": "x", "output":\n' + GOOD, ":17: ", "not valid JSON"),
        (GOOD * 16 + '{"input": "x", "output": "y"}\n', ":17: ", 'no key "instruction"'),
        (GOOD * 16 + '{"instruction": "x", "output": ""}\n', ":17: ", "the assistant's text is empty"),
        ("", ": ", "no rows in this file; give at least one"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_bad_rows(command, content, place, words, refused, tmp_path, tiny):
    file = tmp_path / "rows.jsonl"
    file.write_text(content.replace("%d", "1"), encoding="utf-8")
    if command == "train":
        arguments = [
            "train",
            "smollm2-cpu",
            "--set",
            f"base={tiny}",
            "--set",
            f"data.train=[{file}]",
            "-o",
            tmp_path / "run",
        ]
    else:
        arguments = ["evaluate", "--rows", file]
    refused(arguments, f"cvlib {command}: {file}{place}", words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_files_that_are_not_there(refused, tmp_path):
    refused(["evaluate", "--rows", tmp_path / "none.jsonl"], tmp_path / "none.jsonl", "no such file")
    refused(["train", "nosuch"], "recipe 'nosuch' not found; choose one of", "smollm2-cpu")
    refused(["train", tmp_path / "none.yaml"], "none.yaml", "not found")
    refused(["chat", "--adapter", tmp_path / "none"], "no such folder", "cvlib train")


def test_rows_with_nothing_held_out(refused, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"instruction": "请介绍一下北京。", "output": "好"}', encoding="utf-8"
    )  # not held out, see test_messages
    refused(["evaluate", "--rows", file], file, "no row is held out")


# recipes and adapters that cannot be used


def test_a_recipe_with_an_unknown_key(refused, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("schedule:\n  learnin_rate: 1e-3\n")
    refused(["train", file], "mine.yaml", "'schedule.learnin_rate'", "did you mean 'schedule.learning_rate'")
    file.write_text("base: x\nadapter: {r: 8\n")
    refused(["train", file], f"{file}:3", "not valid YAML")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.r=zero", "adapter.r is 'zero'; write a whole number"),
        ("adaptr.r=1", "unknown key 'adaptr'; did you mean 'adapter' or 'data'?"),
        ("adapter.r", "write key=value"),
        ("adapter.targets=[q_proj", "not valid YAML"),
        ("bits=7", "bits is 7; choose among 16, 8, 4"),
    ],
)
def test_a_value_that_cannot_be_meant(override, words, refused):
    refused(["train", "smollm2-cpu", "--set", override], words)


def test_a_decoding_that_cannot_be_meant(refused):
    refused(["chat", "--set", "temperature=-1"], "temperature is -1.0; choose 0 or more")
    refused(["chat", "--set", "heat=1"], "unknown key 'heat'; choose one of temperature, top_k")
    refused(["chat", "--set", "temprature=1"], "temprature=1: unknown key 'temprature'; did you mean 'temperature'?")


def test_an_adapter_of_another_base(trained, refused):
    folder, _ = trained
    for command in ("chat", "evaluate"):
        base = recipes.load(folder / "recipe.yaml").base
        refused([command, "smollm2-135m", "--adapter", folder], folder, base, "'smollm2-135m'", "load it over")


def test_a_run_folder_that_exists(trained, refused):
    folder, _ = trained
    refused(["train", "smollm2-cpu", "-o", folder], f"{folder}: exists already; name another folder or remove it")


def test_places_without_a_name(refused):
    """An empty one is what a shell makes of a variable that is not set."""
    for place in ("", ".", "/", ".."):
        for option in ("-o", "--resume", "--init-adapter"):
            refused(["train", "smollm2-cpu", option, place], f"{place!r} has no name of its own")
        refused(["export", "smollm2-135m", "--to", "gguf", "-o", place], "has no name of its own")


def test_rows_where_a_recipe_belongs(refused, rows_file):
    refused(["train", rows_file], "rows are no recipe", f"--set 'data.train=[{rows_file}]'")
    refused(["train", "smollm2-cpu", "--set", f"data.train=[{rows_file.parent}]"], "this is a folder")


def test_a_reporter_and_a_grown_tokenizer_that_are_not_there(tiny, refused, rows_file, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {tiny}\ndata: {{train: ['{rows_file}']}}\n", encoding="utf-8")
    refused(["train", mine, "--set", "report_to=tensorbord"], "report_to is 'tensorbord'; did you mean 'tensorboard'")
    for tokenizer in ("nosuch", tmp_path):
        refused(["train", mine, "--set", f"growth.tokenizer={tokenizer}"], "no tokenizer there", "cvlib vocab extend")


def test_what_is_no_model(refused, rows_file):
    refused(["chat", rows_file], f"{rows_file}: a file; name a model's folder")
    refused(["chat", "mistral-v1-tokenizer"], "and no model; choose one of smollm2-135m")
    refused(["vocab", "fertility", "smollm2-135", "--text", rows_file], "did you mean 'smollm2-135m'")


def test_options_of_evaluate_that_would_do_nothing(tiny, refused, rows_file):
    refused(["evaluate", tiny, "--text", rows_file, "--answers", "2"], "--answers asks the questions of rows")
    refused(["evaluate", tiny, "--rows", rows_file, "--shots", "2"], "--shots belongs to an exam")
    refused(["evaluate", tiny, "--rows", rows_file, "--set", "top_k=1"], "ask for some with --answers N")
    answering = ["evaluate", tiny, "--rows", rows_file, "--answers", "1"]
    refused([*answering, "--set", "temprature=0"], "did you mean 'temperature'?")


def test_a_loss_that_rises_is_said(capsys):
    run = SimpleNamespace(folder="runs/a", rows=8, steps=[1, 2], losses=[2.4, 23.9], seconds=1.0, adapter_bytes=10**6)
    train.report(SimpleNamespace(json=False), run)
    run.losses = [2.4, 2.3]
    train.report(SimpleNamespace(json=False), run)
    risen, fallen = capsys.readouterr().out.split("2 steps over 8 rows")[1:]
    assert "the loss has not fallen" in risen
    assert "the loss has not fallen" not in fallen


def test_an_unknown_asset_and_base(refused):
    refused(["assets", "smollm"], "asset 'smollm' is unknown; did you mean 'smollm2-135m'?")
    refused(["chat", "smollm"], "base 'smollm' is not an asset", "org/name")


# options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "smollm2-cpu", "--bogus"], "--bogus is unknown; see cvlib train --help"),
        (["train", "smollm2-cpu", "--js"], "--js is unknown"),  # no shortened options
        (["train", "smollm2-cpu", "--adaptor", "a"], "--adaptor is unknown (did you mean --init-adapter?)"),
        (["train", "smollm2-cpu", "--max_steps=3"], "did you mean --set schedule.max_steps=VALUE?"),
        (["train", "smollm2-cpu", "twice"], "twice is unknown; see cvlib train --help"),
        (["chat", "--temperature", "0"], "did you mean --set temperature=VALUE?"),
        (["evaluate", "--limit", "-1"], "'-1' is not a whole number from 0"),
        (["evaluate", "--answers", "few"], "'few' is not a whole number from 0"),
        (["chat", "--bits", "5"], "choose from"),
        (["tran"], "invalid choice: 'tran'"),
        ([], "required: COMMAND"),
    ],
)
def test_options_that_do_not_exist(arguments, words, refused):
    refused(arguments, words, "--help")


def test_every_command_takes_json_and_explains_itself(run):
    for command in COMMANDS:
        code, out, _ = run(*command, "--help")
        assert code == 0
        assert "--json" in out


def test_the_examples_of_the_help_pages_are_commands(run):
    """Each can be parsed, and the asset or recipe it names exists."""
    pages = "\n".join(run(*command, "--help")[1] for command in [(), *COMMANDS])
    examples = re.findall(r"^(?:example:)? *(cvlib [a-z].*?)(?:   .*)?$", pages, re.MULTILINE)
    assert len(examples) > 20
    for example in examples:
        options = parser().parse_args(shlex.split(example)[1:])
        if "train" in example and options.name == "cvlib train" and options.recipe:
            recipes.load(options.recipe, options.set)
        if base := getattr(options, "base", None):
            assert base in assets.ASSETS


def test_the_mix_of_the_help_page_is_one(tmp_path):
    plan = tmp_path / "MIX.yaml"
    plan.write_text(data.MIX, encoding="utf-8")
    assert mixture.load(plan).rows == 2000


def test_help_for_train_lists_every_key_of_a_recipe(run):
    _, out, _ = run("train", "--help")
    for key in ("base=", "adapter.targets=", "schedule.learning_rate=", "decoding.top_p="):
        assert key in out
    assert "smollm2-cpu" in out


def test_a_bug_keeps_its_traceback(monkeypatch):
    """Only the reader's input is answered in one line."""
    monkeypatch.setattr(machine, "say", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["assets"])


def test_ctrl_c_is_no_traceback(monkeypatch, run):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "say", stopped)
    assert run("assets") == (130, "", "\ncvlib assets: stopped\n")


def test_an_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)
