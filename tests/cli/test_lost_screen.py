"""Training outlives its terminal, its pipes and its logs; commands whose work is to print say that they could not."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dist_moe.screen import Screen
from tests.helpers.commands import PATIENCE_S, REPOSITORY, wait_for_steps
from tests.helpers.runs import records_of, summary_of, write_config
from tests.helpers.sockets import children_of

STEPS = 40
DIST_MOE = [sys.executable, "-m", "dist_moe"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    train = {"max_steps": STEPS, "log_every": 2, "validate_every": 10}
    return write_config(tmp_path_factory.mktemp("config"), tiny_data, train=train)


Popen = Callable[[list[str]], "subprocess.Popen[bytes]"]
"""Starts a command with what is lost, or will be, as its standard streams."""


def start(command: list[str], **streams: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, **streams)


def full_disk(command: list[str]) -> subprocess.Popen[bytes]:
    with open("/dev/full", "wb") as full:
        return start(command, stdout=full, stderr=full)


def closed(command: list[str]) -> subprocess.Popen[bytes]:
    """``<&- >&- 2>&-``."""
    return start(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command])


def reader_that_leaves(command: list[str]) -> subprocess.Popen[bytes]:
    """``2>&1 | head -1``."""
    process = start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


def dead_terminal(command: list[str]) -> subprocess.Popen[bytes]:
    """A terminal whose window is closed once something has been shown, in a session that does not hear of it."""
    window, terminal = pty.openpty()
    process = start(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    os.read(window, 1)
    os.close(window)
    return process


def assert_trained_to_the_end(process: subprocess.Popen[bytes], run: Path) -> None:
    try:
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
    assert [record["step"] for record in records_of(run)] == list(range(1, STEPS + 1))
    assert summary_of(run)["steps"] == STEPS


def emulated(world_size: int) -> list[str]:
    return ["--emulate", str(world_size)] if world_size > 1 else []


WORLDS = [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("lost", [full_disk, closed, reader_that_leaves, dead_terminal])
def test_training_outlives_what_it_prints_to(config: Path, tmp_path: Path, lost: Popen, world_size: int) -> None:
    command = [*DIST_MOE, "train", str(config), "--run-dir", str(tmp_path / "run"), *emulated(world_size)]
    assert_trained_to_the_end(lost(command), tmp_path / "run")


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_log_on_a_full_disk_and_a_reader_that_leaves(config: Path, tmp_path: Path, world_size: int) -> None:
    command = [*DIST_MOE, "train", str(config), "--run-dir", str(tmp_path / "run"), *emulated(world_size)]
    with open("/dev/full", "wb") as full:
        process = start(command, stdout=full, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.readline()
    process.stderr.close()
    assert_trained_to_the_end(process, tmp_path / "run")


def hang_up_all_of(process: subprocess.Popen[bytes]) -> None:
    """Send SIGHUP to a process and to its children, as a terminal may that closes."""
    for pid in (process.pid, *children_of(process.pid)):
        os.kill(pid, signal.SIGHUP)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_nohup_and_no_streams_at_all(config: Path, tmp_path: Path, world_size: int) -> None:
    run = tmp_path / "run"
    command = [*DIST_MOE, "train", str(config), "--run-dir", str(run), *emulated(world_size)]
    process = start(["nohup", "sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command])
    wait_for_steps(run, 2, process)  # type: ignore[arg-type]
    hang_up_all_of(process)
    assert_trained_to_the_end(process, run)


# What follows needs no training: the command line's own frame, around something else.

FRAME = "import sys; from dist_moe.cli import main as cli; cli.main = lambda: {body}; cli.console_script()"


def framed(body: str, **streams: Any) -> tuple[int, str]:
    """Exit code, and what was said on standard error."""
    command = [sys.executable, "-c", FRAME.format(body=body)]
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=PATIENCE_S, text=True, cwd=REPOSITORY, **streams)
    return done.returncode, done.stderr


def test_a_command_that_prints_says_that_the_disk_is_full() -> None:
    with open("/dev/full", "wb") as full:
        code, said = framed("print('metrics') or 0", stdout=full)
    assert code == 2
    assert said == (
        "dist-moe: standard output could not be written: No space left on device; make room, or send it elsewhere\n"
    )


@contextmanager
def pipe_without_reader() -> Iterator[int]:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        yield writing
    finally:
        os.close(writing)


@pytest.mark.parametrize(
    "body", ["print('schema') or 0", "print('x' * 100000) or 0", "sys.stdout.buffer.write(b'x') and 0"]
)
def test_a_command_whose_reader_has_left_ends_quietly(body: str) -> None:
    with pipe_without_reader() as writing:
        assert framed(body, stdout=writing) == (141, "")


def test_help_too() -> None:
    with pipe_without_reader() as writing:
        done = subprocess.run([*DIST_MOE, "--help"], stdout=writing, stderr=subprocess.PIPE, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_error_is_still_an_error_when_nobody_can_read_it() -> None:
    with pipe_without_reader() as writing:
        code = subprocess.run([*DIST_MOE, "no-such-command"], stdout=writing, stderr=writing, cwd=REPOSITORY).returncode
    assert code == 2


def test_what_cannot_be_encoded_is_printed_all_the_same() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    body = "print('\\u00fc', file=sys.stderr) or 0"
    assert framed(body, stdout=subprocess.DEVNULL, env=environment) == (0, "\\xfc\n")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Else what a C++ library prints on standard error goes into it."""
    path = tmp_path / "file"
    body = f"[f := open({str(path)!r}, 'w'), f.write('content'), __import__('os').write(2, b'warning')] and 0"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", FRAME.format(body=body)]
    assert subprocess.run(command, cwd=REPOSITORY).returncode == 0
    assert path.read_text() == "content"


def test_children_get_the_null_device_for_a_closed_stream() -> None:
    body = "__import__('subprocess').run(['sh', '-c', 'echo out; echo err >&2; cat']).returncode"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", FRAME.format(body=body)]
    assert subprocess.run(command, cwd=REPOSITORY).returncode == 0


def test_nobody_waits_for_a_reader_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that is held by Ctrl-S, a pager: the rest is dropped, until there is room again."""
    monkeypatch.setattr("dist_moe.screen._PATIENCE_MS", 50)
    reading, writing = os.pipe()
    screen = Screen(writing, is_optional=True)
    assert screen.write(b"x" * 10**6) == 10**6
    waiting = len(os.read(reading, 10**6))
    assert 0 < waiting < 10**6
    screen.write(b"here again")
    assert os.read(reading, 100) == b"here again"


@pytest.mark.parametrize("optional", [False, True])
def test_a_descriptor_that_does_not_block_gets_everything(optional: bool) -> None:
    """Another program that shares the terminal may have made it so."""
    with subprocess.Popen(["wc", "-c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as counter:
        assert counter.stdin is not None
        assert counter.stdout is not None
        os.set_blocking(counter.stdin.fileno(), False)
        Screen(counter.stdin.fileno(), is_optional=optional).write(b"x" * 300_000)
        counter.stdin.close()
        assert int(counter.stdout.read()) == 300_000


def test_a_failure_is_raised_once() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        screen = Screen(full.fileno(), is_optional=False)
        with pytest.raises(OSError, match="No space left"):
            screen.write(b"x")
        assert screen.write(b"x") == 1  # as Python does once more when the process ends
        assert screen.failure is not None
        optional = Screen(full.fileno(), is_optional=True)
        assert (optional.write(b"x"), optional.failure) == (1, None)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ("expandable_segments:True", None)),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, ("max_split_size_mb:64", None)),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, (None, "max_split_size_mb:64")),
    ],
)
def test_a_gpus_memory_is_allocated_for_ragged_sizes_unless_the_user_says_how(
    given: dict[str, str], found: tuple[str | None, str | None]
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    body = f"[print(*map(__import__('os').environ.get, {names})), print('torch' in sys.modules)] and 0"
    command = [sys.executable, "-c", FRAME.format(body=body)]
    done = subprocess.run(command, env=clean | given, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert done.stdout.split() == [str(found[0]), str(found[1]), "False"]  # torch has not read it yet
