"""The contract of a chapter, held for every notebook and every solution, without running any of them.

That the cells run and that their outputs come out the same is nbval's work (`make test`).
"""

import ast
import base64
import json
import re
import statistics
import sys

import pytest

from cvlib import ROOT

sys.path.insert(0, str(ROOT / "book"))
import build

CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "book/solutions").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize(
    "path", CHAPTERS + SOLUTIONS, ids=lambda path: f"{path.parent.name}/{path.stem}"
)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
EXERCISE = re.compile(r"^\*\*Exercise (\d+\.\d) (★+) (.+?)\.?\*\* ", re.MULTILINE)


def cells(path, kind=None):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found if kind in (None, cell["cell_type"])]


def tagged(path, tag):
    return [cell for cell in cells(path, "code") if tag in cell["metadata"].get("tags", [])]


def pictures(path):
    """(cell, bytes) of every figure."""
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                yield cell, base64.b64decode("".join(output["data"]["image/png"]))


def prose(path):
    return "\n\n".join(cell["source"] for cell in cells(path, "markdown"))


def printed(cell):
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def exercises(path):
    """[(number, stars, title, stub, check)]: the two code cells behind each exercise of a chapter."""
    found, everything = [], cells(path)
    for place, cell in enumerate(everything):
        for number, stars, title in EXERCISE.findall(cell["source"]) if cell["cell_type"] == "markdown" else ():
            stub, check = everything[place + 1 : place + 3]
            found.append((number, stars, title, stub, check))
    return found


def statements(source):
    """The statements of a cell, free of layout and comments."""
    return [ast.dump(statement) for statement in ast.parse(source).body]


@every_chapter
def test_a_chapter_opens_with_what_a_reader_needs(path):
    opening = cells(path)[0]["source"]
    parts = re.split(r"\n\n+", opening)
    assert re.match(rf"# {path.name[:2]} \S", parts[0])
    assert parts[1].startswith("[![Open in Colab]")
    marks = [
        "**You will be able to**",
        "**Before you start**",
        "| machine | minutes | memory |",
        "**Reads**",
        "**Writes**",
    ]
    places = [opening.find(mark) for mark in marks]
    assert -1 not in places, dict(zip(marks, places, strict=True))
    assert places == sorted(places)
    for machine in ("laptop", "T4", "2080Ti"):
        assert re.search(rf"^\| .*{machine}.* \| .+ \| .+ \|$", opening, re.MULTILINE), machine


@every_chapter
def test_a_chapter_closes_with_what_was_measured_slips_exercises_and_reading(path):
    for part in ("What we measured", "Where the originals slipped", "Exercises", "Further reading"):
        assert re.search(rf"^(?:## [\d. ]*|\*\*){part}", prose(path), re.MULTILINE | re.IGNORECASE), part


@every_notebook
def test_the_setup_cell_is_the_same_everywhere(path):
    setup = tagged(path, "setup")
    assert len(setup) == 1
    assert setup[0] == cells(path, "code")[0] | {"outputs": setup[0]["outputs"]}
    assert setup[0]["source"] == tagged(CHAPTERS[0], "setup")[0]["source"]


@every_notebook
def test_no_cell_is_longer_than_a_page_can_bear(path):
    sources = [cell["source"].splitlines() for cell in cells(path, "code")]
    assert max(map(len, sources)) <= 30
    widest = max((line for source in sources for line in source), key=len)
    assert len(widest) <= 127, f"a wide screen shows 127 characters of code: {widest}"
    lines = [sum(map(bool, map(str.strip, source))) for source in sources]
    if path in CHAPTERS:
        assert statistics.median(lines) <= 10


@every_notebook
def test_a_notebook_is_executed_whole_and_normalised(path):
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert None not in counts, "run: make notebooks ONLY=" + path.name[:2]
    assert counts == sorted(counts), "executed out of order; run: make notebooks ONLY=" + path.name[:2]
    for cell in cells(path, "code"):
        assert not [output["output_type"] for output in cell["outputs"] if output["output_type"] == "error"]
    text = path.read_text(encoding="utf-8")
    again = build.nbformat.writes(build.normalised(build.nbformat.reads(text, as_version=4)))
    assert text.rstrip("\n") == again.rstrip("\n"), "ids, timings or bars: run book/build.py notebooks " + path.name[:2]


@every_notebook
def test_figures_are_described_and_small(path):
    for cell, picture in pictures(path):
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(alt) > 20, f"no alt text: {cell['source'][:60]}"
        assert len(picture) < 100_000, f"{len(picture):,} bytes: {cell['source'][:60]}"
    assert path.stat().st_size < 1_500_000


@every_notebook
def test_markdown_is_plain(path):
    """It must read the same in JupyterLab, on Colab, on GitHub and in the book: no directives or roles of MyST."""
    text = re.sub(r"```.*?```|`[^`]*`", "", prose(path), flags=re.DOTALL)
    assert not re.findall(r"^:{3,}|\{[a-z]+\}`|^\(\w+\)=", text, re.MULTILINE)
    assert not re.findall(r"```\{", prose(path))
    for equation in re.findall(r"\$\$(.*?)\$\$", prose(path), re.DOTALL):
        wrapped = r"\\" in equation and "aligned" not in equation and r"\tag" in equation
        assert not wrapped, rf"Sphinx splits at \\, and a split holds no \tag; write \cr: {equation[:60]}"


@every_chapter
def test_exact_claims_are_compared(path):
    assert len(tagged(path, "nbval-check-output")) >= 3
    for cell in tagged(path, "nbval-check-output"):
        assert cell["outputs"], f"a compared cell without an output: {cell['source'][:60]}"


@every_chapter
def test_three_exercises_each_with_a_stub_and_a_check(path):
    found = exercises(path)
    assert [number for number, *_ in found] == [f"{int(path.name[:2])}.{n}" for n in (1, 2, 3)]
    assert [stars for _, stars, *_ in found] == ["★", "★★", "★★★"]
    for number, _, title, stub, check in found:
        assert stub["cell_type"] == check["cell_type"] == "code", number
        assert "..." in stub["source"] or "# your lines here" in stub["source"], number
        assert printed(stub) == "", number
        assert printed(check) == "not attempted\n", number
        place = re.sub(r"[^\w\- ]", "", f"{number} {title}".lower()).replace(" ", "-")  # as MyST names a heading
        assert f"[Solution](../book/solutions/{path.name}#{place})" in prose(path), f"{number}: no link to its solution"


@every_chapter
def test_each_solution_passes_the_check_of_its_chapter(path):
    """Stub and solution do not drift: the chapter's check, word for word, closes a cell that printed "passed"."""
    solution = ROOT / "book/solutions" / path.name
    assert solution.exists()
    assert f"../../notebooks/{path.name}" in prose(solution), "no link back to the chapter"
    headings = re.findall(r"^## (\d+\.\d) (.+)$", prose(solution), re.MULTILINE)
    assert headings == [(number, title) for number, _, title, *_ in exercises(path)]
    plain = [cell for cell in cells(solution, "code") if "setup" not in cell["metadata"].get("tags", [])]
    for number, *_, check in exercises(path):
        wanted = statements(check["source"])
        same = [cell for cell in plain if statements(cell["source"])[-len(wanted) :] == wanted]
        assert len(same) == 1, f"{number}: the solution does not run the chapter's check"
        assert printed(same[0]).startswith("passed"), number


def test_every_solution_has_its_chapter():
    assert [path.name for path in SOLUTIONS] == [path.name for path in CHAPTERS]
