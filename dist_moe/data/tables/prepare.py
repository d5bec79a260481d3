"""Tables prepared once: read twice as a stream, first to learn from the training rows, then to fill the arrays."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_moe.config.files import json_line
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.prepared import PARTS, DataSettings, Prepared, by_part, prepare_data
from dist_moe.data.tables.cells import LABELS, BadCell, canonical, categories, numbers
from dist_moe.data.tables.columns import TableColumns, Target
from dist_moe.data.tables.features import Feature, ListFeature, NumericFeature, feature_of
from dist_moe.data.tables.files import TableFile
from dist_moe.data.tables.parts import PartedTable, RowBlock, part_rows
from dist_moe.data.tables.rows import RowTable
from dist_moe.data.tables.schema import BinaryTarget, Part, TableSchema, TargetColumn
from dist_moe.errors import UserError

FORMAT_VERSION = 1
"""Part of the cache key: raise it with any change of the prepared arrays or of the manifest."""

_VOCABULARY = "vocabulary_{}"


@dataclass(frozen=True)
class TableSource:
    """The files of a table, those of each part that has its own, and what the manifest shall say of their source."""

    files: Mapping[Part, Sequence[TableFile]]
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class PreparedTable:
    """A prepared table. ``manifest`` records source, digests, counts, and what was learnt of each column."""

    train: RowTable
    val: RowTable
    test: RowTable
    columns: TableColumns
    manifest: dict[str, Any]
    vocabularies: Mapping[str, NDArray[np.uint8]]

    def words(self, name: str) -> list[str]:
        """Return the texts for which ids 1, 2 ... of a categorical or list column stand."""
        words: list[str] = json.loads(self.vocabularies[name].tobytes())
        return words

    def summary(self) -> str:
        """Return counts of columns and rows in one line."""
        columns, counts = self.columns, self.manifest["counts"]
        rates = ", ".join(f"{name} {about['mean']:.4g}" for name, about in self.manifest["targets"].items())
        rows = f"rows to train on {counts['train']:,}, to validate {counts['val']:,}, to test {counts['test']:,}"
        return (
            f"{len(columns.categorical)} categorical, {len(columns.numeric)} numeric and {len(columns.lists)} list "
            f"columns, mean of targets: {rates}; {rows}"
        )


class TableSettings(DataSettings, ABC):
    """Which table, and where its files are; a subclass knows its schema without opening them, and prepares it."""

    @property
    @abstractmethod
    def table_schema(self) -> TableSchema:
        """Which columns mean what, and how the rows are split."""

    @property
    def table_targets(self) -> tuple[Target, ...]:
        """Names and kinds of the targets, in order."""
        return self.table_schema.table_targets

    @abstractmethod
    def prepare(self, progress: bool) -> PreparedTable:
        """Return the table, prepared once. ``progress``: report on stderr.

        Raises `UserError` for anything that the user can fix.
        """

    def fetch(self, progress: bool) -> str:
        """Prepare the table and return what there is of it in one line."""
        return f"{self.name}: {self.prepare(progress).summary()}"


def prepare_table(
    settings: DataSettings,
    schema: TableSchema,
    key: str,
    locate: Callable[[Path, Progress], TableSource],
    report: Progress,
) -> PreparedTable:
    """Return a table, prepared once for each schema and ``key``, and from then on read from the cache.

    ``key``: stands for the content of the files, and for all else that ``locate`` makes of them. ``locate``: returns
    the files, given the directory for downloads; called only if the cache has not what is asked for. Raises
    `UserError` with file, row and column for what cannot be read as the schema has it.
    """
    own = schema.model_dump(mode="json", include=set(TableSchema.model_fields))
    digest = hashlib.sha256(json_line([key, own]).encode()).hexdigest()[:16]  # columns' order counts
    build = partial(_build, settings.name, schema, locate, report)
    content = prepare_data(settings, f"v{FORMAT_VERSION}-{digest}", build, report)
    about = content.manifest["columns"]
    columns = TableColumns(*(tuple(map(_row, about[kind])) for kind in ("categorical", "sizes", "numeric", "lists")))
    names = [*columns.categorical, *(name for name, _, _ in columns.lists)]
    words = {name: content.arrays[_VOCABULARY.format(place)] for place, name in enumerate(names)}
    train, val, test = (RowTable(**content.columns(part)) for part in PARTS)
    return PreparedTable(train, val, test, columns, content.manifest, words)


def _row(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _build(
    name: str,
    schema: TableSchema,
    locate: Callable[[Path, Progress], TableSource],
    report: Progress,
    downloads: Path,
) -> Prepared:
    source = locate(downloads, report)
    table = part_rows(source.files, schema.split, schema.names, schema.absent)
    counts = {part: int((table.part_N == place).sum()) for place, part in enumerate(PARTS)}
    features = [feature_of(name, column, counts["train"], schema.absent) for name, column in schema.columns.items()]
    report.say(f"reading {len(table.part_N):,} rows twice, {len(schema.names)} columns")
    for block in table.blocks(schema.names):
        for feature in features:
            feature.learn(block)
    learnt = {feature.name: feature.settle() for feature in features}
    arrays = _filled(table, schema, features)
    lists = [f for f in features if isinstance(f, ListFeature)]
    numeric = [f for f in features if isinstance(f, NumericFeature)]
    categorical = [f for f in features if not isinstance(f, ListFeature | NumericFeature)]
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "source": source.manifest,
        "counts": counts,
        "columns": {
            "categorical": [f.name for f in categorical],
            "sizes": [len(f.words) + 1 for f in categorical],
            "numeric": [f.name for f in numeric],
            "lists": [(f.name, len(f.words) + 1, f.length) for f in lists],
        },
        "learnt": learnt,
        "targets": _checked_targets(schema, arrays["train"]),
    }
    words = [np.frombuffer(json_line(f.words).encode(), np.uint8) for f in [*categorical, *lists]]
    return Prepared(by_part(arrays) | {_VOCABULARY.format(i): each for i, each in enumerate(words)}, manifest)


def _filled(table: PartedTable, schema: TableSchema, features: Sequence[Feature]) -> dict[str, dict[str, NDArray[Any]]]:
    """Return the arrays of each part, as `RowTable` has them."""
    by_kind: dict[str, list[Feature]] = {"ids_NC": [], "numeric_NM": [], "lists_NP": []}
    for feature in features:
        is_list, is_numeric = isinstance(feature, ListFeature), isinstance(feature, NumericFeature)
        by_kind["lists_NP" if is_list else "numeric_NM" if is_numeric else "ids_NC"].append(feature)
    widths = {kind: sum(feature.length for feature in several) for kind, several in by_kind.items()}
    arrays: dict[str, dict[str, NDArray[Any]]] = {}
    for place, part in enumerate(PARTS):
        count = int((table.part_N == place).sum())
        arrays[part] = {
            kind: np.empty((count, width), np.float32 if kind == "numeric_NM" else np.int32)
            for kind, width in widths.items()
        }
        arrays[part]["target_NT"] = np.empty((count, len(schema.targets)), np.float32)
        arrays[part] |= {"weight_N": np.empty(count, np.float32), "group_N": np.empty(count, np.int64)}
    filled, groups = [0] * len(PARTS), dict[str, int]()
    for block in table.blocks(schema.names):
        rows = {"target_NT": _targets(block, schema)} | _weights_and_groups(block, schema, groups)
        for kind, several in by_kind.items():
            columns = [feature.encode(block).reshape(len(block.part_B), -1) for feature in several]
            rows[kind] = np.concatenate(columns, axis=1) if columns else np.zeros((len(block.part_B), 0))
        for place, part in enumerate(PARTS):
            mine = block.part_B == place
            end = filled[place] + int(mine.sum())
            for kind, array in arrays[part].items():
                array[filled[place] : end] = rows[kind][mine]
            filled[place] = end
    return arrays


def _weights_and_groups(block: RowBlock, schema: TableSchema, groups: dict[str, int]) -> dict[str, NDArray[Any]]:
    """Return the weights and groups of rows. ``groups``: the number of each group met, added to."""

    def weights(column: pa.Array) -> NDArray[np.float64]:
        weight_B = numbers(column, schema.absent)
        if (wrong := np.flatnonzero(~(weight_B >= 0))).size:
            row = int(wrong[0])
            raise BadCell(row, column[row].as_py(), "a weight is a number from 0; 0 leaves the row out of the losses")
        return weight_B

    def numbered(column: pa.Array) -> NDArray[np.int64]:
        word_B, words = categories(column, schema.absent)
        return np.array([groups.setdefault(word, len(groups)) if word else -1 for word in words])[word_B]

    count = len(block.part_B)
    return {
        "weight_N": np.ones(count) if schema.weight is None else block.read(schema.weight, weights),
        "group_N": np.full(count, -1) if schema.group is None else block.read(schema.group, numbered),
    }


def _targets(block: RowBlock, schema: TableSchema) -> NDArray[np.float64]:
    """Return (B, T) targets, NaN where a row is not labelled."""

    def labels(column: pa.Array, target: BinaryTarget) -> NDArray[np.float64]:
        word_B, words = categories(column, schema.absent)
        if target.positive is None:
            if wrong := [place for place, word in enumerate(words) if word and word not in LABELS]:
                row = int(np.flatnonzero(np.isin(word_B, wrong))[0])
                raise BadCell(row, column[row].as_py(), "expected 0, 1, false or true; name what else is positive")
            values = [LABELS.get(word, np.nan) for word in words]
        else:
            positive = {canonical(str(value)) for value in target.positive}
            values = [float(word in positive) if word else np.nan for word in words]
        return np.array(values)[word_B]

    def reader(target: TargetColumn) -> Callable[[pa.Array], NDArray[np.float64]]:
        if isinstance(target, BinaryTarget):
            return partial(labels, target=target)
        return partial(numbers, missing=schema.absent)

    return np.stack([block.read(name, reader(target)) for name, target in schema.targets.items()], axis=1)


def _checked_targets(schema: TableSchema, train: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, float]]:
    """Return how many training rows are labelled for each target, and their mean.

    Raises `UserError` where no row, or no row of either class, teaches a target.
    """
    if not train["weight_N"].any():
        raise UserError(f"{schema.weight!r} weighs all training rows with 0, so that there is nothing to learn")
    found = {}
    for place, (name, target) in enumerate(schema.targets.items()):
        value_N = train["target_NT"][:, place].astype(np.float64)
        value_N = value_N[~np.isnan(value_N)]
        if not len(value_N):
            raise UserError(f"no training row is labelled for the target {name!r}; leave it out, or split otherwise")
        mean = float(value_N.mean())
        if target.type == "binary" and mean in (0, 1):
            raise UserError(
                f"all {len(value_N):,} training rows that are labelled for the target {name!r} are {mean:g}, so that "
                f"there is nothing to learn; check data.targets.{name}.positive and the split"
            )
        found[name] = {"labelled": len(value_N), "mean": mean}
    return found
