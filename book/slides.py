"""Slides for a lecture, one deck a chapter, made from the notebooks by rule: `make slides`, then open a file.

Nobody keeps a second copy of a chapter. What stands on a slide: headings, equations, lists, tables, the first words of
paragraphs that begin in bold ("**Predict**", "**Parity**"), figures, printed output, and cells of at most ten lines;
longer ones only if they define what later cells call, in smaller type on a slide of their own.
Everything else a paragraph says goes to the speaker's notes (press S). A section that does not fit goes on on the
next slide, under the same heading.
"""

from __future__ import annotations

import html
import math
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import npm
import yaml
from nbconvert import SlidesExporter
from nbformat.v4 import new_markdown_cell

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "_build" / "slides"
ROOM = 17  # lines on a slide
WIDTH = 84  # characters on a line of prose
LONGEST_CELL = 10  # lines of code an audience can read


@dataclass
class Piece:
    """Something to put on a slide: a cell and the lines it takes. Zero lines are speaker's notes."""

    cell: nbformat.NotebookNode
    lines: int


def main() -> int:
    try:
        reveal = npm.package("reveal.js")
    except npm.NotAvailable as reason:
        print(f"slides: {reason}", file=sys.stderr)
        return 2
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.copytree(reveal / "dist", OUT / "reveal.js" / "dist")
    shutil.copytree(mathjax(), OUT / "mathjax")
    exporter = SlidesExporter(template_file=str(ROOT / "book" / "slides.html.j2"))
    exporter.reveal_url_prefix, exporter.reveal_theme = "reveal.js", "white"
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    decks = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = deck(nbformat.read(path, as_version=4))
        page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title(notebook)}})
        (OUT / f"{path.stem}.html").write_text(page, encoding="utf-8")
        decks[f"notebooks/{path.stem}"] = title(notebook)
    (OUT / "index.html").write_text(index(decks), encoding="utf-8")
    print(f"the slides: {OUT / 'index.html'}, {len(decks)} decks")
    return 0


def mathjax() -> Path:
    """The folder of MathJax that the pages of the book use, too."""
    found = [Path(folder) / "sphinx-mathjax-offline/static/mathjax" for folder in sys.path]
    return next(folder for folder in found if folder.exists())


def title(notebook) -> str:
    return notebook.cells[0].source.splitlines()[0].lstrip("# ")


def deck(notebook):
    """The notebook with its cells cut, chosen and marked for reveal.js."""
    cells = []
    for heading, cells_of_section in sections(notebook):
        if "Further reading" not in heading:
            with_code = "Exercises" not in heading  # stubs and checks are for the notebook
            pieces = [piece for cell in cells_of_section for piece in cut(cell, with_code)]
            cells += [cell for slide in packed(heading, pieces) for cell in slide]
    notebook.cells = cells
    return notebook


def sections(notebook):
    """[(heading line, its cells)]; a cell of prose is cut where a heading stands in it."""
    found = []
    for cell in notebook.cells:
        parts = re.split(r"^(#{1,2} .*)$", cell.source, flags=re.MULTILINE) if cell.cell_type == "markdown" else []
        if not parts:
            found[-1][1].append(cell)
        if parts and parts[0].strip():
            found[-1][1].append(new_markdown_cell(parts[0].strip()))
        for heading, text in zip(parts[1::2], parts[2::2], strict=True):
            found.append((heading, [new_markdown_cell(text.strip())] if text.strip() else []))
    return found


def cut(cell, with_code: bool = True):
    """The pieces of a cell, in order."""
    if cell.cell_type == "markdown":
        found = blocks(unlinked(cell.source))
        for before, block, after in zip(["", *found], found, [*found[1:], ""], strict=False):
            letters = "$" in block and (before.startswith("$$") or after.startswith("$$"))
            yield from prose(block, letters)
    elif with_code and "setup" not in cell.metadata.get("tags", []):
        yield from code(cell)


def unlinked(source: str) -> str:
    """Prose whose links into the book are plain words: a deck lies elsewhere, and solutions are not for the screen."""
    source = re.sub(r" \[Solution\]\([^)]*\)", "", source)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", source)


def blocks(source: str) -> list[str]:
    """Paragraphs; a fenced block or an equation is one even with blank lines in it."""
    found: list[str] = []
    for part in re.split(r"\n\s*\n", source):
        if found and (found[-1].count("```") % 2 or found[-1].count("$$") % 2):
            found[-1] += "\n\n" + part
        else:
            found.append(part)
    return [block.strip() for block in found if block.strip()]


def prose(block: str, letters: bool = False):
    """Equations, lists, tables, quotations and listings are shown, and the first words of a paragraph in bold.

    So are the first words of a paragraph beside an equation that holds `letters`: it says what they mean.
    """
    if block.startswith(("[![", "Solutions:", "| machine", "**Reads**")):
        return
    if block.startswith("$$"):
        yield Piece(new_markdown_cell(block), 3 + 2 * block.count(r"\\"))
    elif re.match(r"[-*>|] |\d+\. |```|###", block):
        yield Piece(new_markdown_cell(block), sum(math.ceil((len(line) + 1) / WIDTH) for line in block.splitlines()))
    elif block.startswith("**") or letters:
        shown, said = first_words(block)
        yield Piece(new_markdown_cell(shown), 1 + math.ceil(len(shown) / WIDTH))
        if said:
            yield Piece(new_markdown_cell(said), 0)
    else:
        yield Piece(new_markdown_cell(block), 0)


def first_words(block: str, most: int = 240) -> tuple[str, str]:
    """The first sentence, and as many more as stay short; the rest."""
    sentences = re.split(r"(?<=[.?!])\s+", block)
    kept = 1
    while kept < len(sentences) and len(" ".join(sentences[: kept + 1])) <= most:
        kept += 1
    return " ".join(sentences[:kept]), " ".join(sentences[kept:])


def code(cell):
    """Short code, then what it gave; long code leaves only that, unless it defines something."""
    lines = [line for line in cell.source.splitlines() if line.strip()]
    only_imports = all(re.match(r"(import|from) |[\s)]", line) for line in lines)
    short = len(lines) <= LONGEST_CELL
    if (short and not only_imports) or re.search(r"^(def|class) ", cell.source, re.MULTILINE):
        shown = cell.copy()
        shown.outputs = []
        shown.metadata = nbformat.from_dict({} if short else {"tags": ["small"]})
        yield Piece(shown, cell.source.count("\n") + 2 if short else ROOM)
    for output in cell.outputs:
        result = cell.copy()
        result.metadata = nbformat.from_dict({"transient": {"remove_source": True}})
        result.outputs = [output]
        data = output.get("data", {})
        if "image/png" in data:
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            output.metadata["image/png"] = {"alt": html.escape(alt, quote=True)}
            yield Piece(result, ROOM - 2)
        elif text := output.get("text", data.get("text/plain", "")):
            yield Piece(
                result, min(ROOM - 2, sum(1 + len(line.strip()) // 110 for line in text.strip().splitlines()) + 1)
            )


def packed(heading: str, pieces: list[Piece]):
    """Slides as lists of marked cells: filled in order, each under its heading, notes where they were said."""
    if pieces and not any(piece.lines for piece in pieces):
        shown, said = first_words(pieces[0].cell.source)
        pieces = [Piece(new_markdown_cell(shown), 2), Piece(new_markdown_cell(said), 0), *pieces[1:]]
    slides: list[list[Piece]] = [[]]
    for piece in pieces:
        if piece.lines and sum(other.lines for other in slides[-1]) + piece.lines > ROOM:
            slides.append([])
        slides[-1].append(piece)
    for slide in slides:
        said = "\n\n".join(piece.cell.source for piece in slide if not piece.lines)
        cells = [new_markdown_cell(heading), *(piece.cell for piece in slide if piece.lines)]
        for place, cell in enumerate(cells):
            cell.metadata["slideshow"] = {"slide_type": "-" if place else "slide"}
        notes = [new_markdown_cell(said, metadata={"slideshow": {"slide_type": "notes"}})] if said else []
        yield cells + notes


def index(decks: dict[str, str]) -> str:
    """A page that lists the decks, part by part as in the table of contents."""
    rows = []
    for part in yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]:
        inside = [entry["file"] for entry in part["chapters"] if entry["file"] in decks]
        links = "".join(f'<li><a href="{Path(name).stem}.html">{html.escape(decks[name])}</a></li>' for name in inside)
        rows.append(f"<h2>{html.escape(part['caption'])}</h2><ul>{links}</ul>" if inside else "")
    keys = "<p>Arrow keys turn the slides, S opens the speaker's notes, O shows all slides, F fills the screen.</p>"
    style = "body{font:18px/1.6 system-ui,'Noto Sans CJK SC',sans-serif;max-width:40em;margin:3em auto;padding:0 1em}"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Slides</title>'
    body = f"<main><h1>Slides</h1>{keys}{''.join(rows)}</main>"
    return f'<!DOCTYPE html><html lang="en"><head>{head}<style>{style}</style></head><body>{body}</body></html>'


if __name__ == "__main__":
    sys.exit(main())
