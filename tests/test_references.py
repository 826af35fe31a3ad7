"""What the book cites is in its bibliography, once, with a title, authors and a year."""

import json
import re

from cvlib import ROOT

BIB = (ROOT / "book/references.bib").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^@(\w+)\{(\w+),\n(.*?)^\}", BIB, flags=re.M | re.S)


def cited() -> dict[str, str]:
    """Every arXiv number in chapters, solutions, pages and modules, and a file it stands in."""
    found = {}
    files = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("book/**/*.md"), *ROOT.glob("book/solutions/*.ipynb")]
    for path in [*files, *ROOT.glob("cvlib/**/*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "README.md"]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        for number in re.findall(r"(?i:arxiv)[\s:.]*(?:org/abs/)?(\d{4}\.\d{4,5})", text):
            found[number] = str(path.relative_to(ROOT))
    return found


def test_every_paper_cited_is_in_the_bibliography():
    listed = set(re.findall(r"arXiv:(\d{4}\.\d{5})", BIB))
    missing = {number: file for number, file in cited().items() if number not in listed}
    assert not missing


def test_no_entry_is_there_twice_and_all_are_complete():
    assert BIB.count("\n@") + 1 == len(ENTRIES) > 60
    keys, numbers = [key for _, key, _ in ENTRIES], re.findall(r"arXiv:(\d{4}\.\d{5})", BIB)
    assert len(keys) == len(set(keys))
    assert len(numbers) == len(set(numbers))
    for _, key, body in ENTRIES:
        assert all(re.search(rf"\b{field} = \{{", body) for field in ("title", "author", "year")), key
        assert body.count("{") == body.count("}"), key
