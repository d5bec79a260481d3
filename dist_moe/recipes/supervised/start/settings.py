"""Starts by name: what the section ``start`` of a configuration can mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar

from pydantic import SerializeAsAny

from dist_moe.config.registry import Registry
from dist_moe.config.settings import Settings
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.tasks import Task


class StartSettings(Settings, ABC):
    """A source of first weights for a new run's model.

    ``models``: names of the models that it is for. ``is_default``: whether these begin with it unasked.
    ``places``: fields that say where files are, which may differ when a run is resumed.
    """

    models: ClassVar[tuple[str, ...]]
    is_default: ClassVar[bool] = False
    places: ClassVar[tuple[str, ...]] = ("run",)

    name: str

    @abstractmethod
    def check(self, config: Any, task: Task) -> None:
        """Raise UserError for what a new run of ``config`` could not begin with; needs no process group."""

    @abstractmethod
    def fill(self, model: Any, config: Any, task: Task, environment: LaunchEnvironment) -> None:
        """Give the model of a new run its first weights. Collective over all ranks."""


STARTS = Registry("start", StartSettings)

StartConfig = Annotated[SerializeAsAny[StartSettings], STARTS]
"""The type of a configuration field that holds any registered start."""


def start_of(model_name: str) -> type[StartSettings] | None:
    """Return the start that is registered for a model, None if there is none."""
    return next((start for start in STARTS.classes if model_name in start.models), None)
