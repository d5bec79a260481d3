"""Kill a training job at random moments until it is done, and compare it with one that nothing disturbed.

    tools/random_faults.py --runs 10 --kills 5 --seed 0 --output results/random_faults.md

Each run is ``torchrun --max-restarts ... dist-moe train --auto-resume`` on two ranks and tiny data. One after the
other ``--kills`` faults hit it, each drawn at random: kill -9 of a rank or of the launcher at a random moment (while
it starts up too), of the writing rank while a checkpoint is written, of a rank during a swap search or while experts
move between ranks. When the launcher ends, the same command is given again. In the end every tensor of the last
checkpoint, masters and moments, and the test figures must be those of the undisturbed run, bit for bit; every step
must be recorded once; and no checkpoint may ever have been lost.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from dist_moe.config.files import parse_json, read_json  # noqa: E402
from dist_moe.config.plain_yaml import yaml_text  # noqa: E402
from dist_moe.engine.checkpoint.files import (  # noqa: E402
    checkpoints_of,
    complete_directories,
    newest_checkpoint,
    newest_good_checkpoint,
)
from dist_moe.engine.health.heartbeats import read_heartbeat  # noqa: E402
from dist_moe.engine.monitor.step_window import MACHINE_METRICS  # noqa: E402
from dist_moe.errors import UserError  # noqa: E402
from tests.data.tiny_movielens import write_tiny_movielens  # noqa: E402
from tests.helpers.pool import free_port  # noqa: E402

KINDS = ("rank", "launcher", "save", "search", "migration")
PHASES = {"search": "swap search", "migration": "migration"}
RANKS = 2
PATIENCE_S = 1800.0
POLL_S = 0.002


@dataclass
class Job:
    """A run in ``directory``, with the launcher that drives it just now."""

    directory: Path
    config: Path
    launcher: subprocess.Popen[bytes] | None = None
    starts: int = 0
    newest_seen: int = 0
    killed: Counter[str] = field(default_factory=Counter)

    @property
    def marks(self) -> Path:
        return self.directory.with_suffix(".marks")

    def start(self) -> None:
        """Give the command (again)."""
        self.marks.mkdir(exist_ok=True)
        command = ["torchrun", "--nproc-per-node", RANKS, "--master-port", free_port(), "--max-restarts", 1000]
        command += ["--monitor-interval", 0.1, "-m", "dist_moe", "train", self.config, "--run-dir", self.directory]
        command += ["--auto-resume", f"parallel.expert_parallel_size={RANKS}"]
        with self.directory.with_suffix(".log").open("ab") as log:
            self.launcher = subprocess.Popen(
                [str(part) for part in command],
                cwd=REPOSITORY,
                env=os.environ
                | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
                | {"PHASE_MARKS": str(self.marks), "PYTHONPATH": str(REPOSITORY)},
                stdout=log,
                stderr=log,
            )
        self.starts += 1

    def pid_of(self, rank: int) -> int | None:
        """Return the process id of a rank that trains; None while it starts up."""
        for directory in (self.directory / "heartbeats").glob("*"):
            beat = read_heartbeat(directory, rank)
            if beat is not None and beat.process.is_here():
                return beat.process.pid
        return None

    def has_ended(self) -> bool:
        """Whether the run is finished. Starts the launcher again if it ended otherwise."""
        assert self.launcher is not None
        code = self.launcher.poll()
        if code is not None and code != 0:
            self.start()
        return code == 0

    def check_checkpoints(self) -> None:
        """Raise AssertionError if a checkpoint that was complete once is not to be had any more."""
        directories = complete_directories(checkpoints_of(self.directory))
        if not self.newest_seen and not directories:
            return
        step = int(newest_good_checkpoint(self.directory)[0].name.rpartition("-")[2])
        assert step >= self.newest_seen, f"step {self.newest_seen} was saved once, now the newest is {step}"
        self.newest_seen = step

    def kill(self, kind: str, rng: np.random.Generator) -> bool:
        """Wait for a moment of that kind and kill; False if the run finished before."""
        after = time.monotonic() + rng.uniform(0.0, 12.0)
        rank = int(rng.integers(RANKS))
        deadline = time.monotonic() + PATIENCE_S
        while not self.has_ended():
            assert time.monotonic() < deadline, f"no moment for {kind} in {PATIENCE_S} s"
            assert self.launcher is not None
            victim: int | None = None
            if kind == "launcher" and time.monotonic() >= after:
                victim = self.launcher.pid
            elif kind == "rank" and time.monotonic() >= after:
                victim = self.pid_of(rank)
            elif kind == "save" and list(checkpoints_of(self.directory).glob(".step-*.partial")):
                victim = self.pid_of(0)
            elif kind in PHASES and self.phase_of(rank) == PHASES[kind]:
                victim = self.pid_of(rank)
            if victim is not None:
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                if kind == "launcher":
                    self.launcher.wait()
                self.killed[kind] += 1
                self.forget_phases()
                self.check_checkpoints()
                return True
            time.sleep(POLL_S)
        return False

    def phase_of(self, rank: int) -> str:
        mark = self.marks / f"rank-{rank}"
        return mark.read_text(encoding="utf-8") if mark.exists() else ""

    def forget_phases(self) -> None:
        """Those of processes that are gone by now."""
        for mark in self.marks.iterdir():
            mark.unlink(missing_ok=True)

    def finish(self) -> None:
        """Wait for the end."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.has_ended():
            assert time.monotonic() < deadline, f"{self.directory} does not come to its end"
            time.sleep(0.05)


def write_config(work: Path, steps: int) -> Path:
    """A tiny COMET run with dropout, a schedule, validations, swap searches, moves of experts, many checkpoints."""
    root = write_tiny_movielens(work / "raw", users=120, items=90)
    # Two leaves from the first step on, so that loads are uneven and experts soon have a reason to move.
    gate = {"name": "comet", "k": 2, "gamma": 1.0, "entropy_weight": 0.05, "max_active": 2}
    sizes = {"embedding_dim": 8, "num_experts": 8, "tower_units": 16}
    train = {"epochs": 1000, "max_steps": steps, "batch_size": 64, "log_every": 5, "validate_every": 25}
    content = {
        "imports": ["tools.phase_marks"],
        "data": {"root": str(root), "cache": str(work / "cache")},
        "model": sizes | {"experts": {"units": 16, "dropout": 0.3}, "gate": gate},
        "swap_search": {"every_epochs": 0.2, "examples": 256, "max_swaps": 4},
        "placement": {"every_steps": 6, "threshold": 1, "least_return": 0, "window": 10},
        "train": train | {"checkpoint_every": 7, "keep_checkpoints": 2},
        "deepspeed": {
            "optimizer": {"type": "AdamW", "params": {"lr": 0.005, "weight_decay": 0.01}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": steps}},
            "zero_optimization": {"stage": 1},
        },
    }
    path = work / "config.yaml"
    path.write_text(yaml_text(content), encoding="utf-8")
    return path


def differences(run: Path, reference: Path, steps: int) -> list[str]:
    """Return what is not as in the undisturbed run."""
    found = []
    records = [
        [parse_json(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for path in (run, reference)
    ]
    if len(records[0]) != len(records[1]):
        found.append("the number of records")
    for ours, theirs in zip(*records, strict=False):
        pair = [{k: v for k, v in one.items() if k not in MACHINE_METRICS} for one in (ours, theirs)]
        if pair[0] != pair[1]:
            found.append(f"the record of step {theirs['step']}")
            break
    if [record["step"] for record in records[0] if "validation" not in record] != list(range(1, steps + 1)):
        found.append("the steps recorded")
    ours, theirs = (
        {n: t for f in newest_checkpoint(p).glob("*.safetensors") for n, t in load_file(f).items()}
        for p in (run, reference)
    )
    found += [f"tensor {name}" for name in theirs if name not in ours or not ours[name].equal(theirs[name])]
    tests = [read_json(path / "summary.json")["test"] for path in (run, reference)]
    return found + (["the test figures"] if tests[0] != tests[1] else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=5, help="faults per run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further run after that long")
    parser.add_argument("--output", type=Path, help="Markdown file for the result")
    options = parser.parse_args()
    rng, began = np.random.default_rng(options.seed), time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="random-faults-"))
    config = write_config(work, options.steps)
    reference = Job(work / "reference", config)
    reference.start()
    reference.finish()
    jobs: list[Job] = []
    faults: dict[Path, list[str]] = {}
    while len(jobs) < options.runs and time.monotonic() - began < 60 * options.minutes:
        job = Job(work / f"run-{len(jobs)}", config)
        job.start()
        for kind in rng.choice(options.kinds, options.kills):
            if not job.kill(str(kind), rng):
                break
        job.finish()
        try:
            job.check_checkpoints()
        except UserError as error:
            faults.setdefault(job.directory, []).append(str(error))
        faults.setdefault(job.directory, []).extend(differences(job.directory, reference.directory, options.steps))
        jobs.append(job)
        print(
            f"{job.directory.name}: {dict(job.killed)}, {job.starts} launcher start(s), "
            f"{faults[job.directory] or 'equal'}"
        )
        if options.output:
            options.output.write_text(result(options, jobs, faults), encoding="utf-8")
    return int(any(faults.values()))


def result(options: argparse.Namespace, jobs: list[Job], faults: dict[Path, list[str]]) -> str:
    """The counts so far, as Markdown."""
    total: Counter[str] = sum((job.killed for job in jobs), Counter())
    equal = sum(not faults[job.directory] for job in jobs)
    lines = [
        "# Killed at random moments",
        "",
        f"`tools/random_faults.py --runs {options.runs} --kills {options.kills} --seed {options.seed} "
        f"--steps {options.steps}`, {os.cpu_count()} cores, {platform.machine()}, two ranks (gloo), ZeRO 1, "
        "expert-parallel size 2.",
        "",
        "| what was killed with -9 | times |",
        "| --- | --- |",
        f"| a rank, at a random moment | {total['rank']} |",
        f"| the launcher | {total['launcher']} |",
        f"| the first rank, while a checkpoint is written | {total['save']} |",
        f"| a rank, during a swap search | {total['search']} |",
        f"| a rank, while experts move between ranks | {total['migration']} |",
        f"| in all | {total.total()} |",
        "",
        f"{len(jobs)} runs of {options.steps} steps, all finished. {equal} of {len(jobs)} equal the undisturbed run "
        "bit for bit: every record, every tensor of the last checkpoint (masters and moments), the test figures. "
        f"Checkpoints lost: {sum('saved once' in fault for found in faults.values() for fault in found)}.",
        "",
    ]
    lines += [f"- {run.name}: {', '.join(found)}" for run, found in faults.items() if found]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
