"""Tables in CSV and Parquet give the arrays that a naive reading of their rows gives, whatever way they are split."""

from __future__ import annotations

import gzip
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dist_moe.data.tables import PreparedTable, TableConfig, Target, features, files, prepare_own_table
from tests.data.checks import assert_same_arrays

from .naive import Rows, assert_read_rightly, write_csv, write_parquet

COLUMNS = {
    "city": {"type": "categorical", "min_count": 1},
    "code": {"type": "categorical", "min_count": 3, "max_size": 6},
    "age": {"type": "numeric"},
    "tags": {"type": "list", "length": 3, "min_count": 2},
    "fare": {"type": "numeric", "buckets": 5},
    "flag": {"type": "categorical"},
    "always": {"type": "numeric"},
}
TARGETS = {
    "click": {"type": "binary"},
    "stars": {"type": "binary", "positive": [4, 5.0]},
    "seconds": {"type": "numeric"},
}


def made_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with gaps everywhere, texts that need quotes, and categories that few rows have."""
    draw = random.Random(seed)

    def gap(value: Any) -> Any:
        return None if draw.random() < 0.1 else value

    return [
        {
            "city": gap(draw.choice(["Zürich", 'say "hi"', "a,b", "two\nlines", "NA", f"rare {row}"])),
            "code": gap(draw.choice([1, 2, 3, 2**53 + 1, -7, 10**17, draw.randrange(10**6)])),
            "age": gap(draw.gauss(40, 12)),
            "tags": gap([draw.choice("abcdefg") for _ in range(draw.randrange(6))]),
            "fare": gap(float(draw.randrange(12))),
            "flag": gap(draw.random() < 0.3),
            "always": 7,
            "unread": draw.choice("xyz"),
            "click": gap(int(draw.random() < 0.3)),
            "stars": gap(draw.randrange(1, 6)),
            "seconds": gap(draw.expovariate(0.1)),
            "weight": draw.choice([0, 0.5, 2.0]),
            "user": gap(draw.choice([1, 2, 3, 99])),
            "when": f"2024-0{draw.randrange(1, 10)}-11 10:00:0{draw.randrange(10)}",
            "part": draw.choice(["fit", "fit", "fit", "check", "final"]),
        }
        for row in range(count)
    ]


def settings(path: Any, cache: Path, **more: Any) -> TableConfig:
    given: dict[str, Any] = {"columns": COLUMNS, "targets": TARGETS, "weight": "weight", "group": "user"}
    return TableConfig(files=path, cache=cache / "cache", **given | more)


def prepared(path: Any, cache: Path, **more: Any) -> tuple[PreparedTable, TableConfig]:
    config = settings(path, cache, **more)
    return prepare_own_table(config, progress=False), config


def cut(rows: Rows, order: Any, val: int, test: int) -> dict[str, Rows]:
    """The last ``test`` rows of an order are tested on, those before validated on; within a part the file's order."""
    end = len(rows) - test
    parts = {"train": order[: end - val], "val": order[end - val : end], "test": order[end:]}
    return {part: [rows[i] for i in sorted(of)] for part, of in parts.items()}


@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_arrays_are_those_of_a_naive_reading(tmp_path: Path, write: Callable[[Path, Rows], Path]) -> None:
    rows = made_rows(300)
    data, config = prepared(write(tmp_path / "t", rows), tmp_path, split={"val": 0.2, "test": 0.1, "seed": 5})
    order = np.argsort(np.random.default_rng(5).random(300), kind="stable")
    assert_read_rightly(data, config, cut(rows, order, 60, 30))
    assert config.table_targets == (Target("click", "binary"), Target("stars", "binary"), Target("seconds", "numeric"))
    assert data.columns.categorical == ("city", "code", "fare", "flag")
    assert data.columns.numeric == ("age", "always")
    assert data.columns.sizes == (*(len(data.words(n)) + 1 for n in data.columns.categorical),)
    assert data.columns.lists == (("tags", len(data.words("tags")) + 1, 3),)


def test_batches_hold_the_rows_and_the_weights_of_the_whole_step(tmp_path: Path) -> None:
    data, _ = prepared(write_csv(tmp_path / "t", made_rows(60)), tmp_path)
    index, step = np.array([5, 0, 7]), np.array([5, 0, 7, 9, 11])
    batch, table = data.train.batch(index, step), data.train
    assert (len(batch), batch.examples_in_step, batch.tokens_in_step) == (3, 5, 5)
    assert [x.dtype for x in batch.inputs] == [torch.int64, torch.float32, torch.int64]
    for one, whole in zip(
        (*batch.inputs, batch.target_BT), (table.ids_NC, table.numeric_NM, table.lists_NP, table.target_NT), strict=True
    ):
        np.testing.assert_array_equal(one.numpy(), whole[index])
    labelled = [[row for row in step if not math.isnan(table.target_NT[row, t])] for t in range(3)]
    assert batch.weight_in_step_T == tuple(sum(float(table.weight_N[row]) for row in of) for of in labelled)


def test_the_latest_rows_are_tested_on(tmp_path: Path) -> None:
    rows = made_rows(100)
    order = sorted(range(100), key=lambda i: rows[i]["when"])
    for write in (write_csv, write_parquet):
        data, config = prepared(write(tmp_path / "t", rows), tmp_path, split={"latest_by": "when"})
        assert_read_rightly(data, config, cut(rows, order, 10, 10))


def test_a_column_says_which_part(tmp_path: Path) -> None:
    rows, values = made_rows(100), {"train": ["fit"], "val": ["check"], "test": ["final"]}
    parts = {part: [row for row in rows if row["part"] == of[0]] for part, of in values.items()}
    data, config = prepared(write_csv(tmp_path / "t", rows), tmp_path, split={"column": "part", "values": values})
    assert_read_rightly(data, config, parts)
    del values["val"]  # then a tenth of the training rows
    values["train"].append("check")
    data, config = prepared(tmp_path / "t", tmp_path, split={"column": "part", "values": values})
    train = [row for row in rows if row["part"] != "final"]
    order = np.argsort(np.random.default_rng(0).random(len(train)), kind="stable")
    tenth = int(len(train) / 10 + 0.5)
    assert_read_rightly(data, config, cut(train, order, tenth, 0) | {"test": parts["test"]})


def test_parts_have_files_of_their_own_in_any_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of parts is read by name, in small pieces; the rows to validate on are among the training rows."""
    monkeypatch.setattr(files, "CELLS_AT_ONCE", 200)
    monkeypatch.setattr(files, "BYTES_AT_ONCE", 2000)
    rows, test = made_rows(300), made_rows(50, seed=1)
    (folder := tmp_path / "train").mkdir()
    (folder / "_SUCCESS").touch()
    write_csv(folder / "0.csv", rows[:100])
    write_parquet(folder / "1.parquet", rows[100:180])
    write_csv(folder / "2.csv", rows[180:])
    (folder / "2.csv.gz").write_bytes(gzip.compress((folder / "2.csv").read_bytes()))
    (folder / "2.csv").unlink()
    given = {"train": "train", "test": [str(write_parquet(tmp_path / "late", test))]}
    data, config = prepared(given, tmp_path, root=tmp_path)
    order = np.argsort(np.random.default_rng(0).random(300), kind="stable")
    assert_read_rightly(data, config, cut(rows, order, 30, 0) | {"test": test})
    assert TableConfig(**config.model_dump(mode="json")) == config


def test_csv_and_parquet_mean_the_same(tmp_path: Path) -> None:
    rows = made_rows(80)
    one, other = (prepared(write(tmp_path / write.__name__, rows), tmp_path)[0] for write in (write_csv, write_parquet))
    assert one.columns == other.columns
    assert_same_arrays(one, other)
    assert one.manifest["learnt"] == other.manifest["learnt"]


def test_what_is_prepared_is_kept_until_file_or_schema_change(tmp_path: Path) -> None:
    path, kept = write_csv(tmp_path / "t", made_rows(40)), tmp_path / "cache" / "table"
    prepared(path, tmp_path)
    (made,) = kept.glob("v*[0-9a-f]")
    before = made.stat().st_mtime_ns
    prepared(path.rename(tmp_path / "u"), tmp_path)  # where it lies does not count
    assert made.stat().st_mtime_ns == before
    for count, more in enumerate(
        ({"group": None}, {"split": {"seed": 1}}, {"columns": dict(reversed(COLUMNS.items()))}), 2
    ):
        prepared(tmp_path / "u", tmp_path, **more)
        assert len(list(kept.glob("v*[0-9a-f]"))) == count
    write_csv(tmp_path / "u", made_rows(41))
    assert len(prepared(tmp_path / "u", tmp_path)[0].train) == 33
    assert len(list(kept.glob("v*[0-9a-f]"))) == 5


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"columns": {}}, "at least 1 item"),
        ({"targets": {}}, "at least 1 item"),
        ({"targets": {"age": {"type": "numeric"}}}, "columns and targets both have 'age'"),
        ({"weight": "click"}, "weight='click' is among columns or targets too"),
        ({"split": {"column": "city"}}, "split.column='city' is among"),
        ({"split": {"val": 0.5, "test": 0.5}}, "val=0.5 and test=0.5 leave nothing to train on"),
        ({"split": {"column": "part", "values": {"test": ["x"]}}}, "names none of the training rows"),
        ({"split": {"column": "part"}, "files": {"train": "a", "val": "b"}}, "both say which rows are for val"),
        ({"files": {"test": "a"}}, "train among them"),
        ({"files": []}, "train among them"),
        ({"files": {"train": "a", "dev": "b"}}, "dev"),
        ({"columns": {"age": {"type": "number"}}}, "'categorical', 'numeric', 'list'"),
        ({"separator": "::"}, "pattern"),
    ],
)
def test_schemas_that_cannot_be_meant(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        settings(**{"path": more.pop("files", tmp_path), "cache": tmp_path} | more)


def test_quantiles_of_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more rows than are kept, some at equal distances give the edges."""
    monkeypatch.setattr(features, "QUANTILE_ROWS", 10)
    rows = [{"x": float(i), "y": i % 2} for i in range(100)]
    given = {"columns": {"x": {"type": "numeric", "buckets": 2}}, "targets": {"y": {"type": "binary"}}}
    split = {"latest_by": "x"}
    data, _ = prepared(write_csv(tmp_path / "t", rows), tmp_path, **given, weight=None, group=None, split=split)
    assert data.manifest["learnt"]["x"]["edges"] == [36.0]  # of 0, 8, ... 72
    assert data.words("x") == [">= -inf", ">= 36"]


_MEASURED = """
import re, sys
from pathlib import Path
from dist_moe.data.tables import TableConfig
columns = {f"c{i}": {"type": "categorical"} for i in range(12)} | {f"x{i}": {"type": "numeric"} for i in range(12)}
columns |= {"tags": {"type": "list", "length": 5}}
targets = {"y": {"type": "binary"}}
print(TableConfig(files=sys.argv[1], cache=sys.argv[2], columns=columns, targets=targets, group="c0").fetch(False))
# Not ru_maxrss, which begins with the size of the process that started this one.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.parametrize(
    ("count", "gib"), [(20_000, 1.0), pytest.param(1_000_000, 2.0, marks=pytest.mark.slow)], ids=["small", "million"]
)
def test_memory_of_a_large_parquet_file(tmp_path: Path, count: int, gib: float) -> None:
    draw = np.random.default_rng(0)
    with pq.ParquetWriter(tmp_path / "t", _block(draw).schema) as writer:
        for _ in range(count // 10_000):
            writer.write_table(_block(draw))
    command = [sys.executable, "-c", _MEASURED, str(tmp_path / "t"), str(tmp_path / "cache")]
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
    line, kib = done.stdout.splitlines()
    assert f"train on {count * 8 // 10:,}" in line
    assert int(kib) < gib * 2**20


def _block(draw: np.random.Generator) -> pa.Table:
    rows = 10_000
    ids = {f"c{i}": draw.integers(0, 10 ** (1 + i % 6), rows) for i in range(12)}
    numbers = {f"x{i}": draw.normal(size=rows) for i in range(12)}
    tags = pa.ListArray.from_arrays(np.arange(rows + 1) * 4, draw.integers(0, 1000, 4 * rows))
    return pa.table(ids | numbers | {"tags": tags, "y": draw.integers(0, 2, rows)})
