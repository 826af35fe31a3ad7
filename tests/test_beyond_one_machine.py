"""`benchmarks/beyond_one_machine.py`: datatrove, on our shingles, finds the clusters that `cvlib.duplicates` finds."""

import importlib.util
import json
import random
import struct

import pytest

from cvlib import ROOT, duplicates, messages

pytest.importorskip("datatrove", reason="datatrove is not installed: pip install datatrove")


@pytest.fixture
def parts(tmp_path):
    """Three files of rows, a third of them near copies of earlier ones, some in another file, one too short."""
    chance, made = random.Random(0), []
    for place in range(240):
        text = "".join(chr(chance.randrange(0x4E00, 0x5E00)) for _ in range(chance.randrange(40, 120)))
        if place % 3 == 2:
            text = chance.choice(made)[: -chance.randrange(1, 4)]
        made.append(text)
    chance.shuffle(made)
    files = []
    for number in range(3):
        rows = [{"question": text[:30], "answer": text[30:]} for text in made[number::3]] + [
            {"question": "早", "answer": "好"}
        ]
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return files


def clusters_of(folder, parts):
    """datatrove's cluster of each row that has one: (part, row) → number."""
    found = {}
    for part in range(parts):
        data = (folder / f"{part:06d}.clusters").read_bytes()
        found |= {(part, row): cluster for row, cluster in struct.iter_unpack("<II", data)}
    return found


def test_the_same_clusters(parts, tmp_path):
    spec = importlib.util.spec_from_file_location("beyond_one_machine", ROOT / "benchmarks/beyond_one_machine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.pipeline(parts, tmp_path / "out", workers=1).run()
    theirs = clusters_of(tmp_path / "out/clusters", len(parts))

    rows = [(part, place) for part, file in enumerate(parts) for place in range(len(messages.read(file)))]
    seen = duplicates.Fingerprints()
    for file in parts:
        seen.add([duplicates.row_text(row) for row in messages.read(file)])
    first = dict(zip(rows, seen.first()[1].tolist(), strict=True))
    short = {row for row in rows if row[1] == 80}  # exact duplicates without a shingle are ours alone
    for one in set(rows) - short:
        for other in set(rows) - short:
            together = one == other or (one in theirs and theirs.get(one) == theirs.get(other))
            assert together == (first[one] == first[other])
    kept = sum(len((tmp_path / f"out/rows/{part:05d}.jsonl").read_text().splitlines()) for part in range(3))
    assert kept == len({first[row] for row in set(rows) - short}) + len(short)
    assert kept < len(rows)
