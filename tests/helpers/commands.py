"""The command line as people use it: on ranks that are warm already, or in processes of its own."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from dist_moe.cli.main import main
from dist_moe.engine import training as loop
from tests.helpers.pool import on_ranks

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 180.0


@dataclass(frozen=True)
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


def run_here(arguments: Sequence[str]) -> Outcome:
    """``dist-moe ARGUMENTS`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    return Outcome(code, out.getvalue(), err.getvalue())


def dist_moe(world_size: int, *arguments: object) -> list[Outcome]:
    """``dist-moe ARGUMENTS`` on ``world_size`` ranks."""
    return on_ranks(world_size, run_here, [str(argument) for argument in arguments])


def succeed(world_size: int, *arguments: object) -> list[Outcome]:
    """The same; every rank must end with 0."""
    outcomes = dist_moe(world_size, *arguments)
    for outcome in outcomes:
        assert outcome.code == 0, outcome.err
    return outcomes


def example_of(page: Path) -> str:
    """The one Python example of a page."""
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return str(example)


def start(*command: object, cwd: Path = REPOSITORY) -> subprocess.Popen[str]:
    """A command in a process of its own, with the programs of this interpreter's environment on PATH."""
    bin_directory = Path(sys.executable).parent
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    """Wait for its end; whatever happens, it does not stay behind."""
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err)


def wait_for_steps(run_dir: Path, steps: int, process: subprocess.Popen[str]) -> None:
    """Until metrics.jsonl holds that many steps."""
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE_S
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None, finish(process).err
        assert time.monotonic() < deadline, f"no {steps} steps in {PATIENCE_S} s"
        time.sleep(0.02)


def signalled(number: int, at_step: int, at_rank: int, arguments: list[str]) -> Outcome:
    """Run the command line; one rank gets a signal as it begins a step (counted from 1)."""
    seed_step = loop.seed_step

    def seed_and_signal(seed: int, step: int, rank: int) -> None:
        seed_step(seed, step, rank)
        if (step + 1, rank) == (at_step, at_rank):
            os.kill(os.getpid(), number)

    loop.seed_step = seed_and_signal
    try:
        return run_here(arguments)
    finally:
        loop.seed_step = seed_step
