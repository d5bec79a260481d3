"""A run directory: everything that a run leaves behind, in one place.

config.yaml         the resolved configuration
environment.json    versions, machine, command line
metrics.jsonl       one object per step, and {"step": .., "validation": {..}} after a step that was validated
tensorboard/        the same and more, to look at
checkpoints/        see dist_moe.engine.checkpoint.format
summary.json        test metrics, beside those of simple predictors
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dist_moe.config.files import replace_text, write_json
from dist_moe.config.plain_yaml import yaml_text
from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.errors import UserError

_PACKAGES = ("torch", "deepspeed", "torchx", "tensorboard", "numpy", "scipy", "pydantic", "safetensors")


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run under ``root``."""

    root: Path

    @property
    def config(self) -> Path:
        """The file of the resolved configuration."""
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        """The file of versions, machine and command line."""
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        """The file with a line per step and per validation."""
        return self.root / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The file of test metrics."""
        return self.root / "summary.json"

    def check_unused(self, option: str = "--run-dir") -> None:
        """Raise UserError, naming the command's ``option``, if the directory holds a run already."""
        if self.config.exists():
            raise UserError(
                f"{option} {self.root} holds a run already; name another directory, or go on with that run by "
                f"'dist-moe train --resume {self.root}'"
            )
        if complete_directories(checkpoints_of(self.root)):
            raise UserError(
                f"{option} {self.root} holds checkpoints already, of a run without {self.config.name}; name another "
                f"directory, or put the file back"
            )

    def check_exists(self) -> None:
        """Raise UserError if the directory holds no run."""
        if not self.config.is_file():
            raise UserError(f"{self.root} is not a run directory: it has no {self.config.name}")

    @property
    def has_progress(self) -> bool:
        """Return whether there is something from which a run can go on: a checkpoint, or a stage of a recipe."""
        return bool(complete_directories(checkpoints_of(self.root))) or self.stages.is_dir()

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
                "command": sys.argv,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "processors": os.cpu_count(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "world_size": environment.world_size,
                "packages": {name: version(name) for name in _PACKAGES},
            },
        )

    def forget_metrics_after(self, step: int) -> None:
        """Drop the records of steps that a resumed run will do again, and a line cut short."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if record["step"] <= step:
                kept.append(line + "\n")
        replace_text(self.metrics, "".join(kept))
