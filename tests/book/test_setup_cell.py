"""The setup cell that opens every notebook, run where Colab would run it.

A fresh virtual environment holds torch and numpy, as Colab's does, and no checkout. git is told to fetch the book's
address from a bare clone on this machine; pip fetches the rest from the network.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from cvlib import ROOT

ADDRESS = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
CELL = """
import json, os, sys
import google.colab
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
shell.run_cell(open(sys.argv[1]).read()).raise_error()
shell.run_cell("import torch, numpy, peft, os").raise_error()
found = {name: shell.user_ns[name].__version__ for name in ("torch", "numpy")}
found |= {"cvlib": shell.user_ns["cvlib"].__file__, "here": os.getcwd()}
print(json.dumps(found))
"""


def installed_with(*names):
    """Every distribution that these need, themselves included."""
    known = {}
    while names:
        name, *names = names
        if name not in known:
            known[name] = importlib.metadata.distribution(name)
            needs = [Requirement(text) for text in known[name].requires or ()]
            names += [n.name for n in needs if not n.marker or n.marker.evaluate({"extra": ""})]
    return known.values()


def link(distribution, site):
    """The files of an installed distribution, linked into another environment."""
    for first in {path.parts[0] for path in distribution.files} - {"..", "__pycache__"}:
        if not (site / first).exists():
            (site / first).symlink_to(distribution.locate_file(first))


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """Runs the setup cell of chapter 00 in a new process of an environment like Colab's; what it found there."""
    place = tmp_path_factory.mktemp("colab")
    venv.create(place / "env", with_pip=True)
    site = next((place / "env" / "lib").glob("python3*")) / "site-packages"
    for distribution in installed_with("torch", "numpy", "ipython"):
        link(distribution, site)
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").touch()
    subprocess.run(["git", "clone", "-q", "--bare", ROOT, place / "bare.git"], check=True)
    notebook = json.loads((ROOT / "notebooks" / "00-first-light.ipynb").read_text(encoding="utf-8"))
    source = next("".join(c["source"]) for c in notebook["cells"] if "setup" in c["metadata"].get("tags", ()))
    assert ADDRESS in source
    assert "/content/" in source
    (place / "content").mkdir()
    (place / "cell.py").write_text(source.replace("/content", str(place / "content")), encoding="utf-8")
    (place / "run.py").write_text(CELL, encoding="utf-8")
    fetched = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{place}/bare.git.insteadOf"}
    fetched |= {"GIT_CONFIG_VALUE_0": ADDRESS, "PATH": f"{place}/env/bin:{os.environ['PATH']}"}
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(**more):
        command = [place / "env" / "bin" / "python", place / "run.py", place / "cell.py"]
        done = subprocess.run(command, cwd=place, env=kept | fetched | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stdout

    return place, site, run


def test_the_setup_cell_brings_the_book_and_keeps_colabs_torch(colab):
    place, site, run = colab
    found, said = run()
    assert Path(found["cvlib"]).is_relative_to(place / "content")
    assert Path(found["here"]).is_relative_to(place / "content")
    for name in ("torch", "numpy"):
        assert found[name] == importlib.metadata.version(name)
        assert (site / name).is_symlink(), f"pip replaced {name}"
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in said


def test_a_restarted_runtime_fetches_nothing(colab):
    """The checkout is there, the packages too: the cell runs with no repository to clone and no index for pip."""
    place, _, run = colab
    (place / "bare.git").rename(place / "gone.git")
    found, _ = run(PIP_NO_INDEX="1")
    assert Path(found["cvlib"]).is_relative_to(place / "content")
