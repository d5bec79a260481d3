"""A rank that goes no further ends the job, is named, and its stack is shown; slow work that goes on is left alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_moe.cli.main import main
from dist_moe.data.batches import ShuffledFeed
from dist_moe.engine.health.heartbeats import (
    Activity,
    Heartbeat,
    Observer,
    Process,
    collectives_issued,
    read_heartbeat,
    write_heartbeat,
)
from dist_moe.engine.health.watchdog import EXIT_STALLED, RankReport, StallDiagnosis, diagnose
from dist_moe.engine.launch.process_groups import ParallelConfig
from dist_moe.errors import UserError
from dist_moe.parallel.stacks import stacks_of_threads
from dist_moe.tasks.recommendation.task import RecommendationTask
from tests.helpers.commands import run_here
from tests.helpers.pool import RankPool, on_ranks
from tests.helpers.runs import records_of, write_config

STALL_S, AT_STEP = 4.0, 4
LONGER_S = 1.4 * STALL_S


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), tiny_data, train={"max_steps": 8})


def command(config: Path, run: Path, world: int, *overrides: str) -> list[str]:
    layout = f"parallel.expert_parallel_size={world}"
    return ["train", str(config), "--run-dir", str(run), layout, f"parallel.stall_s={STALL_S}", *overrides]


def sleep_for_ever_in_the_data_feed() -> None:
    time.sleep(1e6)


def freeze() -> None:
    time.sleep(STALL_S / 5)  # until a sign of life has told where
    os.kill(os.getpid(), signal.SIGSTOP)


def at_a_step(rank: int, do: Callable[[], None]) -> None:
    """From now on ``rank`` does something while it gets the data of a step."""
    micro_batches = ShuffledFeed.micro_batches

    def stall_then_feed(self: ShuffledFeed[Any], step: int) -> list[Any]:
        if (self._rank, step + 1) == (rank, AT_STEP):
            do()
        return micro_batches(self, step)

    ShuffledFeed.micro_batches = stall_then_feed


def at_a_forward_pass(rank: int, do: Callable[[], None]) -> None:
    """From now on ``rank`` does something in its loss, between two collectives of a step."""
    losses = RecommendationTask.task_losses
    calls = iter(range(1, 1000))

    def stall_then_compute(self: RecommendationTask, output: Any, batch: Any) -> Any:
        if int(os.environ["RANK"]) == rank and next(calls) == AT_STEP:
            do()
        return losses(self, output, batch)

    RecommendationTask.task_losses = stall_then_compute


def train_until_it_stalls(arrange: Callable[..., None], do: Callable[[], None], arguments: list[str], log: str) -> None:
    arrange(1, do)
    descriptor = os.open(f"{log}-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    try:
        main(arguments)
    except RuntimeError:  # the other rank is gone, and a collective noticed before the watchdog
        os._exit(1)
    raise AssertionError("the run came to its end")


@pytest.fixture
def pool() -> Iterator[RankPool]:
    ranks = RankPool(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    ("arrange", "do", "phase", "why", "in_stack"),
    [
        (at_a_step, sleep_for_ever_in_the_data_feed, "data", "no progress, and not in a collective", "time.sleep(1e6)"),
        (at_a_forward_pass, sleep_for_ever_in_the_data_feed, "forward", "not in a collective", "stall_then_compute"),
        (at_a_step, freeze, "", "no sign of life", "File "),
    ],
)
def test_the_rank_that_stalls_is_named(
    pool: RankPool,
    config: Path,
    tmp_path: Path,
    arrange: Callable[..., None],
    do: Callable[[], None],
    phase: str,
    why: str,
    in_stack: str,
) -> None:
    run = tmp_path / "run"
    arguments = (arrange, do, command(config, run, 2), str(tmp_path / "log"))
    with pytest.raises(AssertionError, match=r"rank \d died"):
        pool.run(train_until_it_stalls, arguments)
    stalled_at = time.time()
    for process in pool._processes:
        process.join(2 * STALL_S)
    codes = [process.exitcode for process in pool._processes]
    assert EXIT_STALLED == 4
    assert codes in ([[4, -signal.SIGKILL]] if do is freeze else [[4, 4], [1, 4], [4, 1]])
    assert time.time() - stalled_at < 2 * STALL_S

    told = (run / "stall.txt").read_text()
    who, *ranks = told.splitlines()
    assert who.startswith(f"rank 1 stalled at step {AT_STEP} (")
    assert why in who
    assert "<- stalled" in ranks[1]
    assert ranks[1].startswith(f"  rank 1: step {AT_STEP}, {phase}")
    assert ranks[0].startswith(f"  rank 0: step {AT_STEP}, ")
    assert ", in all_" in ranks[0]
    assert "stalled" not in ranks[0]
    assert in_stack in told
    assert ("process T (stopped)" in told) == (do is freeze)
    assert told in "".join(path.read_text() for path in tmp_path.glob("log-*"))


def slow_but_alive(arguments: list[str]) -> int:
    """The data of the first step, and one evaluation in all, take longer than a stall; nothing stands still."""
    micro_batches, observe = ShuffledFeed.micro_batches, RecommendationTask.observe

    def slow_first_step(self: ShuffledFeed[Any], step: int) -> list[Any]:
        time.sleep(LONGER_S if step == 0 else 0.0)
        return micro_batches(self, step)

    def slow_batch(self: RecommendationTask, output: Any, batch: Any) -> Any:
        time.sleep(LONGER_S / 3)
        return observe(self, output, batch)

    ShuffledFeed.micro_batches, RecommendationTask.observe = slow_first_step, slow_batch
    RecommendationTask.eval_batch, before = 128, RecommendationTask.eval_batch
    try:
        return run_here(arguments).code
    finally:
        RecommendationTask.eval_batch = before
        ShuffledFeed.micro_batches, RecommendationTask.observe = micro_batches, observe


def test_slow_phases_are_no_stalls(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert on_ranks(1, slow_but_alive, command(config, run, 1, "train.max_steps=2")) == [0]
    assert [record["step"] for record in records_of(run)] == [1, 2]
    assert not (run / "stall.txt").exists()
    assert not (run / "heartbeats").exists()


def beat(rank: int, idle_s: float, collectives: int, collective: str = "", ended: bool = False) -> Heartbeat:
    return Heartbeat(rank, Process(1, "m", 1), 1, 5, "forward", idle_s, collectives, collective, "", ended)


WAITING = "all_reduce"


@pytest.mark.parametrize(
    ("beats", "silent_s", "blamed"),
    [
        ([(9, 57, WAITING), (9, 56, "")], [0, 0], (1,)),  # sleeps before its 57th
        ([(9, 57, ""), (9, 56, "")], [0, 0], (1,)),  # the same where rank 0 waits for its device, not in a call
        ([(9, 57, WAITING), (9, 57, "")], [0, 0], (1,)),  # has issued it and sleeps
        ([(9, 57, WAITING), (9, 55, WAITING)], [0, 0], (1,)),  # waits for an answer that the other has had
        ([(9, 57, WAITING), (9, 57, WAITING)], [0, 0], (0, 1)),  # the network
        ([(9, 57, WAITING), (1, 57, "")], [0, 8], (1,)),  # frozen
        ([(9, 57, WAITING), (1, 50, "")], [0, 0], ()),  # slow, but comes on
        ([(9, 57, WAITING), (9, 40, "", True), (9, 56, "")], [0, 0, 0], (2,)),  # one has ended
    ],
)
def test_who_is_blamed(beats: list[tuple[Any, ...]], silent_s: list[float], blamed: tuple[int, ...]) -> None:
    reports = [
        RankReport(rank, beat(rank, *given), silent)
        for rank, (given, silent) in enumerate(zip(beats, silent_s, strict=True))
    ]
    assert diagnose(reports, stall_s=9).ranks == blamed


def test_a_rank_that_never_wrote_is_blamed() -> None:
    assert diagnose([RankReport(0, beat(0, 9, 3, WAITING), 0), RankReport(1, None, 9)], 9) == StallDiagnosis(
        (1,), "no sign of life", True
    )


def test_a_sign_of_life_costs_next_to_nothing(tmp_path: Path) -> None:
    """Below 1 % of one core even at ten times the rate of the default setting, reading it back included."""
    observer, signs = Observer(0, Activity(), threading.get_ident()), 100
    started = time.process_time()
    for sign in range(signs):
        write_heartbeat(tmp_path, observer.look(float(sign)))
        assert read_heartbeat(tmp_path, 0) is not None
    assert (time.process_time() - started) / signs < 0.01 * 1.0


def test_stacks_of_threads_at_work_and_at_rest() -> None:
    """Of one that waits it is the stack that Python gives; of one at work each is a stack that there was."""
    ending, depths = threading.Event(), set()

    def outer(depth: int) -> int:
        return outer(depth - 1) + 1 if depth else sum(iter([0]))

    def work() -> None:
        while not ending.is_set():
            outer(20)

    resting = threading.Thread(target=ending.wait)
    working = threading.Thread(target=work)
    resting.start()
    working.start()
    try:
        for _ in range(300):
            stacks = stacks_of_threads()
            at_work = [entry.name for entry in stacks[working.ident or 0]]
            if "work" in at_work:
                assert at_work[: at_work.index("work")] == ["_bootstrap", "_bootstrap_inner", "run"]
                depths.add(at_work.count("outer"))
        at_rest = traceback.extract_stack(sys._current_frames()[resting.ident or 0])
        assert [(e.filename, e.lineno, e.name) for e in stacks[resting.ident or 0]] == [
            (entry.filename, entry.lineno, entry.name) for entry in at_rest
        ]
        assert traceback.format_list(stacks[resting.ident or 0]) == traceback.format_list(at_rest), "with source lines"
    finally:
        ending.set()
        working.join()
        resting.join()
    assert len(depths) > 2
    assert max(depths) <= 21


def test_another_process_of_the_same_pid_is_not_taken_for_it() -> None:
    here = Process.this()
    assert here.is_here()
    assert here.state().startswith("R")
    assert not Process(here.pid, here.machine, here.started + 1).is_here()
    assert not Process(here.pid, "elsewhere", here.started).is_here()


def test_the_limit_lies_below_the_timeout_of_collectives() -> None:
    assert ParallelConfig(timeout_s=100).stall_limit_s == 50
    assert ParallelConfig(stall_s=0).stall_limit_s == 0
    with pytest.raises(UserError, match=r"parallel.stall_s=100 must be below parallel.timeout_s=100"):
        ParallelConfig(timeout_s=100, stall_s=100).check(1, 4)


def test_groups_may_be_made_while_the_collectives_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: dict[Any, None] = {}

    class Group:
        @property
        def _device_types(self) -> list[str]:
            groups[object()] = None  # as the main thread does
            return []

    groups |= {Group(): None, Group(): None}
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.distributed_c10d._world", SimpleNamespace(pg_map=groups))
    assert collectives_issued() == 0
