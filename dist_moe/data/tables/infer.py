"""A schema guessed from a table's first rows, as a configuration to edit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dist_moe.config.files import absolute
from dist_moe.config.plain_yaml import yaml_text
from dist_moe.data.fetch.tables import NUMBER
from dist_moe.data.tables.cells import LABELS, BadCell, categories, entries, times
from dist_moe.data.tables.files import own_files
from dist_moe.data.tables.parts import check_columns, separator_doubt
from dist_moe.errors import UserError, shown

ROWS, CELLS = 100_000, 10_000_000
"""Read at most, whichever is less."""

MANY_VALUES = 100
"""Whole numbers of more values are taken for quantities, unless the column's name says that they are ids."""

LONGEST_NAME = 100
"""Characters of a name that the configuration gives: YAML has no short form for longer ones."""


@dataclass
class _Seen:
    """The cells of a column: how often each text, how many with a bar, and why it is not to be read, if so."""

    counts: Counter[str] = field(default_factory=Counter)
    barred: int = 0
    is_list: bool = False
    numeric: bool = False
    refusal: str = ""

    def add(self, column: pa.Array) -> None:
        self.is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        try:
            word_N, words = entries(column, "|", (), 1)[2:] if self.is_list else categories(column, ())
            for word, count in zip(words, np.bincount(word_N, minlength=len(words)).tolist(), strict=True):
                self.counts[word] += count
                self.barred += count * ("|" in word)
        except BadCell as bad:
            self.refusal = f"of type {bad.value}, which is not read"

    def settle(self) -> None:
        del self.counts[""]
        if not (words := list(self.counts)):
            self.refusal = self.refusal or "always missing"
        elif len(words) == 1 and not self.is_list:
            self.refusal = f"always {shown(words[0], 40)}"
        self.numeric = not self.is_list and all(map(NUMBER.fullmatch, words))
        if not self.refusal and not self.numeric and not self.is_list:
            with suppress(BadCell):
                times(pa.array(words[:1000]), ())
                self.refusal = "times; data.split.latest_by may name it"

    def feature(self, name: str) -> dict[str, Any]:
        """Return the guess at what the column is."""
        if self.is_list:
            return {"type": "list"}
        if self.barred > 0.2 * self.counts.total():
            return {"type": "list", "separator": "|"}
        whole = all(word.lstrip("-").isdecimal() for word in self.counts)
        if not self.numeric or (whole and (len(self.counts) <= MANY_VALUES or name.lower().endswith("id"))):
            return {"type": "categorical"}
        return {"type": "numeric"}

    def target(self) -> dict[str, Any]:
        """Return the guess at what is to be predicted: one of two values, the rarer one positive, or a number."""
        if self.counts.keys() <= LABELS.keys():
            return {"type": "binary"}
        if self.numeric and len(self.counts) > 2:
            return {"type": "numeric"}
        return {"type": "binary", "positive": [self.counts.most_common()[-1][0]]}

    def __str__(self) -> str:
        words = [shown(word, 20) for word, _ in self.counts.most_common(3)]
        return f"{len(self.counts):,} values: {', '.join(words)}{', ...' * (len(self.counts) > len(words))}"


def inferred_schema(path: Path, targets: Sequence[str], separator: str) -> str:
    """Return a section ``data`` in YAML for the table in a file or directory, with a comment on each column.

    ``targets``: names of the columns to predict; if there are none, the last one that holds two labels is proposed.
    Raises `UserError` for what cannot be read, and for a target that is not there or always the same.
    """
    files = [file for file, _ in own_files(path, separator)]
    names = files[0].names()
    check_columns(files[0], targets)
    if doubt := separator_doubt(names):
        raise UserError(f"{path} has one column, {shown(names[0])}{doubt}")
    once = [name for name in names if names.count(name) == 1 and name.isprintable() and 0 < len(name) <= LONGEST_NAME]
    if not once:
        raise UserError(
            f"{path} has no column whose name is usable: {shown(names, 400)}; give each a short one of its own"
        )
    seen, count, limit = {name: _Seen() for name in once}, 0, min(ROWS, CELLS // len(once))
    for file in files:
        check_columns(file, once)
        for batch in file.batches(once):
            rows = batch.slice(0, limit - count)
            for name, column in zip(once, rows.columns, strict=True):
                seen[name].add(column)
            if (count := count + len(rows)) == limit:
                break
    for one in seen.values():
        one.settle()
    left_out = {name: seen[name].refusal if name in seen else "without a short name of its own" for name in names}
    useful = {name: one for name, one in seen.items() if not one.refusal}
    for name in targets:
        if left_out[name]:
            raise UserError(f"--target={name} cannot be predicted, being {left_out[name]}; see {path}")
    labels = [name for name, one in useful.items() if one.counts.keys() <= LABELS.keys()]
    predicted = list(targets or labels[-1:])
    lines = [
        f"# A guess from {count:,} rows of {shown(str(path), 200)}: edit it. What is named nowhere is not read.",
        "data:",
        f"  {_line('name', 'table')}",
        f"  {_line('files', str(absolute(path)))}",
        *([] if separator == "," else [f"  {_line('separator', separator)}"]),
        "  targets:" if predicted else "  targets: {}  # name at least one column to predict",
        *(f"    {_line(name, useful[name].target())}  # {useful[name]}" for name in predicted),
        "  columns:",
        *(
            f"    {_line(name, one.feature(name))}  # {one}{'; may be a target' * (name in labels)}"
            for name, one in useful.items()
            if name not in predicted
        ),
    ]
    lines += [f"  # left out: {shown(name)}, {why}" for name, why in left_out.items() if why]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    text = yaml_text({name: value}, flow=True).strip()[1:-1]
    if "\n" in text:
        raise UserError(
            f"{name!r}: {shown(value)} does not go on one line of YAML; rename it, or write the schema yourself"
        )
    return text
