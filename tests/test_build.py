"""`book/build.py`: every notebook is executed, in order, and what was executed is not lost."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import pytest

from cvlib import ROOT

sys.path.insert(0, str(ROOT / "book"))
import build


@pytest.fixture
def books(tmp_path, monkeypatch):
    """A book of two notebooks; each run of a notebook leaves a letter in `ran.txt`."""
    for name in ("notebooks", "book/solutions", "cvlib"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml", "CHANGELOG.md", "cvlib/code.py"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(build, "fetch", lambda: None)
    sphinx(monkeypatch, 0)
    monkeypatch.setattr(sys, "argv", ["build.py", "book"])
    notebook(tmp_path, "00-a", "a")
    notebook(tmp_path, "01-b", "b")
    return tmp_path


def sphinx(monkeypatch, code):
    """Let Jupyter Book end with `code`, unrun: it is tried on the real book."""
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=code))


def notebook(folder, name, letter, more=""):
    source = f"print({letter!r}, end='', file=open('../ran.txt', 'a'), flush=True){more}"
    cells = [nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell(f"print({letter!r} * 3)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"notebooks/{name}.ipynb")


def ran(folder):
    return (folder / "ran.txt").read_text()


def test_a_complete_book_begins_anew(books, capsys):
    assert (build.main(), build.main()) == (0, 0)
    assert ran(books) == "abab"
    executed = nbformat.read(books / "_build/source/notebooks/01-b.ipynb", as_version=4)
    assert executed.cells[1].outputs[0].text == "bbb\n"
    assert not nbformat.read(books / "notebooks/01-b.ipynb", as_version=4).cells[1].outputs
    assert "executed before" not in capsys.readouterr().out


def test_after_a_failure_it_goes_on_where_it_stopped(books, capsys):
    notebook(books, "01-b", "b", "; 1 / 0")
    assert build.main() == 1
    said = capsys.readouterr()
    assert "ZeroDivisionError" in said.err
    assert said.err.endswith("`make book` goes on from here\n")
    notebook(books, "01-b", "b")
    assert build.main() == 0
    assert ran(books) == "abb"
    assert "1 of 2 notebooks were executed before and have not changed" in capsys.readouterr().out


def test_pages_that_fail_cost_no_notebook(books, monkeypatch):
    sphinx(monkeypatch, 1)
    assert build.main() == 1
    sphinx(monkeypatch, 0)
    assert build.main() == 0
    assert ran(books) == "ab"


def test_a_change_of_the_package_executes_everything_again(books):
    notebook(books, "01-b", "b", "; 1 / 0")
    build.main()
    (books / "cvlib/code.py").write_text("1")
    notebook(books, "01-b", "b")
    assert build.main() == 0
    assert ran(books) == "abab"


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import build
build.ROOT = Path(sys.argv.pop(1))
build.BUILD, build.fetch = build.ROOT / "_build", lambda: None
sys.exit(build.main())
"""


def test_ctrl_c_is_one_line_and_nothing_is_lost(books):
    """A real one, in the middle of a cell: nbclient would take it for the death of its kernel."""
    notebook(books, "01-b", "b", "; import time; time.sleep(600)")
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "book"), str(books), "book"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 120
    while not ((books / "ran.txt").is_file() and ran(books) == "ab") and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "\nstopped; `make book` goes on from here\n"
    assert process.returncode == 130
    notebook(books, "01-b", "b")
    assert build.main() == 0
    assert ran(books) == "abb"
