"""The benchmark: choose jobs, run what has not been measured yet, write the report after each."""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from dist_moe.errors import UserError
from tools.bench import jobs, regression, report, selection
from tools.bench.layer import CANDIDATES
from tools.bench.timing import Clock

VERSIONS = ("torch", "deepspeed", "fairscale", "transformers")


@dataclass(frozen=True)
class Options:
    """Choices of the command line. ``only``: parts of job names, ``candidates``: of candidates' names."""

    scope: str = "default"
    only: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    output: Path = Path("results")
    seconds: float = 20.0
    seed: int = 0
    again: bool = False
    clock: Clock = "wall"
    command: str = "dist-moe bench"


def run(options: Options) -> int:
    """0, or 1 if a job failed. What is in ``output`` already is not measured again, unless asked for."""
    chosen = _chosen(options)
    before = signal.signal(signal.SIGTERM, _leave)  # so that the processes started here are ended too
    try:
        return _run(chosen, options)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(chosen: list[jobs.Job], options: Options) -> int:
    known = report.read(options.output)
    results: report.Results = known["results"]
    known_seed = known["about"].get("seed", options.seed)
    if results and known_seed != options.seed:
        raise UserError(
            f"{options.output}: holds figures of seed {known_seed}, not {options.seed}; give another --output"
        )
    failed = []
    for number, job in enumerate(chosen, start=1):
        line = f"{number}/{len(chosen)} {job.name}"
        if job.name in results and not options.again:
            print(f"{line}: measured already", flush=True)
            continue
        started = time.monotonic()
        print(line, flush=True)
        try:
            results[job.name] = jobs.run(job, tuple(c.name for c in CANDIDATES), _say)
        except jobs.JobFailed as failure:
            failed.append(job.name)
            print(f"    failed: {failure}", flush=True)
            continue
        report.write(options.output, about(options), _in_order(results))
        print(f"    {time.monotonic() - started:.0f} s", flush=True)
    if not failed:
        report.write(options.output, about(options), _in_order(results))
    print(f"written to {options.output / report.MARKDOWN}", flush=True)
    return 1 if failed else 0


def check(options: Options) -> int:
    """0 if the ratios are within their committed spread, else 1, with the reasons: what is outside of it twice."""
    committed = regression.read()
    found = _slower(options, committed)
    if found:
        print(f"{len(found)} ratio(s) outside their committed spread: measuring again, to be sure", flush=True)
        again = _slower(options, committed)
        found = {name: reason for name, reason in again.items() if name in found}
    for reason in found.values():
        print(f"slower: {reason}")
    print(f"{len(found)} ratio(s) outside their committed spread")
    return 1 if found else 0


def _slower(options: Options, committed: dict[str, regression.Ratio]) -> dict[str, str]:
    return regression.slower(regression.measure(options.seconds / 4, options.seed, _say), committed)


def commit_ratios(options: Options) -> int:
    """Measure what :func:`check` compares with, and write it."""
    regression.write(regression.measure(options.seconds, options.seed, _say), about(options))
    print(f"written to {regression.COMMITTED}")
    return 0


def about(options: Options) -> dict[str, Any]:
    """Return command, seed and machine that belong to the figures."""
    return {"command": options.command, "seed": options.seed, "machine": machine()}


def machine() -> str:
    """The processor and the versions, in a sentence."""
    versions = ", ".join(f"{package} {_version(package)}" for package in VERSIONS)
    return f"{os.cpu_count()} cores of {_processor()}; {versions}."


def _version(package: str) -> str:
    try:
        return metadata.version(package).split("+")[0]
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _chosen(options: Options) -> list[jobs.Job]:
    every = selection.jobs(options.scope, options.seconds, options.seed, options.candidates, options.clock)
    chosen = [job for job in every if not options.only or any(part in job.name for part in options.only)]
    if not chosen:
        names = "\n  ".join(job.name for job in every)
        raise UserError(f"--only {' '.join(options.only)}: no job has that in its name; there are:\n  {names}")
    return chosen


def _in_order(results: report.Results) -> report.Results:
    """Jobs of the default selection first, as it has them; then the others by name."""
    first = [job.name for scope in ("default", "quick") for job in selection.jobs(scope, 0, 0, ())]
    places = {name: place for place, name in reversed(list(enumerate(first)))}
    return dict(sorted(results.items(), key=lambda item: (places.get(item[0], len(first)), item[0])))


def _leave(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def _say(what: str) -> None:
    print(f"    {what}", flush=True)
