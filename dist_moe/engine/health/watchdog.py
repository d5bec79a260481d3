"""A job that goes no further ends, and says which rank held it up, where, and with which stack.

Every rank has a daemon thread. It writes the rank's signs of life, and when its own rank has made no
progress for ``stall_s`` seconds it reads those of all ranks and asks which stalls. The first
thread to find out writes the report; each ends its own process, and kills on its machine those that cannot
end by themselves, as a stopped one. No collective is issued while training.

A rank whose launcher was killed ends too: else it would go on beside the job that is started in its place.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dist_moe.engine.health.heartbeats import ACTIVITY, Heartbeat, Observer, read_heartbeat, write_heartbeat
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig
from dist_moe.parallel import gather_objects
from dist_moe.screen import say

EXIT_STALLED, EXIT_ORPHANED = 4, 5
REPORT = "stall.txt"
_LONGEST_BETWEEN_BEATS_S = 10.0
_BETWEEN_LOOKS_AT_LAUNCHER_S = 1.0


@contextmanager
def watchdog(run_dir: Path, environment: LaunchEnvironment, config: ParallelConfig) -> Iterator[None]:
    """Watch the block, which the calling thread runs. Collective over all ranks, at its start only."""
    ACTIVITY.reset()
    if not config.stall_limit_s:
        yield
        return
    root, attempt = run_dir / "heartbeats", uuid.uuid4().hex
    if environment.is_rank_zero:
        shutil.rmtree(root, ignore_errors=True)
        (root / attempt).mkdir(parents=True)
    directory = root / gather_objects(attempt)[0]  # no earlier attempt at this run has written to it
    thread = _Watch(directory, run_dir / REPORT, environment, config)
    thread.start()
    try:
        yield
    finally:
        thread.stop()
        if environment.is_rank_zero:
            shutil.rmtree(directory.parent, ignore_errors=True)


@dataclass(frozen=True)
class RankReport:
    """A rank as another one sees it.

    ``last``: its newest heartbeat, None if it never wrote one. ``silent_s``: seconds by the reader's clock since then.
    """

    rank: int
    last: Heartbeat | None
    silent_s: float


@dataclass(frozen=True)
class StallDiagnosis:
    """``ranks`` that hold up the job; empty if some rank still makes progress. ``why``: in words.
    ``frozen``: whether they cannot end by themselves."""

    ranks: tuple[int, ...]
    why: str
    frozen: bool = False


def diagnose(reports: Sequence[RankReport], stall_s: float) -> StallDiagnosis:
    """Return who stalls, asked by a rank that has made no progress for ``stall_s`` seconds.

    A rank without a sign of life is to blame before all others; then one that makes no progress outside
    of any collective, and of several the one that has issued the fewest collectives (the others may wait
    for its part on a device); then, where all wait in collectives, those that have come to the fewest.
    """
    present = [one for one in reports if one.last is None or not one.last.ended]
    frozen = [one.rank for one in present if one.last is None or one.silent_s >= stall_s / 3]
    if frozen:
        return StallDiagnosis(tuple(frozen), "no sign of life", frozen=True)
    beats = [one.last for one in present if one.last is not None]
    if any(beat.idle_s + one.silent_s < stall_s / 2 for one, beat in zip(present, beats, strict=True)):
        return StallDiagnosis((), "some rank makes progress")
    outside = [beat for beat in beats if not beat.collective]
    suspects = outside or beats
    fewest = min(beat.collectives for beat in suspects)
    behind = tuple(beat.rank for beat in suspects if beat.collectives == fewest)
    if outside:
        return StallDiagnosis(behind, "no progress, and not in a collective")
    if len(behind) == len(beats):
        return StallDiagnosis(behind, "all ranks wait in the same collective: look at the network between them")
    return StallDiagnosis(behind, "waits in an earlier collective than the others")


def _explain(diagnosis: StallDiagnosis, reports: Sequence[RankReport]) -> str:
    """Return what the user gets to read: who, where, what every rank did, and the culprits' Python stacks."""
    named = ", ".join(f"rank {rank}" for rank in diagnosis.ranks)
    step = max((one.last.step for one in reports if one.last), default=0)  # a frozen rank tells an old one
    lines = [f"{named} stalled at step {step} ({diagnosis.why}); the job ends with exit code {EXIT_STALLED}"]
    stacks: list[str] = []
    for one in reports:
        beat, stalled = one.last, one.rank in diagnosis.ranks
        if beat is None:
            lines.append(f"  rank {one.rank}: never gave a sign of life")
            continue
        line = f"  rank {one.rank}: step {beat.step}, {beat.phase}"
        line += f", in {beat.collective}" if beat.collective else ""
        line += f", no progress for {beat.idle_s + one.silent_s:.0f} s"
        if stalled:
            state, machine = beat.process.state(), beat.process.machine.split()[0]
            line += f", silent for {one.silent_s:.0f} s" if one.silent_s > 1 else ""
            line += f"{f', process {state}' if state else ''}  <- stalled"
            stacks.append(f"stack of rank {one.rank}, pid {beat.process.pid} on {machine}, innermost last:")
            stacks.append(beat.stack.rstrip())
        lines.append(line)
    return "\n".join([*lines, *stacks])


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
        self._interval_s = min(self._stall_s / 10, _LONGEST_BETWEEN_BEATS_S)
        self._observer = Observer(environment.rank, ACTIVITY, threading.get_ident())
        self._seen: dict[int, tuple[int, float]] = {}
        self._launcher = os.getppid()
        self._ending = threading.Event()
        self._write_failed = False

    def run(self) -> None:
        """Tick until the end, and end with the launcher."""
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
        """End the thread, with a last sign of life that says so."""
        self._ending.set()
        self.join()
        self._write(self._observer.look(time.monotonic(), ended=True))

    def tick(self, now: float) -> None:
        """Give a sign of life; if this rank goes no further, look at the others."""
        mine = self._observer.look(now)
        self._write(mine)
        limit_s = self._stall_s if ACTIVITY.settled else self._first_step_s
        if mine.idle_s >= limit_s / 2:
            reports = [self._report_on(rank, mine, now) for rank in range(self._world_size)]
            if mine.idle_s >= limit_s:
                diagnosis = diagnose(reports, limit_s)
                if diagnosis.ranks and not self._ending.is_set():
                    self._end_job(diagnosis, reports)

    def _write(self, heartbeat: Heartbeat) -> None:
        try:
            write_heartbeat(self._directory, heartbeat)
        except OSError as error:  # the job must not end because its watchdog cannot write
            if not self._write_failed and not heartbeat.ended:
                _say(f"rank {self._rank}: the watchdog cannot write its signs of life: {error}")
            self._write_failed = True

    def _report_on(self, rank: int, mine: Heartbeat, now: float) -> RankReport:
        if rank == self._rank:
            return RankReport(rank, mine, 0.0)
        last = read_heartbeat(self._directory, rank)
        beat = last.beat if last else 0
        if self._seen.get(rank, (-1, now))[0] != beat:
            self._seen[rank] = (beat, now)
        return RankReport(rank, last, now - self._seen[rank][1])

    def _end_job(self, diagnosis: StallDiagnosis, reports: list[RankReport]) -> None:
        text = _explain(diagnosis, reports)
        try:
            (self._directory / "diagnosed").touch(exist_ok=False)
            _say(text)
            self._report_file.write_text(text + "\n", encoding="utf-8")
        except FileExistsError:
            _say(f"rank {self._rank} ends with the stalled job; see {self._report_file}")
        except OSError as error:
            _say(f"{text}\n({self._report_file} cannot be written: {error})")
        for one in reports:
            if diagnosis.frozen and one.rank in diagnosis.ranks and one.last and one.last.process.is_here():
                os.kill(one.last.process.pid, signal.SIGKILL)
        os._exit(EXIT_STALLED)


def _say(text: str) -> None:
    say(f"dist-moe: {text}")
