"""Many sources in, one file to train on out, and an account of every row.

A mix is planned in a few lines of YAML; `cvlib data mix --help` shows one.

Every row that is read meets exactly one fate, the first of these that applies: *invalid*; *held out*, by the hash that
also decides it in training; *contaminated*, giving away a text of `held_out`; *duplicate*; *near duplicate*; and of
the rows left, *kept* or *unsampled*. The fates of a source add up to the rows read; copies are counted apart.

A source of weight w with n rows left gets a share p ∝ w · n^(1/T) of the mix. At temperature T = 1 every row is as
likely as any other of its weight; at T = ∞ (`.inf`) the weights alone are the shares.

Nothing depends on a generator's state: which rows are taken, and in which order, is a sort by a hash of seed and row.
So every process that computes an order computes the same one (trap 12), today and on another machine.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import compress, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cvlib import InputError, sources
from cvlib.contamination import Reference, reference
from cvlib.duplicates import Fingerprints, fmix64, row_text
from cvlib.messages import Conversation, held_out
from cvlib.recipes import need, read_yaml
from cvlib.show import Table

FATES = ("invalid", "held out", "contaminated", "duplicate", "near duplicate", "unsampled", "kept")
BATCH = 256  # rows fingerprinted at once
COMPLAINTS = 10  # reasons kept for a source's invalid rows


@dataclass
class Plan:
    """What to mix: the keys of a MIX.yaml."""

    sources: dict[str, float]
    held_out: list[str] = field(default_factory=list)
    rows: int = 0
    temperature: float = 1.0
    seed: int = 42

    def __post_init__(self):
        right = isinstance(self.sources, dict) and self.sources
        need(bool(right), "sources", self.sources, "write one `file or source: weight` a line")
        for name, weight in self.sources.items():
            need(isinstance(name, str), "sources", name, "write the name of a file or source")
            real = _number(weight) and 0 < weight < np.inf
            need(real, f"sources: {name}", weight, "write a weight above 0, such as 1")
        names = isinstance(self.held_out, list) and all(isinstance(name, str) for name in self.held_out)
        need(names, "held_out", self.held_out, "write a list of files, such as [a.jsonl]")
        need(type(self.rows) is int and 0 <= self.rows <= 10**8, "rows", self.rows, "choose 0 (all) up to 100000000")
        need(_number(self.temperature) and self.temperature > 0, "temperature", self.temperature, "choose above 0")
        need(isinstance(self.seed, int) and 0 <= self.seed < 2**32, "seed", self.seed, "choose 0 up to 2^32 - 1")


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def load(path: str | Path) -> Plan:
    """Read a MIX.yaml.

    Raises:
        InputError: no such file, broken YAML, an unknown key or an impossible value.
    """
    path = Path(path)
    try:
        values = read_yaml(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a MIX.yaml") from None
    known = [item.name for item in fields(Plan)]
    if not isinstance(values, dict) or "sources" not in values or set(values) - set(known):
        found = list(values) if isinstance(values, dict) else type(values).__name__
        raise InputError(f"{path}: found {found}; write `sources` and, if needed, {', '.join(known[1:])}")
    try:
        return Plan(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


@dataclass
class Tally:
    """What became of the rows of one source; `complaints` holds the first reasons why rows were invalid."""

    name: str
    read: int = 0
    fates: Counter = field(default_factory=Counter)
    copies: int = 0
    complaints: list[str] = field(default_factory=list)

    @property
    def written(self) -> int:
        """Rows of the mix that come from this source."""
        return self.fates["kept"] + self.copies


def shares(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[float]:
    """The share of each source in the mix, p ∝ w · n^(1/T); an empty source gets none.

    >>> shares([900, 100], [1, 1], temperature=1)
    [0.9, 0.1]
    >>> shares([900, 100], [1, 1], temperature=2)
    [0.75, 0.25]
    >>> shares([900, 100], [3, 1], temperature=float("inf"))
    [0.75, 0.25]
    """
    parts = [w * n ** (1 / temperature) if n else 0.0 for n, w in zip(sizes, weights, strict=True)]
    return [part / (sum(parts) or 1) for part in parts]


def allot(rows: int, parts: Sequence[float]) -> list[int]:
    """Whole rows for each share, adding up to `rows`: the largest remainders are rounded up.

    >>> allot(10, [0.55, 0.25, 0.2])
    [6, 2, 2]
    """
    exact = [rows * part for part in parts]
    counts = [int(value) for value in exact]
    for place in sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])[: rows - sum(counts)]:
        counts[place] += 1
    return counts


def order(keys: np.ndarray, seed: int, turn: int = 0) -> np.ndarray:
    """A shuffled order of rows from their 64-bit keys: the same on every rank, another for every seed and turn.

    >>> keys = np.arange(1, 6, dtype=np.uint64)
    >>> order(keys, seed=42).tolist(), order(keys, seed=43).tolist()
    ([3, 1, 4, 2, 0], [2, 0, 3, 4, 1])
    """
    salt = np.atleast_1d(np.asarray(turn, dtype=np.uint64)) << 32
    return np.argsort(fmix64(keys ^ fmix64(salt + np.uint64(seed + 1))), kind="stable")


def mix(plan: Plan, out: str | Path, force: bool = False) -> list[Tally]:
    """Write a mix as JSON lines and return what became of every source's rows.

    Rows wait in a nameless file beside `out`; only their hashes stay in memory. `out` appears complete or not at all.

    Raises:
        InputError: `out` exists and not `force`, a source or held-out file that cannot be read, no row is left, or
            `out` cannot be written.
    """
    out, files = Path(out), [sources.file(name) for name in plan.sources]
    try:
        if out.is_dir():
            raise InputError(f"{out}: this is a folder; name a file for the mix")
        if out.exists() and not force:
            raise InputError(f"{out}: exists already; name another file, or replace it with --force")
        if out.exists() and any(file and file.samefile(out) for file in files):
            raise InputError(f"{out}: is one of the sources; name another file for the mix")
        forbidden = reference(plan.held_out)
        there = next(path for path in out.absolute().parents if path.exists())
        with tempfile.TemporaryFile(dir=there) as spool:
            return _mixed(plan, Pool(spool), forbidden, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); make room, or name another file") from None


def _mixed(plan: Plan, pool: Pool, forbidden: Reference, out: Path) -> list[Tally]:
    tallies = [pool.gather(place, name, forbidden) for place, name in enumerate(plan.sources)]
    chosen = pool.sample(plan, tallies)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        part = Path(folder) / "mix"
        with part.open("wb") as sink:
            pool.write(chosen, sink)
        os.replace(part, out)
    return tallies


class Pool:
    """Rows that may be trained on: their text in a file; in arrays where each begins, its source and its hashes."""

    def __init__(self, spool: BinaryIO):
        self.spool, self.begins, self.source, self.prints = spool, array("Q", [0]), array("H"), Fingerprints()

    def gather(self, place: int, name: str, forbidden: Reference) -> Tally:
        """Read one source and set aside its rows that are neither invalid nor held out nor contaminated."""
        from tqdm import tqdm

        tally, scanned = Tally(name), (row for _, row in sources.scan(name))
        with tqdm(desc=f"reading {Path(name).name}", unit="row", leave=False, mininterval=1) as bar:
            while batch := list(islice(scanned, BATCH)):
                broken = [str(row) for row in batch if isinstance(row, InputError)]
                rows = [row for row in batch if not isinstance(row, InputError)]
                learnt = [row for row in rows if not held_out(row)]
                texts = list(map(row_text, learnt))
                found = forbidden.found_in(texts)
                clean = [not bad for bad in found]
                self._keep(list(compress(learnt, clean)), list(compress(texts, clean)), name, place)
                lost = (len(broken), len(rows) - len(learnt), sum(found))
                tally.fates.update(dict(zip(FATES[:3], lost, strict=True)))
                tally.complaints += broken[: COMPLAINTS - len(tally.complaints)]
                tally.read += len(batch)
                bar.update(len(batch))
        if not tally.read:
            raise InputError(f"{name}: no rows in this file; remove it from `sources`, or give it at least one row")
        return tally

    def _keep(self, rows: Sequence[Conversation], texts: Sequence[str], name: str, place: int) -> None:
        self.prints.add(texts)
        self.source.extend([place] * len(rows))
        for row in rows:
            line = json.dumps({"messages": [turn.row() for turn in row], "source": name}, ensure_ascii=False)
            self.begins.append(self.begins[-1] + self.spool.write(line.encode() + b"\n"))

    def sample(self, plan: Plan, tallies: Sequence[Tally]) -> np.ndarray:
        """Numbers of the rows to write, in the order of the mix; fills in the remaining fates."""
        same, first = self.prints.first()
        keys, source = (np.frombuffer(of, dtype=of.typecode) for of in (self.prints.keys, self.source))
        rows = np.arange(len(keys))
        pools = [np.flatnonzero((first == rows) & (source == place)) for place in range(len(tallies))]
        sizes = list(map(len, pools))
        if not any(sizes):
            raise InputError(f"no row is left of {sum(tally.read for tally in tallies)} read; see `cvlib data check`")
        counts = allot(plan.rows or sum(sizes), shares(sizes, list(plan.sources.values()), plan.temperature))
        taken, turns = [], []
        for place, (tally, pool, count) in enumerate(zip(tallies, pools, counts, strict=True)):
            turn, at = np.divmod(np.arange(count), max(1, len(pool)))  # the second time round every row is a copy
            taken.append(pool[order(keys[pool], plan.seed)][at])
            turns.append(turn)
            kept = min(count, len(pool))
            tally.copies = count - kept
            tally.fates["duplicate"] = int(((same != rows) & (source == place)).sum())
            tally.fates["near duplicate"] = int(((same == rows) & (first != rows) & (source == place)).sum())
            tally.fates["unsampled"], tally.fates["kept"] = len(pool) - kept, kept
        chosen, turn = np.concatenate(taken), np.concatenate(turns)
        return chosen[order(keys[chosen], plan.seed, turn + 1)]

    def write(self, chosen: np.ndarray, sink: BinaryIO) -> None:
        """Copy the chosen rows from the waiting file."""
        for number in chosen.tolist():
            self.spool.seek(self.begins[number])
            sink.write(self.spool.read(self.begins[number + 1] - self.begins[number]))


def table(tallies: Sequence[Tally]) -> Table:
    """The account of a mix: a line for each source and one for all, a column for each fate."""
    lines = [[t.name, t.read, *(t.fates[fate] for fate in FATES), t.copies, t.written] for t in tallies]
    total = ["all", *map(sum, list(zip(*lines, strict=True))[1:])]
    return Table(["source", "read", *FATES, "copies", "written"], [*lines, total])
