"""Plain text: a line is a document, its hash says on which side it falls."""

import pytest

from cvlib import InputError, texts


@pytest.mark.parametrize("name", texts.PACKAGED)
def test_a_packaged_text_has_two_sides_that_share_no_line(name):
    found = texts.lines(name)
    learnt, held_out = texts.split(found)
    assert len(learnt) + len(held_out) == len(found)
    assert not set(learnt) & set(held_out)
    assert 0.04 < len(held_out) / len(found) < 0.06
    assert all(line.strip() and "\n" not in line for line in found)


def test_the_side_depends_on_the_line_alone():
    lines = [str(number) for number in range(200)]
    assert sorted(texts.split(reversed(lines))[1]) == sorted(texts.split(lines)[1])


def test_files_of_ones_own_are_read_without_blank_lines(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\ufeff北京\n\n  \n上海\n", encoding="utf-8")
    assert texts.lines(str(path)) == ["北京", "上海"]
    assert texts.lines("data_samples/README.md")  # the book's own, from anywhere


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none: no such text; name a UTF-8 text file or one of china-law"):
        texts.lines("none")
    (tmp_path / "gbk.txt").write_bytes("北京".encode("gbk"))
    with pytest.raises(InputError, match="GBK, not UTF-8"):
        texts.lines(str(tmp_path / "gbk.txt"))
