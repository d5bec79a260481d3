"""A sweep directory: everything that a sweep leaves behind, and who works on it now.

studies.db      Optuna's studies, one per row
base.yaml       the base configuration, as it was when the sweep began
report/         see report.py
*.lock          held by living processes; the kernel frees them when a process dies
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dist_moe.errors import UserError


@dataclass(frozen=True)
class SweepDirectory:
    """The paths of a sweep under ``root``."""

    root: Path

    @property
    def database(self) -> Path:
        """Optuna's studies."""
        return self.root / "studies.db"

    @property
    def base(self) -> Path:
        """The base configuration."""
        return self.root / "base.yaml"

    @property
    def report(self) -> Path:
        """The directory of the report."""
        return self.root / "report"

    def create(self) -> None:
        """Make the directory. Raises UserError if that cannot be done, or if something else stands in it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--sweep-dir {self.root} cannot be made: {error}") from error
        for path in (self.database, self.base, self.root / "taking.lock", self.root / "working.lock"):
            if os.path.lexists(path) and not path.is_file():
                raise UserError(f"{path} is no file, and a sweep needs one there; move it away")
        if os.path.lexists(self.report) and not self.report.is_dir():
            raise UserError(f"{self.report} is no directory, and a sweep needs one there; move it away")

    def check_exists(self) -> None:
        """Raise UserError if no sweep has begun here."""
        if not self.database.is_file():
            raise UserError(f"{self.root} holds no sweep to report: it has no {self.database.name}")

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Exclude all other processes while trials change hands; not to be nested."""
        with (self.root / "taking.lock").open("a", encoding="utf-8") as file:
            self._flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def working(self) -> Iterator[bool]:
        """Be present while inside; gives True if no other living process is. Enter it within ``taking``."""
        with (self.root / "working.lock").open("a", encoding="utf-8") as file:
            try:
                self._flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                alone = False
            self._flock(file, fcntl.LOCK_SH)
            yield alone

    def _flock(self, file: IO[str], operation: int) -> None:
        try:
            fcntl.flock(file, operation)
        except BlockingIOError:
            raise
        except OSError as error:
            raise UserError(
                f"--sweep-dir {self.root} is on a file system without flock ({error.strerror}), by which the processes "
                f"of a sweep share its trials; name a directory on another one"
            ) from error
