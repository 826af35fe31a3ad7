"""How much memory and time a mix of a million rows takes, beside its lower limit and beside datasketch's MinHash index.

The rows are synthetic: random Chinese text of 60 to 140 characters, a tenth of them near copies of an earlier row.
Every measurement runs in a process of its own, so that its peak is its own; rows a second are rows for each second of
the processor's time, which a busy machine spoils less. The lower limit of a mix is to read every row and write it
again. datasketch gets fewer rows: its cost a row is the same for any number, and a million would take gigabytes.

    python benchmarks/bench_mixture.py                  # 1,000,000 rows; 5 minutes of one core
    python benchmarks/bench_mixture.py --rows 20000     # quick; prints, and keeps nothing
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import chain, islice
from pathlib import Path

import numpy as np
import study

from cvlib import duplicates, messages, mixture

PEER_ROWS = 10_000
PEAK, BYTES_A_ROW = 1e9, 300  # what a million rows may take
ALPHABET = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))


def synthesize(path, rows):
    """Write the synthetic rows."""
    chance, recent = random.Random(0), []
    with path.open("w", encoding="utf-8") as file:
        for place in range(rows):
            text = "".join(chance.choices(ALPHABET, k=chance.randrange(60, 140)))
            if place % 10 == 9:
                text = chance.choice(recent)[:-1] + "。"
            recent = [*recent[-99:], text]
            half = len(text) // 2
            file.write(json.dumps({"question": text[:half], "answer": text[half:]}, ensure_ascii=False) + "\n")


def peak():
    """The largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def batches(path, rows):
    """The first rows of the file as they are compared, a batch at a time."""
    with path.open(encoding="utf-8") as file:
        made = (duplicates.row_text(messages.from_row(json.loads(line))) for line in islice(file, rows))
        while batch := list(islice(made, mixture.BATCH)):
            yield batch


def whole_mix(path, rows):
    """`cvlib data mix` from file to file."""
    (tally,) = mixture.mix(mixture.Plan({str(path): 1}), path.with_suffix(".mixed"))
    assert tally.read == sum(tally.fates.values()) == rows
    return {"fates": {fate: tally.fates[fate] for fate in mixture.FATES}}


def limit(path, rows):
    """Read every row and write it again, and nothing else."""
    with path.open(encoding="utf-8") as file, path.with_suffix(".copied").open("w", encoding="utf-8") as copy:
        for line in islice(file, rows):
            copy.write(json.dumps(json.loads(line), ensure_ascii=False) + "\n")
    return {}


def deduplication(path, rows):
    """Rows read, their fingerprints and their clusters."""
    seen = duplicates.Fingerprints()
    for batch in batches(path, rows):
        seen.add(batch)
    return {"clusters": len(np.unique(seen.first()[1]))}


def datasketch(path, rows):
    """The same with datasketch: as many hashes and bands, its own hash of each shingle, a dictionary a band."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=112, params=(duplicates.BANDS, duplicates.PER_BAND))
    kept = 0
    for number, text in enumerate(chain.from_iterable(batches(path, rows))):
        sketch = MinHash(num_perm=112)
        ends = range(duplicates.SHINGLE, len(text) + 1)
        sketch.update_batch([text[end - duplicates.SHINGLE : end].encode() for end in ends])
        if not index.query(sketch):
            index.insert(number, sketch)
            kept += 1
    return {"clusters": kept}


def measured(task, path, rows):
    """One measurement: memory beyond what the process held before it, and rows for each second of processor time."""
    task(path, 1) if task is datasketch else None  # its imports are not its memory
    before, started = peak(), time.process_time()
    found = task(path, rows)
    seconds = time.process_time() - started
    return {"peak": peak(), "bytes_a_row": (peak() - before) / rows, "rows_a_second": rows / seconds, **found}


MEASUREMENTS = {
    "whole mix": whole_mix,
    "reading and writing alone": limit,
    "deduplication": deduplication,
    "datasketch": datasketch,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--one", nargs=2, metavar=("MEASUREMENT", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(MEASUREMENTS[options.one[0]], Path(options.one[1]), options.rows)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        synthesize(path, options.rows)
        for name in MEASUREMENTS:
            rows = min(options.rows, PEER_ROWS) if name == "datasketch" else options.rows
            command = [sys.executable, __file__, "--rows", str(rows), "--one", name, str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            results.append({"measurement": name, "rows": rows, **json.loads(done.stdout.splitlines()[-1])})
            print({key: round(value) if isinstance(value, float) else value for key, value in results[-1].items()})
    speed = {row["measurement"]: row["rows_a_second"] for row in results}
    ratios = {
        "mix_to_reading_and_writing": round(speed["whole mix"] / speed["reading and writing alone"], 3),
        "deduplication_to_datasketch": round(speed["deduplication"] / speed["datasketch"], 2),
    }
    print(ratios)
    if options.rows == 1_000_000:
        study.save("bench-mixture", results, **ratios)
        for row in results[:3]:
            assert row["peak"] < PEAK, f"{row['measurement']}: peak of {row['peak'] / 1e6:.0f} MB"
            assert row["bytes_a_row"] <= BYTES_A_ROW, f"{row['measurement']}: {row['bytes_a_row']:.0f} bytes a row"


if __name__ == "__main__":
    main()
