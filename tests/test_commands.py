"""`cvlib vocab`, `cvlib data`, `cvlib memory`: the whole way, and one line for what cannot be used."""

import json

import pytest

BASE = "mistral-v1-tokenizer"
CHINESE = "上海的天气很好。\n我们学习中文，北京的天气也很好。\n" * 40


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(CHINESE, encoding="utf-8")
    return path


def test_vocab_train_merge_audit(run, text, tmp_path):
    extra, merged = tmp_path / "zh.model", tmp_path / "merged.model"
    code, out, _ = run("vocab", "train", text, "-o", extra, "--size", 280)
    assert (code, out) == (0, f"{extra}: 280 pieces\n")
    code, out, _ = run("vocab", "merge", BASE, extra, "-o", merged, "--scores", "zero", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["size"] == 32000 + report["added"]
    assert report["out"] == str(merged)
    code, out, _ = run("vocab", "audit", merged, "--base", BASE, "--text", text)
    assert code == 0
    assert f"{report['size']:,} pieces, {report['added']:,} added to {BASE}" in out
    again = json.loads(run("vocab", "audit", merged, "--base", BASE, "--text", text, "--json")[1])
    assert set(again["changed"]) == set(CHINESE.splitlines())  # every line is cut anew
    assert {name: again[name] for name in ("lost", "dead")} == {name: report[name] for name in ("lost", "dead")}


def test_vocab_extend_and_fertility(run, text, tmp_path):
    grown = tmp_path / "grown.model"
    code, out, _ = run("vocab", "extend", BASE, text, "-o", grown, "--pieces", 5, "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["added"], report["lost"], report["dead"], report["changed"]) == (5, {}, {}, {})
    code, out, _ = run("vocab", "fertility", BASE, grown, "--text", text, "--json")
    before, after = json.loads(out)
    assert code == 0
    assert before["characters"] == len(CHINESE)
    assert after["tokens_per_chinese_character"] < before["tokens_per_chinese_character"]
    _, out, _ = run("vocab", "fertility", BASE, grown, "--text", text)
    assert f"{before['tokens']:,}" in out


def test_vocab_extend_by_packaged_text(run, text, tmp_path, monkeypatch):
    from cvlib import extension

    monkeypatch.setattr(extension, "packaged_corpus", lambda folder: extension.Corpus([text], [], {}))
    code, out, _ = run("vocab", "extend", BASE, "--packaged", "--pieces", 3, "-o", tmp_path / "grown.model")
    assert code == 0
    assert "32,003 pieces, 3 of them new" in out


def test_vocab_refusals(refused, text, tmp_path):
    out = tmp_path / "out.model"
    refused(["vocab", "extend", BASE, "--pieces", 5, "-o", out], "no text to learn from", "--packaged")
    refused(["vocab", "extend", BASE, text, "--pieces", 0, "-o", out], "'0' is not a whole number from 1")
    refused(["vocab", "extend", BASE, text, "--pieces", 5, "-o", text], f"{text}: exists already")
    refused(["vocab", "merge", BASE, text, "-o", out], f"{text}: ")
    refused(["vocab", "audit", text, "--base", BASE], f"{text}: ")
    refused(["vocab", "fertility", BASE, "--text", tmp_path / "none.txt"], "none.txt")
    (gbk := tmp_path / "gbk.txt").write_bytes("北京".encode("gbk"))
    refused(["vocab", "train", gbk, "-o", out, "--size", 300], f"{gbk}:1: GBK, not UTF-8")
    assert not out.exists()


def test_data_check_goes_on_to_the_end(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    good = '{"instruction": "你好吗？", "output": "我很好，谢谢。"}'
    rows.write_text(f"{good}\n{{broken\n{good}\n", encoding="utf-8")
    code, out, _ = run("data", "check", rows)
    assert code == 1
    assert f"{rows}: 2 rows, 1 broken" in out
    assert f"{rows}:2" in out
    assert "duplicates: 1" in out
    code, out, _ = run("data", "check", rows, "--json")
    assert code == 1
    assert json.loads(out)[0]["rows"] == 2


def test_data_check_refuses_what_has_no_tokenizer(refused, rows_file, tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    refused(["data", "check", rows_file, "--tokenizer", tmp_path], f"--tokenizer {tmp_path}: cannot be read")
    refused(["data", "check", rows_file, "--tokenizer", "none"], "base 'none' is not an asset")


def test_data_mix(run, refused, tmp_path):
    rows, plan, out = tmp_path / "rows.jsonl", tmp_path / "mix.yaml", tmp_path / "mix.jsonl"
    lines = [json.dumps({"instruction": f"第{n}题：{n}加一等于几？", "output": f"{n + 1}"}) for n in range(30)]
    rows.write_text("\n".join([*lines, "{broken"]), encoding="utf-8")
    plan.write_text(f"sources: {{'{rows}': 1}}\nrows: 5\n", encoding="utf-8")
    code, printed, _ = run("data", "mix", plan, "-o", out)
    assert code == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) == 5
    assert f"{out}: 5 rows" in printed
    assert f"{rows}:31" in printed
    refused(["data", "mix", plan, "-o", out], f"{out}: exists already", "--force")
    code, printed, _ = run("data", "mix", plan, "-o", out, "--force", "--json")
    assert code == 0
    assert json.loads(printed)[0]["written"] == 5


def test_memory(run):
    code, out, _ = run("memory", "smollm2-cpu", "--card", "t4")
    assert code == 0
    assert "16.0 GB" in out
    code, out, _ = run("memory", "smollm2-cpu", "--card", "1", "--json")
    found = json.loads(out)
    assert code == 1
    assert not found["fits"]
    assert found["peak"] == sum(part["bytes"] for part in found["parts"] if part["when"] in ("always", found["moment"]))
    assert "--set" in found["verdict"]


def test_the_bar_and_the_line_have_one_scale(run):
    _, out, _ = run("memory", "smollm2-cpu", "--card", "8")
    needs, card = (line.split()[1] for line in out.splitlines() if line.startswith(("needs  ", "card ")))
    found = json.loads(run("memory", "smollm2-cpu", "--card", "8", "--json")[1])
    assert len(card) == 60
    assert abs(len(needs) - 60 * found["peak"] / 8e9) <= 1


def test_memory_refusals(refused):
    for wrong in ("-3", "3060"):  # a card's name is no number of GB
        refused(
            ["memory", "smollm2-cpu", "--card", wrong], f"'{wrong}' is neither GB, above 0 and up to 1000", "--help"
        )
    refused(["memory", "none"], "recipe 'none' not found")
    refused(["memory", "smollm2-cpu", "--set", "base=unknown/model"], "no shape known for base 'unknown/model'")
