"""The book's address is one setting, and every place that must repeat it does."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from cvlib import ROOT


def text_of(path):
    """A file as its reader sees it: the sources of a notebook's cells, or the file."""
    text = path.read_text(encoding="utf-8")
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"]) if path.suffix == ".ipynb" else text


def named(root):
    """{(file, what): address} for every Colab badge, clone line and citation under `root`."""
    found = {}
    pages = [*root.glob("*.md"), *root.glob("book/*.md"), *root.glob("notebooks/*.ipynb"), *root.glob("book/*/*.ipynb")]
    for path in [*pages, *root.glob(".github/workflows/*.yml")]:
        name, text = path.relative_to(root).as_posix(), text_of(path)
        for where in re.findall(r"colab\.research\.google\.com/github/([\w./-]+\.ipynb)", text):
            found[name, "badge"] = "https://github.com/" + where
        for where in re.findall(r"git clone (?:-\S+ )*(https?://\S+)", text):
            found[name, "clone"] = where
    if (root / "CITATION.cff").exists():
        citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
        found["CITATION.cff", "repository-code"] = citation["repository-code"]
    return found


def check(root):
    repository = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]
    url = repository["url"]
    found = named(root)
    for (name, what), where in found.items():
        expected = f"{url}/blob/{repository['branch']}/{name}" if what == "badge" else url
        assert where == expected, f"{name}: the {what} names {where}; run: make repo URL={url}"
    return url, found


def test_every_badge_clone_line_and_citation_names_the_one_address():
    _, found = check(ROOT)
    chapters = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("notebooks/*.ipynb")}
    assert chapters <= {name for name, what in found if what == "badge"}
    assert chapters <= {name for name, what in found if what == "clone"}
    assert {("book/setup.md", "clone"), ("CITATION.cff", "repository-code")} <= set(found)


@pytest.fixture
def copy(tmp_path):
    """The files of the repository that are text, in a folder of their own."""
    for name in ("book", "notebooks", ".github"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*.yml"), *ROOT.glob("*.cff"), *ROOT.glob("*.toml")]:
        shutil.copy(path, tmp_path)
    return tmp_path


def move(root, url):
    command = [sys.executable, str(root / "book/repository.py"), *([url] if url else [])]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def test_a_fork_moves_everything_and_back_again(copy):
    before = {path: text_of(path) for path in copy.rglob("*") if path.suffix in (".ipynb", ".md", ".yml", ".cff")}
    old, places = check(copy)
    done = move(copy, "https://github.com/someone/llama-course.git")
    assert done.returncode == 0, done.stderr
    url, found = check(copy)
    assert url == "https://github.com/someone/llama-course"
    assert set(found) == set(places)
    forgotten = [
        str(path) for path in copy.rglob("*") if path.is_file() and old.split(".com/")[1].encode() in path.read_bytes()
    ]
    assert forgotten == [], "these still name the old address"
    assert move(copy, old).returncode == 0
    changed = [str(path) for path, text in before.items() if text_of(path) != text]
    assert changed == [], "there and back is not the same"


@pytest.mark.parametrize("url", ["", "someone/fork", "https://example.org/someone/fork", "https://github.com/someone"])
def test_no_address_or_one_that_colab_cannot_open_is_refused(copy, url):
    done = move(copy, url)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "https://github.com/owner/name" in done.stderr
