"""Tables read without Arrow: cell by cell in Python, from rows of plain values."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_moe.data.tables import PreparedTable, RowTable, TableConfig

Rows = Sequence[Mapping[str, Any]]


def write_csv(path: Path, rows: Rows) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: "|".join(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=37)
    return path


def is_missing(cell: Any) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def word(cell: Any) -> str:
    if isinstance(cell, bool):
        return str(cell).lower()
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def entries(cell: Any, settings: Any) -> list[str]:
    return [word(one) for one in cell or () if not is_missing(one)][: settings.length]


def vocabulary(words: Sequence[str], settings: Any) -> dict[str, int]:
    counts = [(-count, one) for one, count in Counter(words).items() if count >= settings.min_count]
    return {one: number for number, (_, one) in enumerate(sorted(counts)[: settings.max_size - 1], 1)}


def assert_read_rightly(data: PreparedTable, config: TableConfig, parts: Mapping[str, Rows]) -> None:
    """Every entry of every array is that of the rows, given by part in the order in which they must stand."""
    ids: dict[str, list[list[int]]] = {part: [[] for _ in rows] for part, rows in parts.items()}
    numeric: dict[str, list[list[float]]] = {part: [[] for _ in rows] for part, rows in parts.items()}
    lists: dict[str, list[list[int]]] = {part: [[] for _ in rows] for part, rows in parts.items()}
    for name, column in config.columns.items():
        train = [row[name] for row in parts["train"]]
        known = [cell for cell in train if not is_missing(cell)]
        of: dict[str, int] = {}
        if column.type == "categorical":
            of = vocabulary([word(cell) for cell in known], column)
        elif column.type == "list":
            of = vocabulary([one for cell in train for one in entries(cell, column)], column)
        else:
            numbers = np.array([float(cell) for cell in known])
            mean, deviation = numbers.mean(), numbers.std() or 1.0
            edges = sorted(
                {float(np.quantile(numbers, k / (column.buckets or 1))) for k in range(1, column.buckets or 1)}
            )
        if of:
            assert data.words(name) == list(of)
        for part, rows in parts.items():
            for place, row in enumerate(rows):
                cell = row[name]
                if column.type == "categorical":
                    ids[part][place].append(0 if is_missing(cell) else of.get(word(cell), 0))
                elif column.type == "list":
                    found = [of.get(one, 0) for one in entries(cell, column)]
                    lists[part][place] += found + [-1] * (column.length - len(found))
                elif column.buckets is None:
                    numeric[part][place].append(0.0 if is_missing(cell) else (float(cell) - mean) / deviation)
                else:
                    bucket = 0 if is_missing(cell) else 1 + sum(float(cell) >= edge for edge in edges)
                    ids[part][place].append(bucket)
    groups: dict[str, int] = {}
    for part, rows in parts.items():
        table: RowTable = getattr(data, part)
        assert len(table) == len(rows)
        np.testing.assert_array_equal(table.ids_NC, np.array(ids[part]).reshape(len(rows), -1))
        np.testing.assert_array_equal(table.lists_NP, np.array(lists[part]).reshape(len(rows), -1))
        np.testing.assert_allclose(
            table.numeric_NM, np.array(numeric[part]).reshape(len(rows), -1), rtol=1e-6, atol=1e-6
        )
        target = [[label(row[name], of_kind) for name, of_kind in config.targets.items()] for row in rows]
        np.testing.assert_array_equal(table.target_NT, np.array(target, np.float32))
        weight = [1.0 if config.weight is None else float(row[config.weight]) for row in rows]
        np.testing.assert_array_equal(table.weight_N, np.array(weight, np.float32))
        for row, number in zip(rows, table.group_N.tolist(), strict=True):
            group = None if config.group is None or is_missing(row[config.group]) else word(row[config.group])
            assert number == (-1 if group is None else groups.setdefault(group, number))
    assert len(set(groups.values())) == len(groups)


def label(cell: Any, target: Any) -> float:
    if is_missing(cell):
        return math.nan
    if target.type == "numeric":
        return float(cell)
    positive = {"1", "true"} if target.positive is None else {word(one) for one in target.positive}
    return float(word(cell) in positive)
