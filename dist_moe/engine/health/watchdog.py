"""A job that goes no further ends, and says which rank held it up, where, and with which stack.

Every rank has a daemon thread. It writes the rank's signs of life, and when its own rank has made no
progress for ``stall_s`` seconds it reads those of all ranks and judges (stall_verdict.py). The first
thread to judge writes the report; each ends its own process, and kills on its machine those that cannot
end by themselves, as a stopped one. No collective is issued while training.

A rank whose launcher was killed ends too: else it would go on beside the job that is started in its place.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_moe.engine.collectives import gather_objects
from dist_moe.engine.health.activity import ACTIVITY
from dist_moe.engine.health.heartbeats import Heartbeat, Observer, read_heartbeat, write_heartbeat
from dist_moe.engine.health.stall_verdict import Sighting, Verdict, judge, report
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig

EXIT_STALLED, EXIT_ORPHANED = 4, 5
REPORT = "stall.txt"
_MOST_BETWEEN_BEATS_S = 10.0
_BETWEEN_LOOKS_AT_LAUNCHER_S = 1.0


@contextmanager
def watchdog(run_dir: Path, environment: LaunchEnvironment, config: ParallelConfig) -> Iterator[None]:
    """Watch the block, which the calling thread runs. Collective over all ranks, at its start only."""
    ACTIVITY.reset()
    if not config.stall_limit_s:
        yield
        return
    directory = _open_directory(run_dir, environment)
    thread = _Watch(directory, run_dir / REPORT, environment, config)
    thread.start()
    try:
        yield
    finally:
        thread.stop()
        if environment.is_rank_zero:
            shutil.rmtree(directory.parent, ignore_errors=True)


def _open_directory(run_dir: Path, environment: LaunchEnvironment) -> Path:
    """A directory that no earlier attempt at this run has written to, the same on all ranks."""
    root = run_dir / "heartbeats"
    mine = uuid.uuid4().hex
    if environment.is_rank_zero:
        shutil.rmtree(root, ignore_errors=True)
        (root / mine).mkdir(parents=True)
    return root / gather_objects(mine)[0]


class _Watch(threading.Thread):
    def __init__(
        self, directory: Path, report_file: Path, environment: LaunchEnvironment, config: ParallelConfig
    ) -> None:
        super().__init__(name="dist-moe watchdog", daemon=True)
        self._directory = directory
        self._report_file = report_file
        self._rank, self._world_size = environment.rank, environment.world_size
        self._launched = environment.launched
        self._stall_s = config.stall_limit_s
        self._first_step_s = max(self._stall_s, float(config.timeout_s))
        self._interval_s = min(self._stall_s / 10, _MOST_BETWEEN_BEATS_S)
        self._observer = Observer(environment.rank, ACTIVITY, threading.get_ident())
        self._seen: dict[int, tuple[int, float]] = {}
        self._launcher = os.getppid()
        self._ending = threading.Event()
        self._write_failed = False

    def run(self) -> None:
        due = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= due:
                self.tick(now)
                due = now + self._interval_s
            if self._ending.wait(min(self._interval_s, _BETWEEN_LOOKS_AT_LAUNCHER_S)):
                return
            if os.getppid() != self._launcher and self._launched:
                _say(f"rank {self._rank}: the launcher is gone; ending, so that the run can be started again")
                os._exit(EXIT_ORPHANED)

    def stop(self) -> None:
        self._ending.set()
        self.join()
        self._write(self._observer.look(time.monotonic(), ended=True))

    def tick(self, now: float) -> None:
        """One sign of life; and, if this rank goes no further, a look at the others."""
        mine = self._observer.look(now)
        self._write(mine)
        limit_s = self._stall_s if ACTIVITY.settled else self._first_step_s
        if mine.idle_s >= limit_s / 2:
            sightings = [self._sighting(rank, mine, now) for rank in range(self._world_size)]
            if mine.idle_s >= limit_s:
                verdict = judge(sightings, limit_s)
                if verdict.ranks and not self._ending.is_set():
                    self._end_job(verdict, sightings)

    def _write(self, heartbeat: Heartbeat) -> None:
        try:
            write_heartbeat(self._directory, heartbeat)
        except OSError as error:  # the job is not to end because its watchdog cannot write
            if not self._write_failed and not heartbeat.ended:
                _say(f"rank {self._rank}: the watchdog cannot write its signs of life: {error}")
            self._write_failed = True

    def _sighting(self, rank: int, mine: Heartbeat, now: float) -> Sighting:
        if rank == self._rank:
            return Sighting(rank, mine, 0.0)
        last = read_heartbeat(self._directory, rank)
        beat = last.beat if last else 0
        if self._seen.get(rank, (-1, now))[0] != beat:
            self._seen[rank] = (beat, now)
        return Sighting(rank, last, now - self._seen[rank][1])

    def _end_job(self, verdict: Verdict, sightings: list[Sighting]) -> None:
        try:
            with (self._directory / "judged").open("x"):
                text = report(verdict, sightings, EXIT_STALLED)
                _say(text)
                self._report_file.write_text(text + "\n")
        except FileExistsError:
            _say(f"rank {self._rank} ends with the stalled job; see {self._report_file}")
        except OSError as error:
            _say(f"{report(verdict, sightings, EXIT_STALLED)}\n({self._report_file} cannot be written: {error})")
        for one in sightings:
            if verdict.frozen and one.rank in verdict.ranks and one.last and one.last.process.is_here():
                os.kill(one.last.process.pid, signal.SIGKILL)
        os._exit(EXIT_STALLED)


def _say(text: str) -> None:
    print(f"dist-moe: {text}", file=sys.stderr, flush=True)
