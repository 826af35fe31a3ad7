"""`cvlib.mixture`: every row accounted for, the same file every time, and nothing half written."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from cvlib import InputError, messages, mixture
from cvlib.mixture import FATES, Plan, allot, load, mix, order, shares


def texts(count, start=0):
    """Questions that are not held out, all unlike each other."""
    made, number = [], start
    while len(made) < count:
        question = f"第{number * number}个问题：" + "".join(
            chr(0x4E00 + (number * 7919 + k * k * 104729) % 20000) for k in range(40)
        )
        if not messages.held_out([messages.Message("user", question)]):
            made.append(question)
        number += 1
    return made


def write(path, questions):
    rows = [{"question": question, "answer": "答案是这个。"} for question in questions]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def written(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def two(tmp_path):
    """30 and 10 rows, three of them copies: one in its own file, two in the other's."""
    first, second = texts(30), texts(10, start=5000)
    first[29] = first[0]
    second[8:] = first[1:3]
    return write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)


def test_every_row_meets_one_fate_by_hand(tmp_path):
    ask = texts(8)
    held = next(q for q in map(str, range(1000, 9999)) if messages.held_out([messages.Message("user", q)]))
    near = ask[2][:-1] + "？"
    file = tmp_path / "rows.jsonl"
    write(file, [*ask[:6], held, ask[0], ask[1] + "　", near])
    file.write_text(file.read_text(encoding="utf-8") + '{"question": "没有答案"}\nnot json\n', encoding="utf-8")
    exam = tmp_path / "exam"
    exam.mkdir()
    (exam / "x.csv").write_text(
        f"id,question,A,B,C,D,answer,explanation\n0,{ask[5]},甲,答案是,丙,丁,B,\n", encoding="utf-8"
    )
    (tally,) = mix(Plan({str(file): 1}, held_out=[str(exam)], rows=4), tmp_path / "out.jsonl")
    assert dict(tally.fates) == dict(zip(FATES, (2, 1, 1, 2, 1, 1, 4), strict=True))
    assert (tally.read, tally.copies, tally.written) == (12, 0, 4)
    assert [f"{file}:11:" in tally.complaints[0], f"{file}:12:" in tally.complaints[1]] == [True, True]


@pytest.mark.parametrize(("rows", "temperature"), [(0, 1.0), (7, 1.0), (38, float("inf")), (300, 2.0)])
def test_the_account_adds_up_and_agrees_with_the_file(two, tmp_path, rows, temperature):
    out = tmp_path / "out.jsonl"
    tallies = mix(Plan(dict.fromkeys(two, 1), rows=rows, temperature=temperature), out)
    found = Counter(row["source"] for row in written(out))
    for tally in tallies:
        assert sum(tally.fates.values()) == tally.read
        assert found[tally.name] == tally.written == tally.fates["kept"] + tally.copies
    assert sum(found.values()) == (rows or 37)
    distinct = {row["messages"][0]["content"] for row in written(out)}
    assert len(distinct) == sum(tally.fates["kept"] for tally in tallies)
    assert tallies[1].fates["duplicate"] == 2  # the earlier source wins


def test_copies_are_spread_evenly(two, tmp_path):
    mix(Plan({two[1]: 1}, rows=25), tmp_path / "out.jsonl")
    count = Counter(row["messages"][0]["content"] for row in written(tmp_path / "out.jsonl"))
    assert sorted(count.values()) == [2] * 5 + [3] * 5


def test_what_is_written_reads_back_as_it_was(two, tmp_path):
    mix(Plan({two[1]: 1}), tmp_path / "out.jsonl")
    before = {str(row) for row in messages.read(two[1])}
    assert {str(row) for row in messages.read(tmp_path / "out.jsonl")} == before


def test_shares_and_whole_rows():
    assert shares([900, 100, 0], [1, 3, 5], 1) == pytest.approx([0.75, 0.25, 0])
    assert shares([900, 100, 0], [1, 1, 1], float("inf")) == pytest.approx([0.5, 0.5, 0])
    for rows in range(50):
        assert sum(allot(rows, [1 / 3, 1 / 3, 1 / 3])) == rows
    assert allot(7, [0.5, 0.3, 0.2]) == [4, 2, 1]


def test_order_is_a_shuffle_that_depends_on_rows_and_seed_only():
    keys = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    there = order(keys, seed=7)
    assert sorted(there) == list(range(1000))
    assert keys[there].tolist() == keys[::-1][order(keys[::-1], seed=7)].tolist()  # the same rows in another place
    assert abs(np.corrcoef(there, np.arange(1000))[0, 1]) < 0.15
    assert (there != order(keys, seed=8)).mean() > 0.9
    assert (there != order(keys, seed=7, turn=1)).mean() > 0.9


SCRIPT = "import sys; from cvlib.mixture import load, mix; mix(load(sys.argv[1]), sys.argv[2])"


def plan_file(tmp_path, *files):
    path = tmp_path / "mix.yaml"
    path.write_text("sources:\n" + "".join(f"  {file}: 1\n" for file in files) + "rows: 20\n", encoding="utf-8")
    return path


def test_every_process_writes_the_same_bytes(two, tmp_path):
    plan = plan_file(tmp_path, *two)
    for rank in "01":
        environment = {**os.environ, "PYTHONHASHSEED": rank, "RANK": rank, "WORLD_SIZE": "2"}
        subprocess.run([sys.executable, "-c", SCRIPT, plan, tmp_path / f"out{rank}"], env=environment, check=True)
    assert (tmp_path / "out0").read_bytes() == (tmp_path / "out1").read_bytes()
    mix(Plan(dict.fromkeys(two, 1), rows=20, seed=43), tmp_path / "other")
    assert (tmp_path / "other").read_bytes() != (tmp_path / "out0").read_bytes()


def test_an_existing_file_is_refused_and_with_force_replaced(two, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    with pytest.raises(InputError, match="exists already; name another file, or replace it with --force"):
        mix(Plan({two[0]: 1}), out)
    assert out.read_text() == "precious"
    mix(Plan({two[0]: 1}), out, force=True)
    assert len(written(out)) == 29


SLOW = """
import sys, time
from cvlib import mixture
kept = mixture.Pool._keep
mixture.Pool._keep = lambda *arguments: (kept(*arguments), print("half way", flush=True), time.sleep(60))
mixture.mix(mixture.load(sys.argv[1]), sys.argv[2])
"""


def test_a_killed_run_leaves_no_file(two, tmp_path):
    command = [sys.executable, "-c", SLOW, plan_file(tmp_path, *two), tmp_path / "out.jsonl"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "half way\n"
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "mix.yaml"]


def test_a_failing_run_leaves_nothing(two, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="no such file or source"):
        mix(Plan({two[0]: 1, str(tmp_path / "missing.jsonl"): 1}), tmp_path / "new/out.jsonl")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("folder", None, "folder: this is a folder; name the files in it"),
        ("empty.jsonl", b"", r"empty\.jsonl: no rows in this file; remove it"),
        (
            "wide.jsonl",
            '{"question": "在吗", "answer": "在"}'.encode("utf-16"),
            r"wide\.jsonl: neither UTF-8 nor GB18030",
        ),
        ("cut.json", b'[\n{"question": "a", "answer": "b"},\n', r"cut\.json:\d: not a valid JSON array"),
    ],
)
def test_a_source_that_cannot_be_used_is_named_and_nothing_is_left(two, tmp_path, name, content, complaint):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=complaint) as error:
        mix(Plan({two[0]: 1, str(path): 1}), tmp_path / "new/out.jsonl")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_cannot_be_written_is_named(two, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"out\.jsonl: cannot be written \(.*name another"):
        mix(Plan({two[0]: 1}), tmp_path / "file/out.jsonl")
    with pytest.raises(InputError, match="name too long"):
        mix(Plan({two[0]: 1}), tmp_path / ("x" * 300))
    with pytest.raises(InputError, match="this is a folder; name a file"):
        mix(Plan({two[0]: 1}), tmp_path, force=True)
    with pytest.raises(InputError, match="is one of the sources"):
        mix(Plan({two[0]: 1}), two[0], force=True)
    assert len(messages.read(two[0])) == 30


def test_odd_files_mix_as_they_should(two, tmp_path):
    """A byte-order mark, Windows line ends, GB18030, a broken line in the middle, and a row of 100,000 characters."""
    ask = texts(6, start=9000)
    rows = [json.dumps({"question": q, "answer": "好" * (100_000 if i == 4 else 2)}) for i, q in enumerate(ask)]
    rows = [json.dumps(json.loads(row), ensure_ascii=False) for row in rows]
    (tmp_path / "bom.jsonl").write_bytes("\r\n".join(rows[:2]).encode("utf-8-sig"))
    (tmp_path / "gb.jsonl").write_bytes("\n".join([rows[2], "{broken", rows[3]]).encode("gb18030"))
    (tmp_path / "long.jsonl").write_bytes("\n".join(rows[4:]).encode())
    names = [str(tmp_path / f"{name}.jsonl") for name in ("bom", "gb", "long")]
    tallies = mix(Plan(dict.fromkeys(names, 1)), tmp_path / "out.jsonl")
    assert [(tally.read, tally.fates["invalid"], tally.written) for tally in tallies] == [
        (2, 0, 2),
        (3, 1, 2),
        (2, 0, 2),
    ]
    assert "gb.jsonl:2: not valid JSON" in tallies[1].complaints[0]
    assert {row["messages"][0]["content"] for row in written(tmp_path / "out.jsonl")} == set(ask)
    assert max(len(row["messages"][1]["content"]) for row in written(tmp_path / "out.jsonl")) == 100_000


def test_nothing_left_to_mix_is_said(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "没有答案"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="no row is left of 1 read"):
        mix(Plan({str(file): 1}), tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rows: 5", "write `sources`"),
        ("sources: {a: 1}\nrow: 5", "found .'sources', 'row'."),
        ("sources: {}", "sources is {}; write one"),
        ("sources: {3: 1}", "sources is 3; write the name"),
        ("sources: {a: 1}\nheld_out: [3]", "held_out is .3.; write a list"),
        ("sources: {a: 0}", "sources: a is 0; write a weight above 0"),
        ("sources: {a: many}", "sources: a is 'many'"),
        ("sources: {a: 1}\ntemperature: 0", "temperature is 0"),
        ("sources: {a: 1}\nrows: -1", "rows is -1"),
        ("sources: {a: 1}\nseed: 1.5", "seed is 1.5"),
        ("sources: {a: 1}\nheld_out: b", "held_out is 'b'"),
        ("sources: [", "not valid YAML"),
    ],
)
def test_an_impossible_plan_is_refused_in_one_line(tmp_path, text, complaint):
    path = tmp_path / "mix.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=complaint) as error:
        load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml"):
        load(tmp_path / "none.yaml")


def test_the_stored_million_rows_kept_their_limits():
    """`benchmarks/bench_mixture.py` measured them: under 1 GB, at most 300 bytes a row, and every row accounted for."""
    stored = json.loads((mixture.sources.ROOT / "benchmarks/results/bench-mixture.json").read_text(encoding="utf-8"))
    by_name = {row["measurement"]: row for row in stored["rows"]}
    for name in ("whole mix", "deduplication"):
        assert by_name[name]["rows"] == 1_000_000
        assert by_name[name]["peak"] < 1e9
        assert by_name[name]["bytes_a_row"] <= 300
    assert sum(by_name["whole mix"]["fates"].values()) == 1_000_000
    assert stored["deduplication_to_datasketch"] > 1


def test_the_shipped_plan_mixes(tmp_path):
    tallies = mix(load(mixture.sources.ROOT / "data_samples/mix.yaml"), tmp_path / "out.jsonl")
    assert all(sum(tally.fates.values()) == tally.read for tally in tallies)
    assert "contaminated" in repr(mixture.table(tallies))
