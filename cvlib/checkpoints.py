"""What a run leaves on its way: a line for every step, checkpoints to go on from, and a folder that says how far it is.

A run works in `OUT.unfinished` and is renamed to `OUT` when it is complete, so nothing unfinished looks finished, and
what was interrupted is found beside the place where it should have been. Inside lie

* `recipe.yaml` and `run.json`: what was begun, on which data and how many processes. Going on with anything else would
  follow the old plan with the new rows (trap 11), and is refused.
* `metrics.jsonl`: a line for every optimiser step; going on cuts it back to the checkpoint it goes on from.
* `checkpoint-N/`: adapter, optimiser, schedule, random numbers and place in the data after step N. Trainer writes these
  files one by one, in place. So a checkpoint counts only when it holds our own mark, which is written last, after
  everything before it has reached the disk: a process may die at any moment. The mark holds the files' sizes, so that a
  checkpoint damaged since is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout

from cvlib import InputError, recipes
from cvlib.batching import Example
from cvlib.recipes import Recipe

MARK = "complete"
SUFFIX = ".unfinished"


def unfinished(out: str | Path) -> Path:
    """Where the run `out` works until it is complete; either name may be given.

    >>> str(unfinished("runs/a")), str(unfinished("runs/a.unfinished"))
    ('runs/a.unfinished', 'runs/a.unfinished')
    """
    out = Path(out)
    return out if out.name.endswith(SUFFIX) else out.with_name(out.name + SUFFIX)


def finished(out: str | Path) -> Path:
    """Where the run will be when it is complete; either name may be given."""
    out = Path(out)
    return out.with_name(out.name.removesuffix(SUFFIX))


def clear(out: str | Path) -> None:
    """Remove a run, complete or interrupted, if there is one: a chapter begins anew each time it is run."""
    for folder in (finished(out), unfinished(out)):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Let no other process train the same run; the system lifts the lock when a process ends, however it ends.

    Raises:
        InputError: another process is training it.
    """
    if not is_first():
        yield
        return
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Path(lock.lock_file).touch()  # FileLock would wait for a place where nothing can be written
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{unfinished(out)}: another process is training it; wait for its end or stop it") from None
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); name another place") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def refuse_taken(out: Path) -> None:
    """Refuse a folder that exists, or that an interrupted run still wants."""
    if out.exists():
        raise InputError(f"{out}: exists already; name another folder or remove it first")
    if unfinished(out).exists():
        raise InputError(
            f"{unfinished(out)}: an interrupted run; go on with cvlib train --resume {out}, or remove it first"
        )


def begun(run: str | Path) -> Recipe:
    """The recipe of an interrupted run.

    Raises:
        InputError: no such run, or one that is complete.
    """
    work, out = unfinished(run), finished(run)
    if (out / "adapter_config.json").is_file() and not work.exists():
        raise InputError(f"{out}: this run is complete; start a new one from it with --init-adapter {out}")
    if not (work / "run.json").is_file():
        raise InputError(f"{work}: no interrupted run; name the folder that `cvlib train` was writing")
    return recipes.load(work / "recipe.yaml")


def refuse_unfinished(init: str | Path) -> None:
    """Refuse to start a new schedule from a run that has not ended its own."""
    checkpoint = (Path(init) / MARK).exists()
    run = Path(init).resolve().parent if checkpoint else Path(init)
    if checkpoint or (unfinished(run).exists() and not finished(run).exists()) or run == unfinished(run):
        raise InputError(f"{init}: this run is not complete; go on with cvlib train --resume {finished(run)}")


def reopen(out: Path, recipe: Recipe) -> Path | None:
    """The newest complete checkpoint of an interrupted run, None if it had none yet; what is half written is removed.

    Raises:
        InputError: the recipe is not the one the run was begun with.
    """
    old, new = _flat(begun(out).as_dict()), _flat(recipe.as_dict())
    for key, value in old.items():
        if new[key] != value:
            raise InputError(
                f"{key} is {new[key]!r}, but {unfinished(out)} was begun with {value!r}; resume it as it was, without "
                f"RECIPE and --set, and then start anew from it with --init-adapter {out}"
            )
    work = unfinished(out)
    last = newest(work)
    if is_first():
        for folder in work.glob("checkpoint-*"):
            if folder not in complete(work):
                shutil.rmtree(folder)
        cut(work / "metrics.jsonl", after(last) if last else 0)
    return last


def _flat(values: dict, prefix: str = "") -> dict:
    """Nested keys with dots, as `--set` writes them.

    >>> _flat({"bits": 8, "data": {"train": []}})
    {'bits': 8, 'data.train': []}
    """
    pairs = (
        _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        for key, value in values.items()
    )
    return {key: value for pair in pairs for key, value in pair.items()}


def begin(out: Path, recipe: Recipe, about: dict) -> Path:
    """Make the folder of a new run, all at once; `about` is what must not change until it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    os.chmod(part, 0o755)
    write_recipe(recipe, part)
    (part / "run.json").write_text(json.dumps(about), encoding="utf-8")
    os.replace(part, unfinished(out))
    return unfinished(out)


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """The recipe as `recipe.yaml`, read again by chat, evaluation and a resumed run."""
    text = yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")


def origin(out: Path) -> str | None:
    """The adapter an interrupted run was started from, if any."""
    return json.loads((unfinished(out) / "run.json").read_text(encoding="utf-8"))["init"]


def refuse_changed(out: Path, about: dict) -> None:
    """Refuse to go on with other data, or on another number of processes, than the run was begun with."""
    old = json.loads((unfinished(out) / "run.json").read_text(encoding="utf-8"))
    if old["processes"] != about["processes"]:
        raise InputError(
            f"{unfinished(out)}: begun on {old['processes']} processes, now there are {about['processes']}; "
            "its steps would hold other rows: use as many as before"
        )
    if old["data"] != about["data"]:
        raise InputError(
            f"{unfinished(out)}: its rows have changed since it was begun; bring them back, and for the new ones start "
            "a new run from an adapter that is complete: --init-adapter"
        )


def fingerprint(examples: Iterable[Example]) -> str:
    """A short hash of all that is trained on, in its order."""
    found = hashlib.sha256()
    for example in examples:
        found.update(array("q", [len(example), *example.input_ids, *example.labels]).tobytes())
    return found.hexdigest()[:16]


def complete(work: Path) -> list[Path]:
    """The checkpoints that carry our mark and have kept their files' sizes since, oldest first."""
    marked = (path.parent for path in work.glob(f"checkpoint-*/{MARK}"))
    return sorted((folder for folder in marked if sizes(folder) == json.loads((folder / MARK).read_text())), key=after)


def sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file of a checkpoint, the mark aside."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != MARK and path.is_file()}


def newest(work: Path) -> Path | None:
    """The last checkpoint that carries our mark."""
    return next(reversed(complete(work)), None)


def after(checkpoint: Path) -> int:
    """The step a checkpoint was written after.

    >>> after(Path("checkpoint-50"))
    50
    """
    return int(checkpoint.name.partition("-")[2])


def cut(path: Path, last: int) -> list[dict]:
    """Keep the lines of `metrics.jsonl` up to a step, and return them; a line may be half written."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if line.endswith("}") and (row := json.loads(line))["step"] <= last:
            kept.append(row)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(part, path)
    return kept


def finish(out: Path) -> None:
    """The run is complete: drop what was only needed to go on, and give the folder its name."""
    work = unfinished(out)
    for folder in work.glob("checkpoint-*"):
        shutil.rmtree(folder)
    (work / "run.json").unlink()
    os.replace(work, out)


def abandon(out: Path) -> None:
    """A run was stopped: keep its folder if there is something to go on from, else leave nothing behind."""
    if is_first() and not newest(unfinished(out)):
        shutil.rmtree(unfinished(out), ignore_errors=True)


def processes() -> int:
    """How many processes train together, as `torchrun` and `accelerate launch` tell each of them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return int(os.environ.get("RANK", 0)) == 0


def wait() -> None:
    """Go on when every process is here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def mark(folder: Path) -> None:
    """Put our mark on a checkpoint, after all of it has reached the disk; then the oldest may go, two stay."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
    found = json.dumps(sizes(folder))
    part = folder / f"{MARK}.part"
    part.write_text(found, encoding="utf-8")
    sync(part)
    os.replace(part, folder / MARK)
    sync(folder)
    for old in complete(folder.parent)[:-2]:
        (old / MARK).unlink()
        shutil.rmtree(old)


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, has reached the disk."""
    if os.name == "nt":  # Windows knows no such wait for a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
