"""Tables: any number of binary and numeric targets of the rows of a table."""

from abc import abstractmethod
from typing import ClassVar

from dist_moe.data.tables import PreparedTable, TableConfig, Target, prepare_own_table
from dist_moe.tasks.multi_task_tables.task import MultiTaskTablesTask
from dist_moe.tasks.settings import TaskSettings


class TableTask(TaskSettings):
    """A task on a table; a subclass has the settings of its data as well, which tell targets and prepare the table."""

    kind: ClassVar[str] = MultiTaskTablesTask.kind

    @property
    @abstractmethod
    def table_targets(self) -> tuple[Target, ...]:
        """The targets, in order, as the configuration alone tells them."""

    @abstractmethod
    def prepare(self, progress: bool) -> PreparedTable:
        """Return the table, prepared once. Raises UserError."""

    @property
    def target_names(self) -> tuple[str, ...]:
        """Names of the targets, in order."""
        return tuple(target.name for target in self.table_targets)

    def open(self, *, progress: bool) -> MultiTaskTablesTask:
        """Prepare the table and return the task."""
        return MultiTaskTablesTask(self.prepare(progress), self.table_targets)


class TableTaskSettings(TableConfig, TableTask):
    """A table of the user's own, with the targets that its schema names."""

    def prepare(self, progress: bool) -> PreparedTable:
        """Return the table."""
        return prepare_own_table(self, progress=progress)


__all__ = ["MultiTaskTablesTask", "TableTask", "TableTaskSettings"]
