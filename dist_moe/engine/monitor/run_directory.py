"""A run directory: everything that a run leaves behind, in one place.

config.yaml         the resolved configuration
identity.json       digests of the data, and of the weights that it starts from or follows
environment.json    versions, machine, command line
metrics.jsonl       one object per step, and {"step": .., "validation": {..}} after a step that was validated
metrics.jsonl.bad   lines that stood there and are no records, if there were any
events.out.tfevents.*   TensorBoard's: the same and more, to look at
checkpoints/        see dist_moe.engine.checkpoint.format
summary.json        test metrics, beside those of simple predictors
result.json         of a stage of a recipe: what it found; written last, so that its presence means that it has finished
report.html         the run as a page, see dist_moe.report
*.png               pictures of the test, of tasks that have some
run-000001.lock     while a job works here, see dist_moe.engine.monitor.run_lock

config.yaml is written with the first records or the first checkpoint, so that its presence means that there is
something to lose or to go on from: a start that failed before leaves nothing that is in the way of the next.
"""

from __future__ import annotations

import os
import platform
import weakref
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dist_moe.config.files import replace_text, write_json
from dist_moe.config.plain_yaml import yaml_text
from dist_moe.engine.checkpoint.files import best_of, checkpoints_of, complete_directories
from dist_moe.engine.launch.environment import LaunchEnvironment, typed_command
from dist_moe.engine.monitor.record_file import last_step_in, sift_records
from dist_moe.errors import UserError

_FILES = ("config.yaml", "environment.json", "metrics.jsonl", "metrics.jsonl.bad", "summary.json", "stall.txt")
_DIRECTORIES = ("heartbeats", "checkpoints", "best", "stages")
_PACKAGES = ("torch", "deepspeed", "torchx", "tensorboard", "numpy", "scipy", "pydantic", "safetensors")


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run under ``root``."""

    root: Path

    @property
    def config(self) -> Path:
        """The file of the resolved configuration."""
        return self.root / "config.yaml"

    @property
    def identity(self) -> Path:
        """The file of digests, see dist_moe.recipes.identity."""
        return self.root / "identity.json"

    @property
    def environment(self) -> Path:
        """The file of versions, machine and command line."""
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        """The file with a line per step and per validation."""
        return self.root / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """The file of what a stage found, which is there when it has finished."""
        return self.root / "result.json"

    @property
    def summary(self) -> Path:
        """The file of test metrics."""
        return self.root / "summary.json"

    def check_unused(self, option: str = "--run-dir") -> None:
        """Raise UserError, naming the command's ``option``, if the directory holds a run, or what is left of one."""
        if self.config.exists():
            raise UserError(
                f"{option} {self.root} holds a run already; name another directory, or go on with that run by "
                f"'dist-moe train --resume {self.root}'"
            )
        checkpoints = checkpoints_of(self.root)
        for path in (self.summary, self.metrics, checkpoints, best_of(checkpoints), *self.stages.glob("*/config.yaml")):
            if any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size:
                raise UserError(
                    f"{option} {self.root} holds {path.name} of a run, though no {self.config.name}: nothing is "
                    f"written over it; name another directory, or move {path} away"
                )

    def check_kinds(self) -> None:
        """Raise UserError if there is a file where a run has a directory, here or in a stage, or the reverse."""
        for name, is_right, kind in (
            *((name, os.path.isfile, "no file") for name in _FILES),
            *((name, os.path.isdir, "no directory") for name in _DIRECTORIES),
        ):
            path = self.root / name
            if os.path.lexists(path) and not is_right(path):
                raise UserError(f"{path} is {kind}, and a run needs one there; move it away")
        for stage in self.stages.iterdir() if self.stages.is_dir() else ():
            if os.path.lexists(stage) and not stage.is_dir():
                raise UserError(f"{stage} is no directory, and each stage of a run is one; move it away")
            RunDirectory(stage).check_kinds()

    def check_exists(self) -> None:
        """Raise UserError if the directory holds no run."""
        if not self.config.is_file():
            raise UserError(f"{self.root} is not a run directory: it has no {self.config.name}")

    @property
    def has_progress(self) -> bool:
        """Return whether there is something from which a run can go on: a checkpoint, or a stage of a recipe."""
        return bool(complete_directories(checkpoints_of(self.root)) or any(self.stages.glob(f"*/{self.config.name}")))

    @property
    def stages(self) -> Path:
        """The directory of a recipe's stages, each a run directory of its own."""
        return self.root / "stages"

    def create(self) -> None:
        """Make the directory; UserError if that cannot be done."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--run-dir {self.root} cannot be made: {error}") from error

    def describe(self, config: dict[str, Any], environment: LaunchEnvironment) -> None:
        """Write the resolved configuration and, if it is not there yet, the versions and machine of the beginning."""
        replace_text(self.config, yaml_text(config))
        if self.environment.exists():
            return
        write_json(
            self.environment,
            {
                "command": typed_command(),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "processors": os.cpu_count(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "world_size": environment.world_size,
                "packages": _versions(),
            },
        )

    @property
    def last_step(self) -> int:
        """The last step of which there is a record; 0 if there is none. Raises UserError if they cannot be read."""
        try:
            return last_step_in(self.metrics) if self.metrics.exists() else 0
        except OSError as error:
            raise UserError(f"{self.metrics} cannot be read: {error}") from error

    def forget_metrics_after(self, step: int) -> int:
        """Drop the records of steps that a resumed run will do again, and a record cut short at the end.

        Lines that are no records are moved to metrics.jsonl.bad. Returns how many there were before the first record
        that is dropped: the others stood among what is recorded again. Raises UserError if that cannot be done.
        """
        try:
            return sift_records(self.metrics, step) if self.metrics.exists() else 0
        except OSError as error:
            raise UserError(f"{self.metrics} cannot be cut for a run that goes on: {error}") from error


class OpenDirectory:
    """A directory that is held open, by which is known when its path leads to another one, or to none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.close = weakref.finalize(self, os.close, self._descriptor)

    @property
    def is_there(self) -> bool:
        """Whether the path still leads to it."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # its server is away for a while, which says nothing of where it is
            return True

    def find(self) -> Path | None:
        """Return where it is now; None if it was removed, or if this system cannot tell."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
            return path if os.path.samestat(os.stat(path), os.fstat(self._descriptor)) else None
        except OSError:
            return None
