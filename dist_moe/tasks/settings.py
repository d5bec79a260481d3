"""Tasks by name: what the section ``data`` of a configuration can mean.

To add a task: derive a class from :class:`TaskSettings` (and from the settings of a data set, where it has some),
register it, here or in a module under ``imports``. See docs/extending/task.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

from pydantic import SerializeAsAny

from dist_moe.config.registry import Registry
from dist_moe.config.settings import Settings
from dist_moe.tasks.task import Task


class TaskSettings(Settings, ABC):
    """Which data to learn from, and what to learn from it.

    ``kind``: that of the task and of models that fit; of these the one registered first is taken unasked.
    ``places``: fields that say where files are, which may differ when a run is resumed.
    """

    kind: ClassVar[str]
    places: ClassVar[tuple[str, ...]] = ("root", "cache", "encoder")

    name: str

    @property
    @abstractmethod
    def target_names(self) -> tuple[str, ...]:
        """Names of what a model predicts for an example, each with a loss of its own; a class variable will do."""

    @abstractmethod
    def open(self, *, progress: bool) -> Task:
        """Prepare the data and return the task. Raises UserError if the data cannot be had.

        Called on all ranks at once; ``progress``: whether this one reports on stderr.
        """


TASKS = Registry("data set", TaskSettings, default="movielens-1m")

TaskConfig = Annotated[SerializeAsAny[TaskSettings], TASKS]
"""The type of a configuration field that holds any registered task."""
