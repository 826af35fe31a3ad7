"""The directive `{first-light}`: what the first study measured, as a table on the landing page.

It reads `benchmarks/results/00-first-light.json` while the page is built, so nobody types an answer or a number.
"""

import json

from docutils import nodes
from docutils.parsers.rst import Directive

from cvlib import ROOT

WIDTH = 88  # characters of an answer that fit a landing page


class FirstLight(Directive):
    """Rows of (question, before, after), then the score they add up to, then where it was measured."""

    def run(self):
        study = ROOT / "benchmarks/results/00-first-light.json"
        found = json.loads(study.read_text(encoding="utf-8"))
        english = json.loads((ROOT / "data_samples/showcase.json").read_text(encoding="utf-8"))
        self.state.document.settings.env.note_dependency(str(study))
        answers = list(zip(english, found["answers"]["before"], found["answers"]["after"], strict=False))[:3]
        rows = [[f"{asked} {english[asked]}", short(before), short(after)] for asked, before, after in answers]
        before, (low, high), after = found["before"]["zh"], found["before"]["zh_interval"], found["summary"]["zh"]
        rows.append(
            [
                "bits per byte of Chinese it never saw, lower is better",
                f"{before:.3f} (95 % interval over rows {low:.3f} to {high:.3f})",
                f"{after['mean']:.3f} (over {len(found['rows'])} seeds {after['low']:.3f} to {after['high']:.3f})",
            ]
        )
        where = (
            f"Measured on {found['machine']}, {found['date']}; {found['steps']} steps of {found['batch_rows']} rows."
        )
        return [table(["asked", "before", "after"], rows), nodes.paragraph(text=where)]


def short(answer: str) -> str:
    """The beginning of an answer on one line; an ellipsis where it goes on or was cut off."""
    line = " ".join(answer.split())
    if len(line) <= WIDTH:
        return line if line.endswith((".", "。", "！", "？", "”")) else line + " …"
    return line[:WIDTH].rsplit(" ", 1)[0] + " …"


def table(head: list[str], rows: list[list[str]]) -> nodes.table:
    """A plain table of texts."""
    body = nodes.tbody("", *(row(cells) for cells in rows))
    columns = [nodes.colspec(colwidth=1) for _ in head]
    return nodes.table("", nodes.tgroup("", *columns, nodes.thead("", row(head)), body, cols=len(head)))


def row(cells: list[str]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph(text=text)) for text in cells))


def setup(app):
    app.add_directive("first-light", FirstLight)
    return {"parallel_read_safe": True}
