"""Results of studies as files: what was measured, on what machine, when, from which commit.

A study is a list of rows, one per arm and seed. `save` rewrites the whole file beside itself and renames it, so that a
study can be killed and resumed: `load` gives back the rows there are, and the study skips the arms it finds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom: intervals over a handful of seeds.
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def machine() -> str:
    """Processor, cores and accelerator, as a reader would want to know them."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    native = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {native} native bfloat16"


def commit() -> str:
    """The commit the code was at, with + if it was changed since."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    return described.stdout.strip() or "unknown"


def load(name: str) -> list[dict]:
    """Rows measured so far; none if the study has not run ("not measured")."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def save(name: str, rows: list[dict], **about) -> Path:
    """Write all rows of a study with machine, date and commit, beside the old file and over it."""
    path = RESULTS / f"{name}.json"
    today = datetime.date.today().isoformat()
    data = {"study": name, "machine": machine(), "date": today, "commit": commit(), **about, "rows": rows}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def options(about: str) -> argparse.Namespace:
    """The command line of a study that trains: `about` is its docstring, `minutes` and `budget` are read off."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no arm after this many minutes")
    parser.add_argument("--budget", choices=("smoke", "full"), default="full", help="smoke: one short arm, not kept")
    return parser.parse_args()


def over_seeds(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval over seeds.

    >>> [round(x, 2) for x in over_seeds([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, mean, mean
    half = T_QUANTILE[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half
