"""A small sweep file, and what the tests do with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from optuna.storages import RDBStorage

from dist_moe.sweeps.directory import SweepDirectory
from dist_moe.sweeps.plan import plan_sweep
from dist_moe.sweeps.runner import TrialRunner
from dist_moe.sweeps.study import Studies
from dist_moe.sweeps.worker import Finished, Worker

LR = "deepspeed.optimizer.params.lr"
BASE: dict[str, Any] = {"deepspeed": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}}
SWEEP: dict[str, Any] = {
    "config": "base.yaml",
    "trials": 3,
    "best_fraction": 0.5,
    "space": {LR: {"log_uniform": [1e-4, 1e-2]}, "model.experts.dropout": {"uniform": [0.0, 0.5]}},
    "rows": {
        "COMET": {
            "set": {"model.gate": {"name": "comet", "k": 2}},
            "space": {"model.gate.gamma": {"choice": [0.1, 1]}},
        },
        "Top-k": {"set": {"model.gate": {"name": "top_k", "k": 2}}},
    },
}

TOP_K = {"rows": {"Top-k": SWEEP["rows"]["Top-k"]}}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write SWEEP with some keys replaced, beside its base configuration; the path of the sweep file."""
    return writer(tmp_path)


def writer(root: Path) -> Write:
    """A function that writes below ``root``."""

    def write_files(base: dict[str, Any] = BASE, **changes: Any) -> Path:
        (root / "base.yaml").write_text(yaml.safe_dump(base))
        path = root / "small.yaml"
        path.write_text(yaml.safe_dump(SWEEP | changes))
        return path

    return write_files


@cache
def empty_database() -> bytes:
    """Optuna's tables, whose making is most of what a small study costs."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "empty.db"
        RDBStorage(f"sqlite:///{path}")
        return path.read_bytes()


class Bench:
    """Sweeps in this process, without the processes of the command line."""

    def __init__(self, root: Path) -> None:
        self._write = writer(root)
        self.directory = SweepDirectory(root / "sweep")
        self.directory.create()
        self.directory.database.write_bytes(empty_database())

    def studies(self, retry_failed: bool = False, base: dict[str, Any] = BASE, **changes: Any) -> Studies:
        plan = plan_sweep(self._write(base, **changes))
        studies = Studies(self.directory, plan)
        if not self.directory.base.exists():
            self.directory.base.write_text(yaml.safe_dump(plan.base))
        studies.begin(retry_failed)
        return studies

    def worker(self, studies: Studies, run: TrialRunner, news: list[Finished]) -> Worker:
        return Worker(studies, run, self.directory.base, f"worker {id(news)}", news.append, nullcontext)

    def work(self, studies: Studies, run: TrialRunner, together: int = 1, at_most: int = 1000) -> list[Finished]:
        """Let one worker work until nothing is left, or until ``at_most`` trials have ended."""
        news: list[Finished] = []
        self.worker(studies, run, news).work(together, lambda: len(news) >= at_most)
        return news


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)
