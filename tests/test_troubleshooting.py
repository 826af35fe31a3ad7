"""The page of errors quotes what is really said: our own messages word for word, and tests that exist."""

import ast
import re
from pathlib import Path

import pytest

from cvlib import ROOT, InputError, assets, loading, recipes, shapes
from cvlib.messages import read

PAGE = ROOT / "book/troubleshooting.md"
OURS = "## Messages of this book"
OTHERS = "## Messages of other libraries"


def said() -> set[str]:
    """Every text in the package, with … for what is filled in."""
    found = set()
    for path in (ROOT / "cvlib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def same(text: str) -> str:
    """A message without its gaps' exact places: `…:…` and `…` are one gap, and quotes around it are part of it."""
    return re.sub(r"['\"]?…+['\"]?", "…", text)


def headings(section: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8").split(section)[1].split("\n## ")[0]
    return re.findall(r"^### (.+)$", text, flags=re.M)


def test_the_page_has_both_sections():
    assert len(headings(OURS)) > 20
    assert len(headings(OTHERS)) > 15


@pytest.mark.parametrize("heading", headings(OURS))
def test_our_messages_are_quoted_word_for_word(heading):
    assert same(heading) in {same(text) for text in said()}, heading


@pytest.mark.parametrize("heading", headings(OTHERS))
def test_a_message_of_another_library_names_it(heading):
    after = PAGE.read_text(encoding="utf-8").split(f"### {heading}\n")[1]
    assert re.match(r"\n\*From (PyTorch|transformers|peft|accelerate|bitsandbytes|Python|matplotlib|pip|llama)", after)


def test_some_of_them_as_they_happen(tmp_path):
    (tmp_path / "broken.jsonl").write_text("{half\n", encoding="utf-8")
    calls = {
        "not valid JSON": lambda: read(tmp_path / "broken.jsonl"),
        "not found; ": lambda: recipes.load("nothing"),
        "no shape known for base": lambda: shapes.shape_of("nothing/here"),
        "is not an asset": lambda: loading.resolve("nothing"),
        "no adapter_config.json here": lambda: loading.read_adapter(tmp_path),
    }
    for words, call in calls.items():
        assert any(words in heading for heading in headings(OURS)), words
        with pytest.raises(InputError, match=words):
            call()


def test_twenty_one_traps_each_with_a_chapter_and_a_test_that_exists():
    rows = re.findall(
        r"^\| (\d+) \| .+ \| (.+) \| `(test_\w+\.py)`: (.+) \|$", PAGE.read_text(encoding="utf-8"), flags=re.M
    )
    assert [int(row[0]) for row in rows] == list(range(1, 22))
    for number, chapters, file, claim in rows:
        assert re.search(r"\[\d\d\]\(\.\./notebooks/\d\d-[\w-]+\.ipynb\)", chapters), number
        source = Path(__file__).with_name(file).read_text(encoding="utf-8")
        words = re.findall(r"\w+", claim.split(";")[0].lower())
        names = re.findall(r"def test_(\w+)", source)
        best = max(len(set(words) & set(name.split("_"))) for name in names)
        assert best >= 2, f"trap {number}: no test of {file} is about {claim!r}"


def test_the_classroom_list_of_setup_names_every_asset_that_is_in_a_package():
    page = (ROOT / "book/setup.md").read_text(encoding="utf-8")
    listed = re.search(r"\ncvlib assets (smollm2-135m(?: \\\n|[^\n])+)", page)[1].replace("\\\n", " ").split()
    assert listed == [asset.name for asset in assets.ASSETS.values() if asset.package]
