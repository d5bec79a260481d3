"""Tables: any number of binary and numeric targets of the rows of a table."""

from typing import ClassVar

from dist_moe.data.tables import CensusIncomeConfig, KuaiRandConfig, MovieLensTableConfig, TableConfig, TableSettings
from dist_moe.tasks.multi_task_tables.task import MultiTaskTablesTask
from dist_moe.tasks.settings import TaskSettings


class TableTask(TableSettings, TaskSettings):
    """A task on a table; a subclass has the settings of its data as well, which tell the targets."""

    kind: ClassVar[str] = MultiTaskTablesTask.kind
    places: ClassVar[tuple[str, ...]] = (*TaskSettings.places, "files")

    @property
    def target_names(self) -> tuple[str, ...]:
        """Names of the targets, in order."""
        return tuple(target.name for target in self.table_targets)

    def open(self, *, progress: bool) -> MultiTaskTablesTask:
        """Prepare the table and return the task."""
        return MultiTaskTablesTask(self.prepare(progress), self.table_targets)


class TableTaskSettings(TableConfig, TableTask):
    """A table of the user's own, with the targets that its schema names."""


class CensusIncomeSettings(CensusIncomeConfig, TableTask):
    """Census-Income (KDD), with the targets of MMoE."""


class KuaiRandSettings(KuaiRandConfig, TableTask):
    """KuaiRand, with a user's responses to a video as targets."""


class MovieLensTableSettings(MovieLensTableConfig, TableTask):
    """MovieLens with the features of users and items, as a table."""


TABLE_TASKS = (TableTaskSettings, CensusIncomeSettings, KuaiRandSettings, MovieLensTableSettings)

__all__ = ["TABLE_TASKS", "MultiTaskTablesTask", "TableTask"]
