"""Run notebooks and build the book.

book       every notebook, in order, into _build/source (never over the committed files), then the pages; after a
           failure or Ctrl-C it goes on where it stopped, and begins anew once the book is complete
html       the pages, from the outputs that are stored in the notebooks
notebooks  notebooks in place, then normalised, so that a diff shows what changed: `notebooks 06 07` for some
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
QUIET = ["--IPKernelApp.log_level=ERROR"]  # Jupyter's own warnings are no news to a reader
CODE = ("cvlib", "data_samples", "benchmarks")  # what the outputs of a notebook depend on, besides itself


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("book", "html", "notebooks"))
    parser.add_argument("only", nargs="*", help="numbers of notebooks, such as 06")
    options = parser.parse_args()
    try:
        if options.what == "html":
            return pages({path: path for path in notebooks()})
        if options.what == "book":
            return book()
        chosen = [path for path in notebooks() if not options.only or path.name[:2] in options.only]
        return run({path: path for path in chosen})
    except KeyboardInterrupt:
        print("\nstopped" + "; `make book` goes on from here" * (options.what == "book"), file=sys.stderr)
        return 130


def book() -> int:
    """Execute a copy of every notebook and build the pages; copies of an unfinished book are kept until it is built."""
    executed = BUILD / "executed"
    fetch()
    stamp = digest(path for name in CODE for path in (ROOT / name).rglob("*"))
    copies = {path: executed / f"{path.stem}-{digest([path], stamp)}.ipynb" for path in notebooks()}
    if there := sum(copy.exists() for copy in copies.values()):
        print(f"{there} of {len(copies)} notebooks were executed before and have not changed")
    if code := run({path: copy for path, copy in copies.items() if not copy.exists()}):
        print("`make book` goes on from here", file=sys.stderr)
        return code
    if code := pages(copies):
        return code
    shutil.rmtree(executed)
    return 0


def digest(paths: Iterable[Path], salt: str = "") -> str:
    """A short hash of what files hold."""
    found = hashlib.sha256(salt.encode())
    for path in sorted(path for path in paths if path.is_file() and path.suffix != ".pyc"):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def notebooks() -> list[Path]:
    """The chapters in order, then the solutions."""
    return [*sorted((ROOT / "notebooks").glob("*.ipynb")), *sorted((ROOT / "book/solutions").glob("*.ipynb"))]


def fetch() -> None:
    """The running model, fetched and verified before the first notebook needs it."""
    from cvlib import assets, loading

    print(
        f"running model: {loading.resolve('smollm2-135m') and assets.fetch('smollm2-135m').name}, verified", flush=True
    )


def run(copies: dict[Path, Path]) -> int:
    """Execute notebooks one after the other, a line each, and write each copy; stops at the first that fails."""
    for number, (path, copy) in enumerate(copies.items(), 1):
        print(f"[{number}/{len(copies)}] {path.relative_to(ROOT)} …", end=" ", flush=True)
        started = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        where = {"metadata": {"path": str(path.parent)}}
        options = {"timeout": 1800, "extra_arguments": QUIET, "resources": where, "on_notebook_start": stoppable}
        client = NotebookClient(notebook, **options)
        try:
            client.execute()
        except KeyboardInterrupt:
            client.shutdown_kernel = "immediate"  # it is in the middle of a cell
            raise
        except CellExecutionError as error:
            print(f"failed\n{error}", file=sys.stderr)
            return 1
        except DeadKernelError:
            print("failed: its kernel died; is memory too small? (the chapter's first table says how much it takes)")
            return 1
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
        copy.parent.mkdir(parents=True, exist_ok=True)
        part = copy.with_suffix(".part")
        nbformat.write(normalised(notebook), part)
        part.replace(copy)
    return 0


def stoppable(notebook) -> None:
    """Let Ctrl-C stop this program: nbclient takes the signal for itself, and then wonders why its kernel has died."""
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)


def normalised(notebook):
    """The notebook without what changes from run to run: timings, progress bars, random cell ids."""
    seen: dict[str, int] = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    notebook.nbformat_minor = 5
    for cell in notebook.cells:
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = f"{digest}-{seen[digest]}"
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in ("tags", "mystnb")}
        if cell.cell_type == "code":
            cell.outputs = joined([output for output in cell.outputs if output.get("name") != "stderr"])
    return notebook


def joined(outputs: list) -> list:
    """Outputs with neighbouring pieces of printed text made one: where they were cut is chance."""
    whole: list = []
    for output in outputs:
        if whole and output.output_type == whole[-1].output_type == "stream":
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def pages(copies: dict[Path, Path]) -> int:
    """HTML of the book with these copies of its notebooks, warnings as errors, from an empty folder."""
    source = BUILD / "source"
    shutil.rmtree(source, ignore_errors=True)
    for name in ("book", "notebooks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("_config.yml", "_toc.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source)
    for path, copy in copies.items():
        shutil.copy(copy, source / path.relative_to(ROOT))
    for folder in ("html", ".doctrees", "_sphinx_design_static"):
        shutil.rmtree(BUILD / folder, ignore_errors=True)
    program = Path(sys.executable).parent / "jupyter-book"
    command = [str(program), "build", str(source), "--path-output", str(ROOT)]
    done = subprocess.run([*command, "-W", "--keep-going", "-q"])
    if done.returncode == 0:
        print(f"the book: {BUILD / 'html' / 'index.html'}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
