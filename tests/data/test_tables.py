"""Tables: what is read of them, and that faults name file, line and column."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.tables import comma_separated, separated
from dist_moe.errors import UserError


def file(content: str | bytes, name: str = "f.tsv") -> File:
    return File(Path(name), content.encode() if isinstance(content, str) else content)


def test_only_newlines_end_a_line_and_quotes_have_no_meaning() -> None:
    table = separated(file('\ufefftext\tlabel\r\n"a\u2028b\x85\t1\r\nc "d" \t0\r\n'))
    assert table.header == ("text", "label")
    assert table.texts("text") == ['"a\u2028b\x85', 'c "d" ']
    assert table.classes("label", ("0", "1")) == [1.0, 0.0]


def test_cells_of_a_spreadsheet_may_span_lines() -> None:
    table = comma_separated(file('text,label\r\n"a, ""b""\nc",1\r\nd,2\r\n'))
    assert table.texts("text") == ['a, "b"\nc', "d"]
    assert table.line_N == [2, 4]


def test_compressed_files_are_read_and_torn_ones_named() -> None:
    content = gzip.compress(b"text\tlabel\na\t1\n")
    assert separated(file(content, "f.tsv.gz")).texts("text") == ["a"]
    with pytest.raises(UserError, match=r"f\.tsv\.gz is not an intact gzip file"):
        separated(file(content[:-9], "f.tsv.gz"))


def test_a_file_without_a_header_gets_one() -> None:
    assert separated(file("a\t1\n"), ("text", "label")).texts("text") == ["a"]


def test_broken_lines_are_left_out_only_where_they_are_expected() -> None:
    broken = file("text\tlabel\na\t1\nb\nc\t0\n")
    table = separated(broken, skip_broken=True)
    assert (table.texts("text"), table.line_N, table.broken) == (["a", "c"], [2, 4], 1)
    with pytest.raises(UserError, match=r"f\.tsv, line 3: 1 columns; expected 2: text, label"):
        separated(broken)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\tlabel\na\t2\n", r"f\.tsv, line 2: label='2'; allowed: 0, 1"),
        ("text\tclass\na\t1\n", r"f\.tsv has no column 'label'; its columns: 'text', 'class'"),
        ("text\tlabel\n", r"f\.tsv holds no rows"),
        ("", r"f\.tsv holds no rows"),
        (b"text\tlabel\n\xff\xfe\t1\n", r"f\.tsv is not text in utf-8: invalid start byte at byte 11"),
    ],
)
def test_a_class_that_cannot_be_read(content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        separated(file(content)).classes("label", ("0", "1"))


@pytest.mark.parametrize("cell", ["", "much", "nan", "5.01", "-0.1"])
def test_a_number_that_is_none_or_out_of_range(cell: str) -> None:
    table = separated(file(f"text\tscore\na\t5\nb\t{cell}\n"))
    with pytest.raises(UserError, match=rf"f\.tsv, line 3: score='{cell}'; expected a number from 0 to 5"):
        table.numbers("score", 0, 5)


def test_a_spreadsheet_with_an_open_quote() -> None:
    with pytest.raises(UserError, match=r"f\.csv, line 3: "):
        comma_separated(file('text,label\na,1\n"b,1\n', "f.csv"))
