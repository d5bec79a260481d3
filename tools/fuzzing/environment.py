"""Odd environment variables; what is accepted must be the number or the path that stands in them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_moe.data.fetch.files import CACHE_ENV, cache_directory
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.recipes.recipe import plan_new_run
from tests.data.tiny_movielens import write_tiny_movielens
from tests.helpers.runs import write_config
from tools.fuzzing.case import Area, Case
from tools.fuzzing.mutate import words

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GOOD = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
}
OTHERS = ("HOME", "TMPDIR", CACHE_ENV, "OMP_NUM_THREADS", "DIST_MOE_DATA_ROOT", "COLUMNS", "LANG")
ODD = (
    *words("-1 0 1 2 abc 1.5 1e3 +1 0x1 nan /nowhere/at/all ~nobody/x ~ relative /dev/null"),
    *("", " ", " 1", "1 ", "\u0661", "\u00b2", "\udcff", "9" * 20, "9" * 5000, "/" + "a" * 300),
)


class EnvironmentArea(Area):
    """Variables of launchers and of the system, before a run is planned."""

    name = "environment"

    def prepare(self) -> None:
        """Write a configuration on tiny data."""
        root = write_tiny_movielens(self.base / "raw", users=40, items=20)
        write_config(self.base, {"root": str(root), "cache": str(self.base / "cache")})
        plan_new_run(self.base / "config.yaml", [], self.base / "run")

    def case(self, drawn: random.Random, user: Path, ours: Path) -> Case:
        """Set some variables oddly."""
        variables: dict[str, str | None] = dict(GOOD) if drawn.random() < 0.7 else dict.fromkeys(LAUNCHER)
        for name in drawn.sample((*LAUNCHER, *LAUNCHER, *OTHERS), drawn.choice([1, 1, 2, 3])):
            variables[name] = drawn.choice([None, *ODD])

        def run() -> Any:
            with _set(variables):
                environment = LaunchEnvironment.read()
                cache = cache_directory(None)
                plan_new_run(self.base / "config.yaml", [], ours / "run")
                return environment, cache

        def check(found: Any) -> str | None:
            environment, cache = found
            if environment.launched:
                for name, value in (("RANK", environment.rank), ("WORLD_SIZE", environment.world_size)):
                    if int(variables[name] or "") != value:
                        return f"{name}={variables[name]!r} is read as {value}"
                if not 0 <= environment.rank < environment.world_size:
                    return f"rank {environment.rank} of {environment.world_size}"
            given = variables.get(CACHE_ENV)
            if given and not given.startswith("~") and Path(given).absolute() != cache:
                return f"{CACHE_ENV}={given!r} is read as {cache}"
            return None

        shown = ", ".join(f"{name}={value[:40]!r}" for name, value in variables.items() if value is not None)
        return Case(shown, run, check)


@contextmanager
def _set(variables: dict[str, str | None]) -> Iterator[None]:
    before = dict(os.environ)
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
