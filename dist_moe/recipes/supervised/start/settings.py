"""Starts by name: what the section ``start`` of a configuration can mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import SerializeAsAny

from dist_moe.config.files import digest_of
from dist_moe.config.registry import Registry
from dist_moe.config.settings import Settings
from dist_moe.data.digests import digest_of_content
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.recipes.supervised.runs import digest_of_weights
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

    def digest(self, task: Task) -> str | None:
        """Return a digest of the first weights, by which a run is known: of what lies at ``places``; None if nothing.

        ``run`` is a run, a checkpoint or an exported file, of which the values count.
        """
        found = {name: _digest_of_place(name, getattr(self, name)) for name in self.places if hasattr(self, name)}
        there = {name: digest for name, digest in found.items() if digest is not None}
        return digest_of_content(there) if there else None

    @abstractmethod
    def fill(self, model: Any, config: Any, task: Task, environment: LaunchEnvironment) -> None:
        """Give the model of a new run its first weights. Collective over all ranks."""


def _digest_of_place(name: str, place: Any) -> str | None:
    path = Path(place).expanduser() if isinstance(place, str | Path) else None
    if path is None or not path.exists():
        return None
    if name == "run":
        return digest_of_weights(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return digest_of_content([(str(file.relative_to(path)), digest_of(file)) for file in files])


STARTS = Registry("start", StartSettings)

StartConfig = Annotated[SerializeAsAny[StartSettings], STARTS]
"""The type of a configuration field that holds any registered start."""


def start_of(model_name: str) -> type[StartSettings] | None:
    """Return the start that is registered for a model, None if there is none."""
    return next((start for start in STARTS.classes if model_name in start.models), None)
