"""Jobs: what is measured in processes of its own, so that no candidate can disturb another's memory or take the
benchmark with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dist_moe.config.files import json_line, parse_json
from tools.bench.timing import Clock
from tools.bench.workloads import Workload

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 300.0
"""Without any progress."""
COUNTING = "call "
"""How progress begins that is only watched, not told."""


@dataclass(frozen=True)
class Job:
    """``study`` of ``workload``. ``seconds``: to spend on timing. ``candidates``: parts of names; none is all.
    ``excluded``: candidates that are not to be tried, with the reason. ``clock``: "cpu" is processor time of one
    thread, for a machine that is busy with other things; on one rank only."""

    study: str
    workload: Workload
    seconds: float = 20.0
    seed: int = 0
    candidates: tuple[str, ...] = ()
    excluded: dict[str, str] = field(default_factory=dict)
    disable_malloc_trim: bool = True
    clock: Clock = "wall"

    @property
    def name(self) -> str:
        given_back = "" if self.disable_malloc_trim else "-given-back"
        clock = "-cpu-time" if self.clock == "cpu" else ""
        return f"{self.study}/{self.workload.name}{given_back}{clock}"

    @classmethod
    def read(cls, path: Path) -> Job:
        told = parse_json(path.read_text(encoding="utf-8"))
        return cls(
            **told | {"workload": Workload(**told["workload"]), "candidates": tuple(told["candidates"])},
        )

    def write(self, path: Path) -> None:
        path.write_text(json_line(asdict(self)), encoding="utf-8")


class JobFailed(Exception):
    """``doing``: what it was at, a candidate's name perhaps."""

    def __init__(self, doing: str, reason: str) -> None:
        super().__init__(f"{doing}: {reason}")
        self.doing = doing
        self.reason = reason


def run(job: Job, candidates: tuple[str, ...], say: Callable[[str], None]) -> dict[str, Any]:
    """Return the measurements of the job. A candidate that fails, kills its process or hangs is left out, and the rest
    is measured without it. Raises JobFailed where something else fails."""
    while True:
        try:
            return _run(job, say)
        except JobFailed as failure:
            if failure.doing not in candidates or failure.doing in job.excluded:
                raise
            say(f"without {failure}")
            job = replace(job, excluded=job.excluded | {failure.doing: f"fails: {failure.reason}"})


def _run(job: Job, say: Callable[[str], None]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dist_moe_bench_") as directory:
        path = Path(directory) / "job.json"
        job.write(path)
        ranks = [_start(path, rank, job.workload.ranks, port) for port in [_free_port()] for rank in _ranks(job)]
        try:
            _wait(ranks, path, say)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        measured: dict[str, Any] = parse_json(path.with_suffix(".measured").read_text(encoding="utf-8"))
        return measured


def _ranks(job: Job) -> range:
    return range(job.workload.ranks)


def _start(path: Path, rank: int, size: int, port: int) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(REPOSITORY), environment.get("PYTHONPATH")) if part
    )
    environment.pop("OMP_NUM_THREADS", None)
    if size > 1:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": 1}
        environment |= {name: str(value) for name, value in told.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with path.with_suffix(f".log-{rank}").open("wb") as log:
        command = [sys.executable, "-m", "tools.bench.worker", str(path)]
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)


def _wait(ranks: list[subprocess.Popen[bytes]], path: Path, say: Callable[[str], None]) -> None:
    now, last_change = "starting", time.monotonic()
    while any(process.poll() is None for process in ranks):
        if (found := _read(path.with_suffix(".now"), now)) != now:
            if not found.startswith(COUNTING):
                say(found)
            now, last_change = found, time.monotonic()
        failed = [rank for rank, process in enumerate(ranks) if process.poll()]
        if failed:
            break
        if time.monotonic() - last_change > PATIENCE_S:
            raise JobFailed(now, f"no progress for {PATIENCE_S:.0f} s")
        time.sleep(0.1)
    for rank, process in enumerate(ranks):
        if process.poll():
            log = _read(path.with_suffix(f".log-{rank}"), "").strip().splitlines()
            ended = f"exit code {process.returncode}: {log[-1] if log else ''}"
            raise JobFailed(_read(path.with_suffix(".now"), now), _read(path.with_suffix(f".failed-{rank}"), ended))


def _read(path: Path, otherwise: str) -> str:
    return path.read_text(errors="replace", encoding="utf-8") if path.exists() else otherwise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
