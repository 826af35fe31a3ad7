"""Pictures and tables: what a reader sees is what was measured."""

import html
import re

import matplotlib as mpl
import pytest

mpl.use("Agg")

from matplotlib import pyplot as plt

from cvlib import show


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figure just drawn; it is not shown, and closed afterwards."""
    monkeypatch.setattr(plt, "show", lambda: None)
    plt.close("all")
    yield lambda: plt.gcf().axes
    plt.close("all")
    plt.rcdefaults()


# tables


def test_a_table_by_hand():
    table = show.Table(["名字", "rows"], [["中文", 1234], ["English", 5]])
    assert repr(table) == "名字      rows\n中文     1,234\nEnglish      5"


def test_a_table_lines_up_in_a_terminal():
    """A Chinese character takes two columns; every line ends at the same column where the last one is a number."""
    table = show.Table(["a", "数", "n"], [["北京，", "x", 1], ["b", "很长的文字", 23.5]])
    assert len({show._width(line) for line in repr(table).splitlines()}) == 1


def test_a_table_as_html_escapes_and_aligns():
    page = show.Table(["text", "n"], [["<b>&\n", 1]])._repr_html_()
    assert "&lt;b&gt;&amp;<br>" in page
    assert page.count("text-align:right") == 2
    assert page.count("text-align:left") == 2
    assert page.count("<tr>") == 2


def test_what_was_not_measured_and_what_is_yes_or_no():
    table = show.Table(["what", "value"], [["a", None], ["b", True], ["c", 1234]])
    assert [row[1] for row in table.rows] == ["not measured", "yes", "1,234"]


def test_a_table_without_rows():
    assert repr(show.Table(["a", "b"], [])) == "a  b"


# tokens


def test_tokens_keep_their_text_and_underline_what_is_trained():
    pieces = ["<s>", "北", "京&", "\n", " "]
    page = show.tokens(pieces, [False, True, True, False, False]).data
    spans = re.findall(r"<span style=\"([^\"]*)\">(.*?)</span>", page)
    assert [html.unescape(text.replace("⏎<br>", "\n")) for _, text in spans] == pieces
    assert ["underline" in style for style, _ in spans] == [False, True, True, False, False]
    assert "<s>" not in page


def test_neighbouring_tokens_differ_in_shade():
    spans = re.findall(r"background:(#\w+)", show.tokens(["a", "b", "c"]).data)
    assert spans[0] == spans[2] != spans[1]


# figures


def test_running_mean_equals_numpy():
    import numpy as np

    values = np.random.default_rng(0).normal(size=50)
    width = 7
    mine = show.running_mean(values.tolist(), width)
    assert mine[width - 1 :] == pytest.approx(np.convolve(values, np.ones(width) / width, "valid").tolist())
    assert mine[0] == values[0]
    assert len(mine) == 50


def test_curves_start_at_step_one_and_have_a_legend(drawn):
    show.curves({"a": [3.0, 2.0, 1.0], "b": [1.0, 1.0, 1.0]}, "step", "loss (nats)", "title")
    (axes,) = drawn()
    assert [line.get_xdata().tolist() for line in axes.lines] == [[1, 2, 3]] * 2
    assert axes.lines[0].get_ydata().tolist() == [3, 2, 1]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("step", "loss (nats)", "title")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert [line.get_color() for line in axes.lines] == list(show.PALETTE[:2])


def test_smooth_curves_keep_the_raw_line_in_the_same_colour(drawn):
    show.curves({"a": [2.0, 4.0, 6.0]}, "step", "loss", smooth=2)
    raw, mean = drawn()[0].lines
    assert raw.get_color() == mean.get_color()
    assert raw.get_alpha() < 0.5
    assert mean.get_ydata().tolist() == [2, 3, 5]
    assert drawn()[0].get_legend() is None


def test_intervals_reach_from_low_to_high(drawn):
    show.intervals({"before": (1.5, 1.4, 1.7), "after": (1.2, 1.1, 1.25)}, "bits per byte")
    (axes,) = drawn()
    bars = [collection.get_segments()[0][:, 0].tolist() for collection in axes.collections]
    assert bars == [pytest.approx([1.4, 1.7]), pytest.approx([1.1, 1.25])]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["before", "after"]
    assert axes.yaxis_inverted()  # the first entry is on top


def test_stacked_bars_end_where_their_parts_add_up_to(drawn):
    show.stacked({"7B": {"weights": 6.0, "cache": 1.0}, "13B": {"weights": 8.0}}, "GB", {"2080Ti": 11})
    (axes,) = drawn()
    ends = {(bar.get_y() + bar.get_height() / 2, bar.get_x() + bar.get_width()) for bar in axes.patches}
    assert {(0, 6.0), (0, 7.0), (1, 8.0)} <= {(round(y), x) for y, x in ends}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["7B", "13B"]
    assert axes.yaxis_inverted()
    assert axes.lines[0].get_xdata()[0] == 11
    assert [text.get_text() for text in axes.texts] == [" 2080Ti"]


def test_a_grid_says_every_number_and_what_is_missing(drawn):
    show.grid([[1.0, None], [0.25, 2.0]], ["r 1", "r 8"], ["α 1", "α 2"], "alpha", "rank", "bits per byte")
    axes, bar = drawn()
    assert [text.get_text() for text in axes.texts] == ["1.000", "–", "0.250", "2.000"]
    assert bar.get_ylabel() == "bits per byte"


def test_figures_are_small_and_chinese_has_a_font(drawn, tmp_path):
    from matplotlib import font_manager

    show.curves({"损失": [float(n % 7) for n in range(400)]}, "step", "loss", smooth=20)
    plt.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size < 100_000
    installed = {font.name for font in font_manager.fontManager.ttflist} & set(show.CJK_FONTS)
    assert installed <= set(plt.rcParams["font.family"])
    assert set(plt.rcParams["font.family"]) <= {"DejaVu Sans", *installed}


def test_the_palette_is_okabe_and_itos():
    assert len(set(show.PALETTE)) == 7
    assert all(re.fullmatch("#[0-9A-F]{6}", colour) for colour in show.PALETTE)
