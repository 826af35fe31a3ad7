"""How much memory and time a mix of a million rows takes, beside datasketch's MinHash index.

The rows are synthetic: random Chinese text of 60 to 140 characters, a tenth of them near copies of an earlier row.
Every measurement runs in a process of its own, so that its peak is its own. datasketch gets fewer rows: its cost a
row is the same for any number, and a million would not fit.

    python benchmarks/bench_mixture.py                  # 1,000,000 rows; 4 minutes on two cores
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
from pathlib import Path

import study

from cvlib import duplicates, messages, mixture

PEER_ROWS = 10_000
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


def texts(path, rows):
    """The first rows of the file as they are compared."""
    with path.open(encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(rows), strict=False)]
    return [duplicates.row_text(messages.from_row(json.loads(line))) for line in lines]


def whole_mix(path, rows):
    """`cvlib data mix` from file to file."""
    before, started = peak(), time.perf_counter()
    (tally,) = mixture.mix(mixture.Plan({str(path): 1}), path.with_suffix(".out"))
    seconds = time.perf_counter() - started
    found = {fate: tally.fates[fate] for fate in mixture.FATES}
    return {"peak": peak(), "bytes_a_row": (peak() - before) / rows, "rows_a_second": rows / seconds, "fates": found}


def ours(path, rows):
    """Fingerprints and clusters alone."""
    made = texts(path, rows)
    before, started, seen = peak(), time.perf_counter(), duplicates.Fingerprints()
    for start in range(0, rows, mixture.BATCH):
        seen.add(made[start : start + mixture.BATCH])
    clusters = len(set(seen.first()[1].tolist()))
    seconds = time.perf_counter() - started
    return {"bytes_a_row": (peak() - before) / rows, "rows_a_second": rows / seconds, "clusters": clusters}


def datasketch(path, rows):
    """The same signatures' number of hashes and bands in datasketch, with its own hash of each shingle."""
    from datasketch import MinHash, MinHashLSH

    made = texts(path, rows)
    before, started = peak(), time.perf_counter()
    index = MinHashLSH(num_perm=112, params=(duplicates.BANDS, duplicates.PER_BAND))
    kept = 0
    for number, text in enumerate(made):
        sketch = MinHash(num_perm=112)
        ends = range(duplicates.SHINGLE, len(text) + 1)
        sketch.update_batch([text[end - duplicates.SHINGLE : end].encode() for end in ends])
        if not index.query(sketch):
            index.insert(number, sketch)
            kept += 1
    seconds = time.perf_counter() - started
    return {"bytes_a_row": (peak() - before) / rows, "rows_a_second": rows / seconds, "clusters": kept}


MEASUREMENTS = {"whole mix": whole_mix, "deduplication": ours, "datasketch": datasketch}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--one", nargs=2, metavar=("MEASUREMENT", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(MEASUREMENTS[options.one[0]](Path(options.one[1]), options.rows)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        synthesize(path, options.rows)
        for name in MEASUREMENTS:
            rows = options.rows if name == "whole mix" else min(options.rows, PEER_ROWS)
            command = [sys.executable, __file__, "--rows", str(rows), "--one", name, str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            results.append({"measurement": name, "rows": rows, **json.loads(done.stdout.splitlines()[-1])})
            print({key: round(value) if isinstance(value, float) else value for key, value in results[-1].items()})
    ratio = results[1]["rows_a_second"] / results[2]["rows_a_second"]
    print(f"deduplication runs at {ratio:.1f} times datasketch's rows a second")
    if options.rows == 1_000_000:
        study.save("bench-mixture", results, ratio_to_datasketch=round(ratio, 2))


if __name__ == "__main__":
    main()
