"""The lock on a run directory: one holder at a time, and nobody waits for the dead. On real processes."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from dist_moe.config.files import parse_json
from dist_moe.engine.health.heartbeats import Process
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.monitor import run_lock
from dist_moe.engine.monitor.run_lock import Holder, held, take
from dist_moe.errors import UserError
from tests.helpers.disks import fill, small_disk

fork = multiprocessing.get_context("fork")
RANK_0 = LaunchEnvironment()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for long."""
    monkeypatch.setattr(run_lock, "WAIT_FOR_CHECKS_S", 0.3)
    monkeypatch.setattr(run_lock, "BEAT_EVERY_S", 0.05)
    monkeypatch.setattr(run_lock, "STALE_AFTER_S", 0.6)


@pytest.fixture(params=["flock", "no flock"])
def flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with it, and one that refuses it."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if request.param == "no flock":
        monkeypatch.setattr(fcntl, "flock", refuse)


def locks_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*.lock"))


def hold(root: Path, told: Connection) -> None:
    lock = take(root)
    lock.begin()
    told.send("held")
    told.recv()
    lock.release()
    told.send("released")


@pytest.fixture
def holder(tmp_path: Path, flock: None) -> Iterator[tuple[Any, Connection]]:
    """Another process that holds the lock on tmp_path / "run"."""
    ours, theirs = fork.Pipe()
    process = fork.Process(target=hold, args=(tmp_path / "run", theirs))
    process.start()
    assert ours.recv() == "held"
    yield process, ours
    process.kill()
    process.join()


def test_a_second_job_is_told_who_holds_it(tmp_path: Path, holder: tuple[Any, Connection]) -> None:
    process, pipe = holder
    with pytest.raises(UserError) as refused, held(tmp_path / "run", RANK_0):
        pass
    for part in (
        "--run-dir",
        str(tmp_path / "run"),
        f"process {process.pid} on ",
        "since 2",
        "Wait",
        "run-000001.lock",
    ):
        assert part in str(refused.value)
    assert locks_in(tmp_path / "run") == ["run-000001.lock"]
    pipe.send("release")
    assert pipe.recv() == "released"
    with held(tmp_path / "run", RANK_0):
        assert locks_in(tmp_path / "run") == ["run-000001.lock"]


def test_a_holder_that_is_killed_or_stopped(tmp_path: Path, holder: tuple[Any, Connection]) -> None:
    """One that is stopped lives; one that is dead is followed at once."""
    process, _ = holder
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.0)  # longer than a lock of another machine needs to be stale
    with pytest.raises(UserError, match=f"process {process.pid}"):
        take(tmp_path / "run")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    started = time.monotonic()
    with held(tmp_path / "run", RANK_0):
        assert locks_in(tmp_path / "run") == ["run-000002.lock"]
    assert time.monotonic() - started < 0.5
    assert locks_in(tmp_path / "run") == []


def test_a_job_that_is_about_to_end_is_waited_for(tmp_path: Path, holder: tuple[Any, Connection]) -> None:
    process, _ = holder
    killer = fork.Process(target=lambda: (time.sleep(0.3), os.kill(process.pid, signal.SIGKILL)))
    killer.start()
    with held(tmp_path / "run", RANK_0, wait_s=20.0):
        pass
    killer.join()


def test_a_forked_process_holds_nothing(tmp_path: Path) -> None:
    """Else a helper of a job that was killed would hold the lock for as long as it lives."""
    lock = take(tmp_path / "run")
    ours, theirs = fork.Pipe()
    sleeper = fork.Process(target=lambda: (theirs.send("there"), time.sleep(60)))
    sleeper.start()
    ours.recv()
    descriptor = os.open(tmp_path / "run" / "run-000001.lock", os.O_RDONLY)
    lock.release()
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(descriptor)
    sleeper.kill()
    sleeper.join()


def written_elsewhere(root: Path, **fields: Any) -> Path:
    """A lock as a process on another machine would leave it."""
    root.mkdir()
    process = Process(1, "another-machine pid:[4026531836]", 17)
    holder = replace(Holder(process, "2026-01-01 00:00:00 UTC", "train", "its own", True, checks=False), **fields)
    path = root / "run-000001.lock"
    path.write_text(json.dumps(asdict(holder)))
    return path


def beat(path: Path) -> None:
    while True:
        os.utime(path)
        time.sleep(0.05)


def test_a_living_holder_on_another_machine(tmp_path: Path) -> None:
    path = written_elsewhere(tmp_path / "run")
    beating = fork.Process(target=beat, args=(path,))
    beating.start()
    with pytest.raises(UserError, match="on another-machine"):
        take(tmp_path / "run")
    beating.kill()
    beating.join()
    started = time.monotonic()
    take(tmp_path / "run").release()
    assert time.monotonic() - started > 0.4  # it was watched for as long as it may be silent


@pytest.mark.parametrize("clock", [-1e6, 1e6])
def test_it_is_the_clock_of_the_file_system_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    """A silent lock is known at once by its age there, whatever time it is here."""
    path = written_elsewhere(tmp_path / "run")
    now = time.time()
    os.utime(path, (now - 10, now - 10))
    monkeypatch.setattr(time, "time", lambda: now + clock)
    started = time.monotonic()
    take(tmp_path / "run").release()
    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    "process",
    [
        lambda: replace(Process.this(), started=1),  # its number was given again
        lambda: replace(Process.this(), pid=2**22 + 1),
    ],
)
def test_the_dead_on_this_machine_whose_file_system_has_no_flock(
    tmp_path: Path, process: Callable[[], Process]
) -> None:
    written_elsewhere(tmp_path / "run", process=process(), has_flock=False)
    take(tmp_path / "run").release()
    assert locks_in(tmp_path / "run") == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[" * 5000, b'{"process": 3}', b"null"])
def test_a_lock_that_says_nothing_is_waited_for_and_then_followed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run-000001.lock").write_bytes(content)
    take(tmp_path).release()
    assert locks_in(tmp_path) == []


def test_a_job_that_lost_its_lock_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a machine that slept does when it wakes up, and another has gone on with its run."""
    ours, theirs = fork.Pipe()
    process = fork.Process(target=hold, args=(tmp_path / "run", theirs))
    process.start()
    ours.recv()
    (tmp_path / "run" / "run-000001.lock").unlink()
    lock = take(tmp_path / "run")
    process.join(10)
    assert process.exitcode == 2
    assert f"is used by process {os.getpid()}" in capfd.readouterr().err
    lock.release()


def test_a_full_disk_stops_nobody(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=128) as disk:
        (disk / "run").mkdir()
        fill(disk)
        with held(disk / "run", RANK_0), pytest.raises(UserError, match="in use by a job that begins"):
            take(disk / "run")
        assert locks_in(disk / "run") == []


def contend(root: Path, seed: int, out: Connection) -> None:
    """Take the lock now and then; while it is held, a file that must not be there is there."""
    chance = random.Random(seed)
    taken = 0
    for _ in range(12):
        time.sleep(chance.random() * 0.01)
        try:
            lock = take(root)
        except UserError:
            continue
        os.close(os.open(root / "inside", os.O_CREAT | os.O_EXCL))
        taken += 1
        time.sleep(chance.random() * 0.004)
        (root / "inside").unlink()
        if chance.random() < 0.1:
            out.send(taken)
            os.kill(os.getpid(), signal.SIGKILL)
        lock.release()
    out.send(taken)


def test_never_two_holders(tmp_path: Path, flock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six processes that come, go and are killed; a dead lock is found by several of them at once."""
    monkeypatch.setattr(run_lock, "WAIT_FOR_CHECKS_S", 30.0)
    written_elsewhere(tmp_path / "run", process=replace(Process.this(), started=1), has_flock=False)
    pipes, processes = [], []
    for seed in range(6):
        ours, theirs = fork.Pipe()
        processes.append(fork.Process(target=contend, args=(tmp_path / "run", seed, theirs)))
        pipes.append(ours)
        processes[-1].start()
    for process in processes:
        process.join(60)
    assert {process.exitcode for process in processes} == {0, -signal.SIGKILL}
    assert sum(pipe.recv() for pipe in pipes) > 12
    take(tmp_path / "run").release()
    assert locks_in(tmp_path / "run") == []


def test_what_was_made_for_a_refused_start_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), held(tmp_path / "runs" / "deep" / "run", RANK_0):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "run", RANK_0):
        (tmp_path / "run" / "kept").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


def test_a_directory_that_is_renamed_takes_its_lock_along(tmp_path: Path) -> None:
    with held(tmp_path / "run", RANK_0):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "moved" / "kept").touch()
        take(tmp_path / "run").release()
        with pytest.raises(UserError, match="in use"):
            take(tmp_path / "moved")
    assert [path.name for path in (tmp_path / "moved").iterdir()] == ["kept"]


def test_other_ranks_hold_nothing(tmp_path: Path) -> None:
    with held(tmp_path / "run", LaunchEnvironment(1, 2, 1, launched=True)):
        assert not (tmp_path / "run").exists()


def test_a_holder_says_when_its_checks_are_over(tmp_path: Path) -> None:
    with held(tmp_path, RANK_0) as begin:
        (lock,) = tmp_path.glob("*.lock")
        assert parse_json(lock.read_text())["checks"]
        begin()
        assert not parse_json(lock.read_text())["checks"]
