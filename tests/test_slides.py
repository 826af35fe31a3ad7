"""`book/slides.py`: what a deck shows of a chapter. `make slides` itself needs npm, for reveal.js."""

import re
import sys

import nbformat
import pytest

from cvlib import ROOT

sys.path.insert(0, str(ROOT / "book"))
import slides

every_deck = pytest.mark.parametrize(
    "deck",
    [slides.deck(nbformat.read(path, as_version=4)) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))],
    ids=slides.title,
)


def on_screen(deck):
    return [cell for cell in deck.cells if cell.metadata.slideshow.slide_type != "notes"]


@every_deck
def test_a_deck_has_no_link_into_the_book(deck):
    prose = "\n".join(cell.source for cell in deck.cells if cell.cell_type == "markdown")
    assert not re.findall(r"\]\((?!https?:)[^)]*\)", prose)
    assert "Solution" not in prose


@every_deck
def test_a_deck_shows_exercises_without_their_stubs_and_no_set_up(deck):
    assert sum("**Exercise" in cell.source for cell in on_screen(deck)) == 3
    assert not any("not attempted" in cell.source or "google.colab" in cell.source for cell in on_screen(deck))


@every_deck
def test_every_slide_has_a_heading_and_code_an_audience_can_read(deck):
    for cell in on_screen(deck):
        if cell.metadata.slideshow.slide_type == "slide":
            assert cell.source.startswith("#"), cell.source[:60]
        elif cell.cell_type == "code" and not cell.metadata.get("transient"):
            short = sum(bool(line.strip()) for line in cell.source.splitlines()) <= slides.LONGEST_CELL
            assert short or cell.metadata.tags == ["small"]


@every_deck
def test_what_a_deck_calls_it_defines(deck):
    """Functions of the notebook that appear in a cell on screen are on screen themselves."""
    shown = [cell.source for cell in on_screen(deck) if cell.cell_type == "code" and not cell.metadata.get("transient")]
    path = next(path for path in (ROOT / "notebooks").glob("*.ipynb") if slides.title(deck)[:2] == path.name[:2])
    whole = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    defined = set(re.findall(r"^(?:def|class) (\w+)", whole, re.MULTILINE))
    called = {name for name in defined for source in shown if re.search(rf"\b{name}\(", source)}
    missing = called - set(re.findall(r"^(?:def|class) (\w+)", "\n".join(shown), re.MULTILINE))
    assert not missing
