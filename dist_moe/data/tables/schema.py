"""A table's schema: which columns are features of which kind, which are targets, and how the rows are split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from dist_moe.config.settings import LARGEST_SIZE, Settings
from dist_moe.data.prepared import PARTS
from dist_moe.data.tables.cells import canonical
from dist_moe.data.tables.columns import Target

Part: TypeAlias = Literal["train", "val", "test"]
Value: TypeAlias = str | bool | int | float
"""A cell as YAML writes it; `dist_moe.data.tables.cells.canonical` says which are the same."""


class Vocabulary(Settings):
    """Which values of the training rows have an id of their own; all others, and missing ones, have id 0."""

    min_count: int = Field(
        default=2,
        ge=1,
        description="Values that fewer training rows have share id 0, which so is trained for those never seen.",
    )
    max_size: int = Field(
        default=LARGEST_SIZE, ge=2, le=2**31 - 1, description="Ids at most, id 0 among them; the most frequent values."
    )


class CategoricalColumn(Vocabulary):
    """A column of categories, which become ids."""

    type: Literal["categorical"]


class ListColumn(Vocabulary):
    """A column of lists of categories: Parquet's lists, or texts that a separator parts."""

    type: Literal["list"]
    length: int = Field(default=20, ge=1, le=10_000, description="Entries of a row that are read; the first ones.")
    separator: str = Field(default="|", min_length=1, description="What parts the entries of a text.")


class NumericColumn(Settings):
    """A column of numbers: standardised by the training rows, missing ones the mean; or cut into buckets."""

    type: Literal["numeric"]
    buckets: int | None = Field(
        default=None,
        ge=2,
        le=100_000,
        description="Cut at quantiles of the training rows into so many ranges, each a category; missing is id 0.",
    )


class BinaryTarget(Settings):
    """A target that is 1 or 0, or missing: then the row is not labelled for it."""

    type: Literal["binary"]
    positive: tuple[Value, ...] | None = Field(
        default=None,
        min_length=1,
        description="Values that count as 1, all others as 0. If not given, the column holds 0 and 1, or false, true.",
    )


class NumericTarget(Settings):
    """A target that is a number, or missing: then the row is not labelled for it."""

    type: Literal["numeric"]


FeatureColumn = Annotated[CategoricalColumn | NumericColumn | ListColumn, Field(discriminator="type")]
TargetColumn = Annotated[BinaryTarget | NumericTarget, Field(discriminator="type")]


class Split(Settings):
    """How rows are shared out to train, validate and test where no files of their own are given for these."""

    val: float = Field(default=0.1, gt=0, lt=1, description="Share of the training rows to validate on.")
    test: float = Field(default=0.1, gt=0, lt=1, description="Share of the training rows to test on.")
    seed: int = Field(default=0, ge=0, description="Seed of the rows that are drawn.")
    latest_by: str | None = Field(
        default=None,
        description="Column of times (numbers, dates or ISO texts): the latest rows are tested on, those before "
        "validated on. If not given, they are drawn.",
    )
    column: str | None = Field(default=None, description="Column that says to which part a row belongs.")
    values: Mapping[Part, tuple[Value, ...]] = Field(
        default={"train": ("train",), "val": ("val",), "test": ("test",)},
        description="Its values, by part. A part that is left out is taken from the training rows.",
    )

    @model_validator(mode="after")
    def _can_be_done(self) -> Split:
        if self.val + self.test >= 1:
            raise ValueError(f"val={self.val:g} and test={self.test:g} leave nothing to train on; lower them")
        if self.column is not None and not self.values.get("train"):
            raise ValueError(f"values={dict(self.values)} names none of the training rows; add train: [...]")
        return self


class TableSchema(Settings):
    """Which columns of a table mean what. Columns that are named nowhere are not read."""

    columns: dict[str, FeatureColumn] = Field(min_length=1, description="Features by name.")
    targets: dict[str, TargetColumn] = Field(min_length=1, description="Columns to predict by name.")
    weight: str | None = Field(default=None, description="Column of weights of the rows in losses, from 0.")
    group: str | None = Field(default=None, description="Column of groups, such as users, for metrics within each.")
    missing: tuple[Value, ...] = Field(
        default=(), description='Cells that mean a missing value besides empty ones, such as "?", "NA" or -1.'
    )
    split: Split = Field(default=Split(), description="How rows are shared out to train, validate and test.")

    @model_validator(mode="after")
    def _tells_no_answers(self) -> TableSchema:
        for role, name in (("weight", self.weight), ("split.column", self.split.column)):
            if name is not None and (name in self.columns or name in self.targets):
                raise ValueError(f"{role}={name!r} is among columns or targets too; leave it out of them")
        if both := sorted(self.columns.keys() & self.targets.keys()):
            raise ValueError(f"columns and targets both have {both[0]!r}, which tells the answer; leave it in one")
        return self

    @property
    def table_targets(self) -> tuple[Target, ...]:
        """Names and kinds of the targets, in order."""
        return tuple(Target(name, target.type) for name, target in self.targets.items())

    @property
    def absent(self) -> frozenset[str]:
        """The words for a missing cell as categories, such as "-1" for "-1.0"."""
        return frozenset(canonical(str(value)) for value in self.missing)

    @property
    def names(self) -> tuple[str, ...]:
        """All columns that are read for the arrays, each once."""
        roles = [name for name in (self.weight, self.group) if name is not None]
        return tuple(dict.fromkeys([*self.columns, *self.targets, *roles]))


assert Part.__args__ == PARTS  # type: ignore[attr-defined]
