"""Odd tables: each is read as it is meant, or refused in a sentence with file, row, column, value and remedy."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_moe.data.tables import PreparedTable, TableConfig, prepare_own_table
from dist_moe.errors import UserError

Y = {"y": {"type": "binary"}}
WORD = {"a": {"type": "categorical", "min_count": 1}}
NUMBER = {"a": {"type": "numeric"}}
LIST = {"a": {"type": "list", "min_count": 1, "length": 3}}
ROWS = 20
TIMES = {"latest_by": "t", "val": 0.3, "test": 0.3}
"""A table of 20 rows has a column t, 0 to 19: row 19 is the last one tested on, and rows 0 to 7 are trained on."""


def prepared(path: Path, columns: Any = WORD, **more: Any) -> PreparedTable:
    given = {"targets": Y, "split": TIMES, "cache": path.parent / "cache"} | more
    return prepare_own_table(TableConfig(files=path, columns=columns, **given), progress=False)


def csv_of(cells: Sequence[str], *, end: str = "\n", head: str = "a,y,t") -> bytes:
    """A column a of given cells, the last repeated, beside y, which alternates, and t."""
    lines = [head, *(f"{cells[min(i, len(cells) - 1)]},{i % 2},{i}" for i in range(ROWS))]
    return (end.join(lines) + end).encode()


def words_of(data: PreparedTable, count: int) -> list[str | None]:
    """The texts for which the ids of the first rows stand."""
    words = [None, *data.words("a")]
    return [words[i] for i in data.train.ids_NC[:count, 0]]


CELLS: dict[str, tuple[list[str], list[str | None]]] = {
    "white space": ([" x ", "x", "\tx", "  ", "y z"], ["x", "x", "x", None, "y z"]),
    "empty and quoted": (['""', "", "x"], [None, None, "x"]),
    "one number in three ways": (["1", "1.0", "1.00", "01", "1.10"], ["1", "1", "1", "01", "1.10"]),
    "signs and zeros": (["-0", "0", "-0.0", "+1", "-1.0"], ["0", "0", "0", "+1", "-1"]),
    "large whole numbers": (
        ["9007199254740993", "1e+15", "1000000000000000"],
        ["9007199254740993", *[f"1{0:015}"] * 2],
    ),
    "truth values": (["true", "True", "FALSE", "t"], ["true", "true", "false", "t"]),
    "words for missing": (["NA", "nan", "null", "x"], ["NA", "nan", "null", "x"]),
    "unicode forms": (["e\u0301", "\u00e9", "\u2028"], ["\u00e9", "\u00e9", None]),
    "quoted": (['"a,b"', '"say ""x"""', '"two\nlines"', '"a\r\nb"'], ["a,b", 'say "x"', "two\nlines", "a\r\nb"]),
    "a very long cell": (["x" * 100_000, "y"], ["x" * 100_000, "y"]),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells_of_categories(tmp_path: Path, name: str) -> None:
    cells, words = CELLS[name]
    (tmp_path / "t.csv").write_bytes(csv_of(cells))
    assert words_of(prepared(tmp_path / "t.csv"), len(words)) == words


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + csv_of(["x", "z"]),
        b"\xef\xbb\xbf" + csv_of(["x", "z"], head='"a","y","t"'),
        csv_of(["x", "z"], end="\r\n"),
        csv_of(["x", "z"], end="\r"),
        csv_of(["x", "z"], end="\n\n"),
        csv_of(["x", "z"])[:-1],
        csv_of(["x", "z"], head=" a , y,t "),
        csv_of(["x", "z"], head='"a","y","t"'),
    ],
    ids=[
        "BOM",
        "BOM and quotes",
        "CRLF",
        "CR",
        "empty lines",
        "no last newline",
        "spaces in the header",
        "quoted header",
    ],
)
def test_forms_of_csv(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    data = prepared(tmp_path / "t.csv")
    assert words_of(data, 2) == ["x", "z"]
    assert (len(data.train), len(data.val), len(data.test)) == (8, 6, 6)


def test_names_of_columns(tmp_path: Path) -> None:
    """In another form of Unicode, like options of ours, or with dots."""
    (tmp_path / "t.csv").write_bytes(csv_of(["x"], head="u\u0308,name,a.b"))
    given: Any = {"columns": {"\u00fc": {"type": "categorical"}}, "targets": {"name": {"type": "binary"}}}
    assert prepared(tmp_path / "t.csv", split=TIMES | {"latest_by": "a.b"}, **given).words("\u00fc") == ["x"]
    pq.write_table(pa.table({"u\u0308": ["x"] * ROWS, "name": [0, 1] * 10, "a.b": range(ROWS)}), tmp_path / "t.parquet")
    assert prepared(tmp_path / "t.parquet", split=TIMES | {"latest_by": "a.b"}, **given).words("\u00fc") == ["x"]


def test_values_that_training_rows_do_not_have(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(csv_of(["x"] * 8 + ["new"] * 6 + ["x", "newer"]))
    data = prepared(tmp_path / "t.csv")
    assert data.columns.sizes == (2,)
    assert (data.train.ids_NC == 1).all()
    assert (data.val.ids_NC == 0).all()
    assert data.test.ids_NC[:, 0].tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("cells", [[""], ["0.1"], ["", "0.1"]], ids=["all missing", "constant", "constant with a gap"])
def test_columns_that_say_nothing(tmp_path: Path, cells: list[str]) -> None:
    (tmp_path / "t.csv").write_bytes(csv_of(cells))
    assert not prepared(tmp_path / "t.csv", NUMBER).train.numeric_NM.any()
    buckets = prepared(tmp_path / "t.csv", {"a": {"type": "numeric", "buckets": 4}})
    assert buckets.train.ids_NC[:, 0].tolist() == [
        0 if not c else buckets.columns.sizes[0] - 1 for c in (cells * 8)[:1] + cells[-1:] * 7
    ]
    assert prepared(tmp_path / "t.csv").columns.sizes == (1 if cells == [""] else 2,)


def test_five_thousand_columns(tmp_path: Path) -> None:
    x_NC = np.random.default_rng(0).normal(size=(ROWS, 5000))
    head = ",".join(f"x{i}" for i in range(5000))
    lines = [",".join(map(repr, row)) + f",{i % 2},{i}" for i, row in enumerate(x_NC.tolist())]
    (tmp_path / "t.csv").write_text("\n".join([f"{head},y,t", *lines]), encoding="utf-8")
    data = prepared(tmp_path / "t.csv", {f"x{i}": {"type": "numeric"} for i in range(5000)})
    expected = (x_NC[14:] - x_NC[:8].mean(0)) / x_NC[:8].std(0)
    np.testing.assert_allclose(data.test.numeric_NM, expected, rtol=1e-5, atol=1e-6)


NUMBERS = {
    "signs, points, exponents": (["+1", "1.", ".5", "1e3", "-2E-1", " 7 "], [1, 1, 0.5, 1000, -0.2, 7]),
    "gaps": (["1", "", "nan", "NaN", "3", "?"], [1, None, None, None, 3, None]),
    "huge whole numbers": (["123456789012345678901234567890", "1"], [123456789012345678901234567890, 1]),
    "tiny": (["1e-400", "1"], [0, 1]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_cells_of_numbers(tmp_path: Path, name: str) -> None:
    cells, values = NUMBERS[name]
    cells, values = (cells + cells[:1] * 8)[:8], (values + values[:1] * 8)[:8]
    (tmp_path / "t.csv").write_bytes(csv_of(cells))
    known = np.array([value for value in values if value is not None], np.float64)
    expected = [0 if value is None else (value - known.mean()) / known.std() for value in values]
    data = prepared(tmp_path / "t.csv", NUMBER, missing=("?",))
    np.testing.assert_allclose(data.train.numeric_NM[:, 0], expected, rtol=1e-6, atol=1e-7)


DAY = datetime.date(2024, 2, 29)
PARQUET: dict[str, tuple[pa.Array, list[str | None]]] = {
    "whole numbers": (pa.array([1, None, -3, 2**62]), ["1", None, "-3", str(2**62)]),
    "unsigned": (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
    "floats": (pa.array([1.0, None, float("nan"), 0.1, 1e15, -0.0]), ["1", None, None, "0.1", "1" + "0" * 15, "0"]),
    "halves and singles": (pa.array([0.1, 2.0], pa.float32()), ["0.1", "2"]),
    "truth values": (pa.array([True, False, None]), ["true", "false", None]),
    "decimals": (pa.array([decimal.Decimal("1.10"), decimal.Decimal("2.00")]), ["1.10", "2"]),
    "dates": (pa.array([DAY, None]), ["2024-02-29", None]),
    "times": (pa.array([datetime.datetime(2024, 2, 29, 1, 2, 3)]), ["2024-02-29 01:02:03"]),
    "nanoseconds": (pa.array([1], pa.timestamp("ns")), ["1970-01-01 00:00:00.000000001"]),
    "texts, empty and null": (pa.array(["x", "", None, "1.0"]), ["x", None, None, "1"]),
    "large texts": (pa.array(["x", None], pa.large_string()), ["x", None]),
    "views": (pa.array(["x", None], pa.string_view()), ["x", None]),
    "bytes of UTF-8": (pa.array(["é".encode()], pa.binary()), ["é"]),
    "dictionaries": (pa.array(["x", None, "z"]).dictionary_encode(), ["x", None, "z"]),
    "nulls": (pa.nulls(ROWS), [None, None]),
}


def write_column(path: Path, column: pa.Array, **more: Any) -> Path:
    column = pa.concat_arrays([column] * ROWS).slice(0, ROWS)
    pq.write_table(pa.table({"a": column, "y": [0, 1] * 10, "t": range(ROWS)} | more), path)
    return path


@pytest.mark.parametrize("name", PARQUET)
def test_types_of_parquet(tmp_path: Path, name: str) -> None:
    column, words = PARQUET[name]
    assert words_of(prepared(write_column(tmp_path / "t", column)), len(words)) == words


def test_numbers_of_parquet_in_any_type(tmp_path: Path) -> None:
    for kind in (pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.decimal128(15, 2), pa.string()):
        data = prepared(write_column(tmp_path / "t", pa.array([1, 3], pa.int32()).cast(kind)), NUMBER)
        assert data.train.numeric_NM[:4, 0].tolist() == [-1, 1, -1, 1]


def test_numbers_that_mean_missing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(csv_of(["-1", "2", "NA", "4", "-1.0"]))
    cells = pa.array([-1.0, 2, None, 4, *[-1] * 16])
    for path in (tmp_path / "t.csv", write_column(tmp_path / "t", cells)):
        assert prepared(path, NUMBER, missing=("-1.00", "NA")).train.numeric_NM[:5, 0].tolist() == [0, -1, 0, 1, 0]
        assert words_of(prepared(path, missing=(-1, "NA")), 5) == [None, "2", None, "4", None]


def test_lists_of_csv_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(csv_of(["x|z||x|w", "", "|", " z ", "x"]))
    lists = [["x", "z", None, "x", "w"], None, [""], ["z"], *[["x"]] * 16]
    for kind in (pa.list_(pa.string()), pa.large_list(pa.large_string())):
        for data in (
            prepared(tmp_path / "t.csv", LIST),
            prepared(write_column(tmp_path / "t", pa.array(lists, kind)), LIST),
        ):
            x, z = (data.words("a").index(word) + 1 for word in "xz")
            assert data.train.lists_NP[:5].tolist() == [[x, z, x], [-1] * 3, [-1] * 3, [z, -1, -1], [x, -1, -1]]
    numbers = prepared(write_column(tmp_path / "t", pa.array([[1, 2], [3, 1]], pa.list_(pa.int64(), 2))), LIST)
    assert numbers.words("a") == ["1", "2", "3"]


def test_one_column_in_several_roles(tmp_path: Path) -> None:
    """A user is a feature and a group, a time a feature and what the rows are split by."""
    (tmp_path / "t.csv").write_bytes(csv_of(["u", "v"]))
    data = prepared(tmp_path / "t.csv", WORD | {"t": {"type": "numeric"}}, group="a")
    assert data.train.group_N.tolist() == [0] + [1] * 7
    assert data.columns.numeric == ("t",)


def half_of_a_parquet(path: Path) -> None:
    whole = write_column(path, pa.array(list(map(str, range(ROWS))))).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def damaged_parquet(path: Path) -> None:
    whole = bytearray(write_column(path, pa.array(["x" * 1000])).read_bytes())
    whole[8:60] = b"\xff" * 52
    path.write_bytes(whole)


def write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def column(cells: pa.Array, **more: Any) -> Callable[[Path], object]:
    return lambda path: write_column(path, cells, **more)


def role(**more: Any) -> dict[str, Any]:
    """Settings in which column a is neither feature nor target, but for what is given."""
    return {"columns": {"y": {"type": "categorical"}}, "targets": {"t": {"type": "numeric"}}} | more


ONES = role(weight="a")
BINARY = role(targets={"a": {"type": "binary"}})
REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "nothing": (write(b""), {}, "t has no column 'a'; it is empty"),
    "parted by something else": (
        write(b"a;y;t\n1;2;3\n"),
        {},
        "its columns: ['a;y;t']; does another character part its cells?",
    ),
    "a header alone": (write(b"a,y,t\n"), {}, "t has 0 rows and none of them for train"),
    "a header without a newline": (write(b"a,y,t"), {}, "t has 0 rows"),
    "no such file": (lambda path: None, {}, "t: there is no such file; give a CSV or Parquet file"),
    "a directory": (Path.mkdir, {}, "t holds no files"),
    "a directory in one": (
        lambda path: (path / "day=1").mkdir(parents=True),
        {},
        "day=1 is a directory in a directory",
    ),
    "a column twice": (write(csv_of(["1"], head="a,a,t")), {}, "t has 2 columns 'a'; leave one of them"),
    "no such column": (write(csv_of(["1"], head="b,y,t")), {}, "t has no column 'a'; its columns: ['b', 'y', 't']"),
    "no such target": (write(csv_of(["1"], head="a,x,t")), {}, "t has no column 'y'"),
    "another separator": (write(b"a;y;t\n1;1;1\n"), {}, "t has no column 'a'; its columns: ['a;y;t']"),
    "a cell too many": (
        write(csv_of(["x", "x", "x,x"])),
        {},
        "t, row 3: 4 cells, where there are 3 columns: 'x,x,0,2'",
    ),
    "a cell too few": (write(csv_of(["x"]) + b"x,1\n"), {}, "t, row 21: 2 cells, where there are 3 columns: 'x,1'"),
    "an open quote": (write(csv_of(["x"]) + b'"x,1,20'), {}, "t has an odd number of double quotes (1)"),
    "NUL": (write(csv_of(["x", "x\0"])), {}, "t, line 3: byte 0x00 is no text in UTF-8. Remedy: save it in UTF-8"),
    "Latin-1": (write(csv_of(["x", "é"]).decode().encode("latin-1")), {}, "t, line 3: byte 0xe9 is no text in UTF-8"),
    "UTF-16": (write(csv_of(["x"]).decode().encode("utf-16")), {}, "t, line 1: byte 0x00 is no text in UTF-8"),
    "a torn character": (write(csv_of(["x"]) + b"\xc3"), {}, "t, line 22: byte 0xc3 is no text in UTF-8"),
    "half of a Parquet file": (half_of_a_parquet, {}, "t cannot be read: Parquet magic bytes not found in footer"),
    "a damaged Parquet file": (damaged_parquet, {}, "Remedy: give an intact CSV or Parquet file"),
    "a word": (write(csv_of(["1", "x"])), {"columns": NUMBER}, "t, row 2: a='x'; expected a number such as -1.5e3"),
    "thousands": (write(csv_of(['"1,000"'])), {"columns": NUMBER}, "t, row 1: a='1,000'; expected a number"),
    "infinity": (write(csv_of(["1", "inf"])), {"columns": NUMBER}, "t, row 2: a='inf'; expected a number"),
    "1e400": (write(csv_of(["1e400"])), {"columns": NUMBER}, "t, row 1: a='1e400'; expected a number within 3.4e+38"),
    "an underscore": (write(csv_of(["1_0"])), {"columns": NUMBER}, "t, row 1: a='1_0'; expected a number"),
    "other digits": (write(csv_of(["\u0661"])), {"columns": NUMBER}, "t, row 1: a='\u0661'; expected a number"),
    "infinity in Parquet": (
        column(pa.array([1, np.inf])),
        {"columns": NUMBER},
        "t, row 2: a=inf; expected a number with",
    ),
    "a list as a category": (column(pa.array([[1]])), {}, "t: column 'a' is of type list<"),
    "a struct in a list": (
        column(pa.array([[{"x": 1}]])),
        {"columns": LIST},
        "t: column 'a' is of type struct<x: int64>",
    ),
    "a span of time": (column(pa.array([1], pa.duration("s"))), {}, "t: column 'a' is of type duration[s]"),
    "dates as numbers": (
        column(pa.array([DAY])),
        {"columns": NUMBER},
        "t: column 'a' is of type date32[day]; a numeric",
    ),
    "an extension": (column(pa.array([b"\xff" * 16], pa.uuid())), {}, "t: column 'a' is of type extension<arrow.uuid>"),
    "bytes": (column(pa.array([b"\xff"])), {}, "t: column 'a' is of type binary; its cells have no text in UTF-8"),
    "one class": (
        write(csv_of(["1"])),
        BINARY,
        "all 8 training rows that are labelled",
    ),
    "no such positive": (write(csv_of(["x"])), role(targets={"a": {"type": "binary", "positive": ["z"]}}), "are 0, so"),
    "labels": (
        write(csv_of(["1", "2"])),
        BINARY,
        "t, row 2: a='2'; expected 0, 1, false",
    ),
    "no labels": (
        write(csv_of([""])),
        role(targets={"a": {"type": "numeric"}}),
        "no training row is labelled for the t",
    ),
    "a negative weight": (write(csv_of(["1", "-1"])), ONES, "t, row 2: a='-1'; a weight is a number from 0"),
    "no weight": (write(csv_of(["1", ""])), ONES, "t, row 2: a=''; a weight is a number from 0"),
    "weights of 0": (write(csv_of(["0"])), ONES, "'a' weighs all training rows with 0"),
    "a strange part": (
        write(csv_of(["train", "val", "test", "dev"])),
        role(split={"column": "a"}),
        "t, row 4: a='dev'; data.split.values has it in no part; add it there",
    ),
    "no rows to validate on": (
        write(csv_of(["train", "test", "train"])),
        role(split={"column": "a"}),
        "t has 20 rows and none of them for val; give more rows, other shares or values under data.split",
    ),
    "no time": (write(csv_of(["1", ""])), role(split={"latest_by": "a"}), "t, row 2: a=''; its time is missing"),
    "no time at all": (
        write(csv_of(["1", "soon"])),
        role(split={"latest_by": "a"}),
        "t, row 2: a='soon'; expected a number",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    make, more, said = REFUSED[name]
    make(tmp_path / "t")
    with pytest.raises(UserError) as error:
        prepared(tmp_path / "t", **more)
    message = str(error.value)
    assert f"{tmp_path / 't'}{said[1:]}" in message if said.startswith("t") else said in message
    assert len(message) < 500
    assert "\n" not in message
    assert not list((tmp_path / "cache").rglob("manifest.json"))


def test_a_file_without_rows_is_named(tmp_path: Path) -> None:
    files = {"train": tmp_path / "t", "test": tmp_path / "none"}
    write(csv_of(["1"]))(files["train"])
    write(b"a,y,t\n")(files["test"])
    config = TableConfig(files=files, columns=WORD, targets=Y, cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"none has no rows to be used for test"):
        prepare_own_table(config, progress=False)
