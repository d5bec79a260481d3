"""The runs of a study: one configuration under different overrides, trained once each, some side by side."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_moe.engine.run_directory import RunDirectory


@dataclass(frozen=True)
class StudyRun:
    """A run in ``directory`` of the configuration ``config`` under ``overrides``."""

    directory: Path
    config: Path
    overrides: tuple[str, ...]

    @property
    def summary(self) -> dict[str, Any]:
        """Of the trained run."""
        content: dict[str, Any] = json.loads(RunDirectory(self.directory).summary.read_text())
        return content

    def train(self) -> None:
        """To its end, unless that has been done. Raises SystemExit if it fails."""
        if RunDirectory(self.directory).summary.exists():
            print(f"{self.directory}: trained already", flush=True)
            return
        dist_moe("train", self.config, *self.overrides, "--run-dir", self.directory, "--auto-resume")
        print(f"{self.directory}: trained", flush=True)


def train_all(runs: Iterable[StudyRun], at_once: int) -> None:
    """``at_once`` of them side by side, a thread each."""
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(StudyRun.train, runs))


def dist_moe(*arguments: object) -> str:
    """What the command prints; one thread. Raises SystemExit with its last words if it fails."""
    words = [sys.executable, "-m", "dist_moe", *map(str, arguments)]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def directory_name(*parts: object) -> str:
    """One name of several words: ``Top-k + balance loss``, 0 -> ``top-k_+_balance_loss-0``."""
    return "-".join(str(part).lower().replace(" ", "_") for part in parts)


def spread(numbers: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation, with ``digits`` decimals."""
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{deviation}"
