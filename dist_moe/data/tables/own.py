"""The user's own table in CSV or Parquet files, as the configuration describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dist_moe.data.fetch.progress import Progress
from dist_moe.data.prepared import PARTS
from dist_moe.data.tables.files import SEPARATOR, TableFile, own_files
from dist_moe.data.tables.prepare import PreparedTable, TableSettings, TableSource, prepare_table
from dist_moe.data.tables.schema import Part, TableSchema


class TableConfig(TableSchema, TableSettings):
    """A table of the user's own: its files, and what their columns mean; 'dist-moe data inspect FILE' writes one."""

    name: Literal["table"] = "table"
    root: Path | None = Field(
        default=None, description="Directory that files are relative to; if not given, the current one."
    )
    files: dict[Part, tuple[Path, ...]] = Field(
        description="A CSV or Parquet file, a directory of them, or a list; or these for each of train, val and test, "
        "of which val and test may be left out.",
    )
    separator: str = Field(default=",", pattern=SEPARATOR, description="What parts the cells of CSV files.")

    @field_validator("files", mode="before")
    @classmethod
    def _by_part(cls, value: Any) -> Any:
        parts = value if isinstance(value, dict) else {"train": value}
        return {part: several if isinstance(several, list | tuple) else [several] for part, several in parts.items()}

    @model_validator(mode="after")
    def _has_rows_to_train_on(self) -> TableConfig:
        if not all(self.files.values()) or "train" not in self.files:
            raise ValueError("files must name one at least for each part that it has, and train among them")
        named = set(self.split.values) - {"train"} if self.split.column is not None else set()
        if both := sorted(named & set(self.files)):
            raise ValueError(f"files and split.values both say which rows are for {both[0]}; leave one of them out")
        return self

    @property
    def table_schema(self) -> TableSchema:
        """The schema: the configuration has its fields among its own."""
        return self

    def prepare(self, progress: bool) -> PreparedTable:
        """Return the table, as `prepare_own_table`."""
        return prepare_own_table(self, progress=progress)


def prepare_own_table(config: TableConfig, *, progress: bool = True) -> PreparedTable:
    """Return the user's table, prepared once for each content of its files and each schema.

    ``progress``: report on stderr. Raises `UserError` for anything that the user can fix.
    """
    files: dict[Part, list[TableFile]] = {}
    digests: dict[str, dict[str, str]] = {}
    for part in PARTS:
        if part in config.files:
            root = config.root or Path()
            found = [item for path in config.files[part] for item in own_files(root / path, config.separator)]
            files[part] = [file for file, _ in found]
            digests[part] = {str(file.path): digest for file, digest in found}
    source = TableSource(files, {"name": "files", "sha256": digests})
    key = str({part: list(of.values()) for part, of in digests.items()}) + config.separator
    return prepare_table(config, config, key, lambda *_: source, Progress(progress))
