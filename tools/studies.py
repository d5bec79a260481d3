"""The runs of a study: one configuration under different overrides, trained once each, some side by side."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_moe.cli.main import console_script
from dist_moe.config.files import read_json
from dist_moe.engine.checkpoint.files import best_of, checkpoints_of
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.recipes.recipe import load_config
from dist_moe.sweeps.paired import paired_difference


@dataclass(frozen=True)
class StudyRun:
    """A run in ``directory`` of the configuration ``config`` under ``overrides``."""

    directory: Path
    config: Path
    overrides: tuple[str, ...]

    @property
    def result(self) -> Path:
        """The file whose presence means that the run is complete."""
        return RunDirectory(self.directory).summary

    @property
    def summary(self) -> dict[str, Any]:
        """The summary of the trained run."""
        content: dict[str, Any] = read_json(self.result)
        return content

    def train(self, keep_weights: bool = True) -> None:
        """To its end, unless that has been done. Raises SystemExit if it fails, or if the directory has another run."""
        self._check_same()
        if self.result.exists():
            print(f"{self.directory}: trained already\n", end="", flush=True)  # one write: others print meanwhile
            return
        dist_moe("train", self.config, *self.overrides, "--run-dir", self.directory, "--auto-resume")
        if not keep_weights:
            for root in (self.directory, *self.directory.glob("stages/*")):
                shutil.rmtree(checkpoints_of(root), ignore_errors=True)  # not there if all is done in stages
                shutil.rmtree(best_of(checkpoints_of(root)), ignore_errors=True)  # there if patience was asked for
        print(f"{self.directory}: trained\n", end="", flush=True)

    def _check_same(self) -> None:
        """The directory's name does not tell all that the run depends on."""
        recorded = RunDirectory(self.directory).config
        if not recorded.exists():
            return
        there, here = load_config(recorded).plain(), load_config(self.config, self.overrides).plain()
        changed = [f"{name}={here[name]!r}, not {there[name]!r}" for name in here if there[name] != here[name]]
        if changed:
            raise SystemExit(
                f"{self.directory} has a run with another configuration: {changed[0]}; name another directory (--runs)"
            )


def study_parser(description: str | None, study: str, report: str, seeds: int = 3) -> argparse.ArgumentParser:
    """Return a parser of the options that studies have in common; runs are kept in ``runs/STUDY``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path(report))
    parser.add_argument("--runs", type=Path, default=Path("runs") / study, help="where the runs are kept")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="runs side by side, a thread each")
    return parser


def train_all(runs: Iterable[StudyRun], at_once: int, keep_weights: bool = True) -> None:
    """``at_once`` of them side by side, a thread each."""
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda run: run.train(keep_weights), runs))


def dist_moe(*arguments: object) -> str:
    """Return what the command prints; see :func:`out_and_err_of`."""
    return out_and_err_of(*arguments)[0]


def out_and_err_of(*arguments: object) -> tuple[str, str]:
    """Run the command in one thread; return what it prints. Raises SystemExit with its last words if it fails."""
    # A process of its own, forked from one that has imported what takes longest.
    forks = multiprocessing.get_context("forkserver")
    imported = ("__main__", "deepspeed", "dist_moe.cli.main", "dist_moe.recipes", "torch._dynamo", "scipy.stats")
    forks.set_forkserver_preload([*imported])
    words = [str(argument) for argument in arguments]
    os.environ["OMP_NUM_THREADS"] = "1"  # read as torch is imported
    with tempfile.TemporaryDirectory() as directory:
        out, err = (Path(directory) / name for name in ("out", "err"))
        process = forks.Process(target=_command, args=(words, out, err))
        process.start()
        process.join()
        screen = err.read_text(encoding="utf-8", errors="replace")
        if process.exitcode:
            raise SystemExit(f"dist-moe {' '.join(words)} failed:\n{screen[-2000:]}")
        return out.read_text(encoding="utf-8"), screen


def _command(words: list[str], out: Path, err: Path) -> None:
    """The command line in this process, whose output goes to the files."""
    gc.freeze()  # what was imported stays: else every collection, one for each stage, goes through it
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = ["dist-moe", *words]
    console_script()


def directory_name(*parts: object) -> str:
    """One name of several words, which no shell takes for a pattern: ``Mowst*, gcn``, 0 -> ``mowst_star,_gcn-0``."""
    return "-".join(str(part).lower().replace(" ", "_").replace("*", "_star") for part in parts)


def write_report(directory: Path, page: str, draw: Callable[[Path], None] | None) -> None:
    """``table.md``, which is printed too, and ``figure.png`` where something is drawn."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "table.md").write_text(page, encoding="utf-8")
    if draw is not None:
        draw(directory / "figure.png")
    print(page)


def command_given() -> str:
    """The command line, but for where runs and report are and how many run at once."""
    words, aside = [], ("--runs", "--report", "--at-once")
    for before, word in pairwise(sys.argv):
        if not word.startswith(aside) and before not in aside:
            words.append(word)
    return shlex.join(["python", f"tools/{Path(sys.argv[0]).name}", *words])


def machine() -> str:
    """Return which machine computed the figures, for a table's caption."""
    return f"{os.cpu_count()} cores, torch {torch.__version__.split('+')[0]}"


def spread(numbers: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation, with ``digits`` decimals."""
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{deviation}"


def beside(own: Sequence[float], other: Sequence[float] | None) -> str:
    """Mean ± standard deviation and, in brackets, the paired difference to ``other`` with its interval.

    No difference without ``other`` or with a single pair. A star where the interval does not contain 0.
    """
    if other is None or len(own) < 2:
        return spread(own, 4)
    found = paired_difference(np.array(own), np.array(other))
    star = "" if found.verdict == "within" else " *"
    return f"{spread(own, 4)} ({found.mean:+.4f}: {found.low:+.4f} to {found.high:+.4f}{star})"
