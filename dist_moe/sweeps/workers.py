"""The processes that work on a sweep: started, listened to, replaced when they die, ended on a signal."""

from __future__ import annotations

import multiprocessing
import secrets
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType

from dist_moe.engine.launch.signals import STOP_SIGNALS, StopRequest, handling_signals, stop_requests
from dist_moe.errors import UserError
from dist_moe.screen import guard_screen, make_output_optional, say
from dist_moe.sweeps.directory import SweepDirectory
from dist_moe.sweeps.plan import SweepPlan
from dist_moe.sweeps.runner import load_runner
from dist_moe.sweeps.study import Studies
from dist_moe.sweeps.worker import Finished, Worker

FAILURE_LIMIT = 3
POLL_S = 0.2
GRACE_BEFORE_KILL_S = 20.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Member:
    """A worker process. ``owner``: its name in the studies."""

    process: SpawnProcess
    connection: Connection
    owner: str


class Team:
    """At most ``size`` worker processes on the studies of ``plan``."""

    def __init__(self, plan: SweepPlan, directory: SweepDirectory, studies: Studies, runner: str, size: int) -> None:
        self._plan = plan
        self._directory = directory
        self._studies = studies
        self._runner = runner
        self._size = size
        self._members: list[Member] = []
        self._tally = Tally(plan)

    def work(self, request: StopRequest) -> None:
        """Work until no trial waits any more, or a signal comes. Raises UserError where going on is of no use."""
        try:
            self._fill()
            while self._members and not request.signal_number:
                for connection in wait([member.connection for member in self._members], POLL_S):
                    self._hear(next(member for member in self._members if member.connection is connection))
        finally:
            self._end()

    def _fill(self) -> None:
        wanted = min(self._size, -(-self._studies.left() // self._plan.sweep.trials_together))
        while len(self._members) < wanted:
            self._members.append(self._start())

    def _start(self) -> Member:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        owner = secrets.token_hex(8)
        arguments = (self._plan, self._directory, self._runner, owner, theirs)
        process = context.Process(target=serve, args=arguments)
        # A terminal's and a scheduler's signals are for this process alone; it asks its workers by SIGTERM.
        with handling_signals(dict.fromkeys({*STOP_SIGNALS} - {signal.SIGTERM}, signal.SIG_IGN)):
            process.start()
        theirs.close()
        return Member(process, ours, owner)

    def _hear(self, member: Member) -> None:
        try:
            self._tally.count(member.connection.recv())
        except EOFError:
            self._reap(member)
            self._fill()

    def _reap(self, member: Member) -> None:
        self._members.remove(member)
        member.process.join()
        member.connection.close()
        died = member.process.exitcode != 0
        with self._directory.taking():
            released = self._studies.release(member.owner, died)
        if died:
            self._tally.count_death(member.process.exitcode, released)

    def _end(self) -> None:
        """End those that are left; their unfinished trials go back to the queue."""
        for member in self._members:
            member.process.terminate()
        for member in self._members:
            member.process.join(GRACE_BEFORE_KILL_S)
            member.process.kill()
            member.process.join()
            member.connection.close()
            with self._directory.taking():
                self._studies.release(member.owner, died=False)
        self._members.clear()


class Tally:
    """Prints what has become of each trial, and stops a sweep that only fails."""

    def __init__(self, plan: SweepPlan, speak: Say = say) -> None:
        self._rows = [row.name for row in plan.rows]
        self._trials = plan.sweep.trials
        self._say = speak
        self._failures: Counter[str] = Counter()
        self._deaths = 0

    def count(self, news: Finished) -> None:
        """Print the outcome of a trial. Raises UserError at the third failure of a row without a success between."""
        failed = f", {news.failed} failed" if news.failed else ""
        self._say(
            f"row {self._rows.index(news.row) + 1}/{len(self._rows)} {news.row}: trial {news.done}/{self._trials} "
            f"{news.what} (best {news.best:.4f}){failed}"
        )
        self._deaths = 0
        self._failures[news.row] = self._failures[news.row] + 1 if news.error else 0
        if self._failures[news.row] == FAILURE_LIMIT:
            raise UserError(
                f"row {news.row}: {FAILURE_LIMIT} trials failed one after the other, the last of them, "
                f"trial {news.index}, with: {news.error}. Its traceback is in the study; after fixing it, "
                "go on with --retry-failed"
            )

    def count_death(self, exit_code: int | None, released: int) -> None:
        """Print that a worker died. Raises UserError at the third death with no trial finished between."""
        self._say(f"a worker died (exit code {exit_code}); {released} trial(s) of it will be tried again")
        self._deaths += 1
        if self._deaths == FAILURE_LIMIT:
            raise UserError(
                f"{FAILURE_LIMIT} workers died one after the other (exit code {exit_code}; -9 often means "
                "that memory ran out: try fewer --workers or fewer trials_together)"
            )


def work_together(plan: SweepPlan, directory: SweepDirectory, studies: Studies, runner: str, size: int) -> int:
    """Do all trials that wait with ``size`` processes; returns the signal that ended it early, 0 if none did."""
    with stop_requests() as request:
        Team(plan, directory, studies, runner, size).work(request)
        return request.signal_number


class _Stop(BaseException):
    """Ends a training from within a signal handler; no Exception, so that nothing takes it for a failure."""


class _Interruption:
    """SIGTERM ends a training at once, and everything else (the study's writes) at its own end."""

    def __init__(self) -> None:
        self.asked = False
        self._training = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._training:
            raise _Stop

    @contextmanager
    def training(self) -> Iterator[None]:
        self._training = True
        try:
            if self.asked:
                raise _Stop
            yield
        finally:
            self._training = False


def serve(plan: SweepPlan, directory: SweepDirectory, runner: str, owner: str, connection: Connection) -> None:
    """Train trials until none waits or SIGTERM comes: the main function of a worker process."""
    guard_screen()
    make_output_optional()
    interruption = _Interruption()
    with ExitStack() as stack:
        with directory.taking():
            stack.enter_context(directory.working())
        # Asked to end, or the process that listens is no more: what is unfinished is put back by others.
        stack.enter_context(suppress(_Stop, BrokenPipeError))
        studies = Studies(directory, plan)
        worker = Worker(studies, load_runner(runner), directory.base, owner, connection.send, interruption.training)
        worker.work(plan.sweep.trials_together, lambda: interruption.asked)
