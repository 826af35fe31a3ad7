"""Numbers and tokens in, pictures out: one style for every figure and table of the book.

Figures use the Okabe-Ito palette, which colour-blind readers can tell apart, and a size that stays readable on a phone.
Tables print as aligned text and render as HTML, so that a notebook's stored output reads the same in both.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "WenQuanYi Micro Hei")


def style() -> None:
    """Set matplotlib up for the book; called by every figure here."""
    import matplotlib.pyplot as plt
    from cycler import cycler
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    plt.rcParams.update(
        {
            "figure.figsize": (7, 3.6),
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "font.family": ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)],
            "axes.prop_cycle": cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
        }
    )


def figure(x: str, y: str, title: str = ""):
    """An empty figure with labelled axes, units in the labels; returns its axes."""
    import matplotlib.pyplot as plt

    style()
    _, axes = plt.subplots(layout="constrained")
    axes.set(xlabel=x, ylabel=y, title=title)
    return axes


def panels(titles: Sequence[str], x: str, y: str) -> list:
    """Axes side by side on one y axis, one for each title."""
    import matplotlib.pyplot as plt

    style()
    _, axes = plt.subplots(1, len(titles), figsize=(8, 3.4), sharey=True, layout="constrained")
    for each, title in zip(axes, titles, strict=True):
        each.set(title=title, xlabel=x)
    axes[0].set_ylabel(y)
    return list(axes)


def curves(lines: Mapping[str, Sequence[float]], x: str, y: str, title: str = "", smooth: int = 1) -> None:
    """One line per entry against its index from 1; `smooth` > 1 draws a running mean over the faint raw line."""
    import matplotlib.pyplot as plt

    axes = figure(x, y, title)
    for name, values in lines.items():
        steps = range(1, len(values) + 1)
        if smooth > 1:
            (raw,) = axes.plot(steps, values, alpha=0.25, lw=1)
            axes.plot(steps, running_mean(values, smooth), color=raw.get_color(), label=name)
        else:
            axes.plot(steps, values, label=name)
    if len(lines) > 1:
        axes.legend()
    plt.show()


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and the ones before it, `width` at most.

    >>> running_mean([2.0, 4.0, 6.0, 8.0], 2)
    [2.0, 3.0, 5.0, 7.0]
    """
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def intervals(
    points: Mapping[str, tuple[float, float, float]], x: str, title: str = "", marks: Mapping[str, float] | None = None
) -> None:
    """A dot with its interval for each entry (value, low, high), one under the other; `marks` are lines across all."""
    import matplotlib.pyplot as plt

    axes = figure(x, "", title)
    for name, value in (marks or {}).items():
        axes.axvline(value, color="black", ls="--", lw=1)
        axes.text(value, 1.01, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", size=8)
    if marks:
        axes.set_title(title, pad=18)  # room for their names
    for place, (value, low, high) in enumerate(points.values()):
        axes.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", capsize=4, color=PALETTE[place % 7])
    axes.set_yticks(range(len(points)), list(points))
    axes.invert_yaxis()
    axes.margins(y=0.25)
    plt.show()


def stacked(
    bars: Mapping[str, Mapping[str, float]], x: str, marks: Mapping[str, float] | None = None, title: str = ""
) -> None:
    """A bar for each entry, one under the other, put together from named parts; `marks` are lines across all bars."""
    import matplotlib.pyplot as plt

    axes = figure(x, "", title)
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    ends = [0.0] * len(bars)
    for place, name in enumerate(names):
        sizes = [parts.get(name, 0.0) for parts in bars.values()]
        hatch = ("", "//")[place // 7 % 2]  # more parts than colours: told apart by a pattern
        look = {"color": PALETTE[place % 7], "edgecolor": "white", "hatch": hatch}
        axes.barh(range(len(bars)), sizes, left=ends, label=name, **look)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for name, value in (marks or {}).items():
        axes.axvline(value, color="black", ls="--", lw=1)
        axes.text(value, -0.55, f" {name}", va="bottom", size=8)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(len(bars) - 0.4, -0.9)  # the first entry on top, room for the marks' names
    axes.figure.set_figheight(1.6 + 0.5 * len(bars) + 0.14 * len(names))
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    plt.show()


def grid(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], x: str, y: str, label: str):
    """A heat map with its number in every cell; `label`: what the colour means, with its unit; None: not measured."""
    import matplotlib.pyplot as plt

    axes = figure(x, y)
    axes.grid(False)
    cells = [[float("nan") if value is None else value for value in line] for line in values]
    image = axes.imshow(cells, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    middle = sum(image.get_clim()) / 2
    for i, line in enumerate(cells):
        for j, value in enumerate(line):
            colour = "black" if value > middle or value != value else "white"
            axes.text(j, i, "–" if value != value else f"{value:.3f}", ha="center", va="center", color=colour, size=9)
    axes.figure.colorbar(image, label=label)
    axes.figure.set_figheight(1.4 + 0.32 * len(rows))
    plt.show()


class Table:
    """Rows under named columns; numbers are right-aligned.

    >>> Table(["set", "rows"], [["Chinese", 89], ["English", 40]])
    set      rows
    Chinese    89
    English    40
    """

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence]):
        self.columns = list(columns)
        self.rows = [[_cell(value) for value in row] for row in rows]
        self.right = [all(not isinstance(row[i], str | bool) for row in rows) for i in range(len(columns))]

    def __repr__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(_pad(*cell) for cell in zip(line, widths, self.right, strict=True)).rstrip() for line in lines
        )

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            aligned = ("right" if right else "left" for right in self.right)
            inner = (
                f'<{tag} style="text-align:{side}">{html.escape(cell).replace(chr(10), "<br>")}</{tag}>'
                for cell, side in zip(cells, aligned, strict=True)
            )
            return f"<tr>{''.join(inner)}</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        return f'<table class="table"><thead>{row(self.columns, "th")}</thead><tbody>{body}</tbody></table>'


def _cell(value) -> str:
    """A table's cell as text; None is what was not measured."""
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:,}"


def _width(text: str) -> int:
    """Columns a text takes in a terminal: a Chinese character takes two."""
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def tokens(pieces: Sequence[str], marked: Sequence[bool] | None = None):
    """Pieces of a text side by side in alternating shades; `marked` ones in a colour of their own.

    Shown in a notebook as HTML; the marked pieces are also underlined, for readers who do not see the colour.
    """
    from IPython.display import HTML

    shades = ("#e8eef4", "#d3dee9")
    spans = []
    for place, piece in enumerate(pieces):
        trained = bool(marked and marked[place])
        colour = "#ffd9b8" if trained else shades[place % 2]
        line = "underline" if trained else "none"
        text = html.escape(piece).replace("\n", "⏎<br>")
        spans.append(
            f'<span style="background:{colour};color:#1a1a1a;text-decoration:{line};padding:1px 2px">{text}</span>'
        )
    return HTML(f'<div style="line-height:1.9;word-break:break-all">{"".join(spans)}</div>')
