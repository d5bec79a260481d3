"""Signals from start to end of a run: what ends at once does so with a sentence, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_moe.engine.checkpoint.files import newest_checkpoint, verify_checkpoint
from dist_moe.engine.launch.signals import STOP_SIGNALS, Interruption, StopRequest, handling_signals, stop_requests
from tests.helpers.commands import finish, start, wait_for_steps
from tests.helpers.runs import write_config
from tests.helpers.sockets import children_of, listeners_of

LONG = ("train.max_steps=100000", "train.epochs=100000", "train.log_every=2")


@pytest.fixture(autouse=True)
def _nothing_is_ignored() -> Iterator[None]:
    """Tests that run in a script's background were started with SIGINT ignored, and so would be what they start."""
    defaults = dict.fromkeys(STOP_SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    with handling_signals(defaults):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), tiny_data)


def start_job(config: Path, run: Path, world_size: int = 1, *overrides: str) -> subprocess.Popen[str]:
    """A training of one process or of emulated ranks that does not end by itself."""
    emulated = ["--emulate", world_size] if world_size > 1 else []
    return start(sys.executable, "-m", "dist_moe", "train", config, "--run-dir", run, *emulated, *LONG, *overrides)


def members_of(command_line: str) -> list[int]:
    """Processes that live and have this text in their command line."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if command_line in words and state != "Z":
            found.append(int(directory.name))
    return found


def wait_until_handled(process: subprocess.Popen[str]) -> None:
    """Until the process has begun and handles our signals: before, nothing can say a sentence.

    Handlers are set in the order of STOP_SIGNALS: with the last one all are there.
    """
    status, bit = Path(f"/proc/{process.pid}/status"), 1 << (STOP_SIGNALS[-1] - 1)
    while process.poll() is None:
        (caught,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
        if int(caught, 16) & bit:
            return
        time.sleep(0.02)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_wish_is_taken_and_handlers_come_back(number: int) -> None:
    before = [signal.getsignal(one) for one in STOP_SIGNALS]
    with stop_requests() as request:
        os.kill(os.getpid(), number)
        assert request.signal_number == number
        os.kill(os.getpid(), signal.SIGTERM)  # somebody insists: the first one counts
        assert request.signal_number == number
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == before


def test_the_second_interrupt_raises() -> None:
    with stop_requests() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interruption, match="Ctrl-C"):
            os.kill(os.getpid(), signal.SIGINT)
    assert request.signal_number == signal.SIGTERM


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_what_was_ignored_stays_ignored(number: int) -> None:
    with handling_signals({number: signal.SIG_IGN}), stop_requests(StopRequest()) as request:
        os.kill(os.getpid(), number)
        assert request.signal_number == 0


def test_signals_before_training_end_with_a_sentence(config: Path, tmp_path: Path) -> None:
    """While modules are imported, data prepared or groups opened, whichever it is by then."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
    processes = [start_job(config, tmp_path / str(number)) for number in numbers]
    for process in processes:
        wait_until_handled(process)
    time.sleep(0.7)
    for process, number in zip(processes, numbers, strict=True):
        process.send_signal(number)
    for process, number in zip(processes, numbers, strict=True):
        outcome = finish(process)
        assert outcome.code == 128 + number
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        assert f"dist-moe: ended by {name}" in outcome.err
        assert "Traceback" not in outcome.err


STUCK = """
from dist_moe.engine.launch.signals import interruptible
from dist_moe.screen import guard_screen
from torch.distributed import HashStore
guard_screen()
with interruptible():
    print("waiting", flush=True)
    HashStore().get("what nobody tells")
"""


def test_a_signal_ends_a_process_that_waits_for_a_peer() -> None:
    """In a C++ function, so that no handler of Python's runs."""
    process = start(sys.executable, "-c", STUCK)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    outcome = finish(process)
    assert (outcome.code, outcome.err) == (143, "dist-moe: ended by SIGTERM, at once\n")


SWALLOWED = """
import os, signal
from dist_moe.cli import main
def as_modules_in_cpp_are_imported(arguments=None):
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
    except BaseException:
        pass
    {end}
main.main = as_modules_in_cpp_are_imported
main.console_script()
"""


@pytest.mark.parametrize("end", ["raise ImportError('cannot load module more than once per process')", "return 2"])
def test_a_signal_that_a_library_swallows_ends_the_process(end: str) -> None:
    """Not what comes of it, such as an import that fails when it is tried again."""
    outcome = finish(start(sys.executable, "-c", SWALLOWED.format(end=end)))
    assert (outcome.code, outcome.err) == (138, "dist-moe: ended by SIGUSR1\n")


@pytest.mark.parametrize(
    ("world_size", "frozen"),
    [(2, False), pytest.param(1, False, marks=pytest.mark.slow), pytest.param(2, True, marks=pytest.mark.slow)],
)
def test_the_second_ctrl_c_ends_at_once(config: Path, tmp_path: Path, world_size: int, frozen: bool) -> None:
    """While the first wish waits for the next collection of metrics, or ranks do nothing any more."""
    run = tmp_path / "run"
    process = start_job(config, run, world_size, "train.log_every=150")
    wait_for_steps(run, 150, process)
    ranks = children_of(process.pid)
    assert listeners_of([process.pid, *ranks]) <= {"127.0.0.1", "::1"}
    if frozen:
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert outcome.code == 130
    assert outcome.err.count("ended by Ctrl-C") == 1, outcome.err
    assert "stopped after step" not in outcome.err
    assert "Traceback" not in outcome.err
    assert members_of(str(run)) == []


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("number", [one for one in STOP_SIGNALS if one not in (signal.SIGTERM, signal.SIGINT)])
def test_every_wish_ends_in_a_checkpoint(config: Path, tmp_path: Path, number: int, world_size: int) -> None:
    run = tmp_path / "run"
    process = start_job(config, run, world_size)
    wait_for_steps(run, 2, process)
    process.send_signal(number)
    outcome = finish(process)
    assert outcome.code == 128 + number, outcome.err
    assert verify_checkpoint(newest_checkpoint(run)).step >= 2
    assert members_of(str(run)) == []


@pytest.mark.slow
def test_emulated_ranks_that_are_still_starting(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_job(config, run, 2)
    while not members_of(f"train {config} --run-dir {run} train.max_steps"):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    outcome = finish(process)
    assert outcome.code == 143
    assert outcome.err.count("ended by SIGTERM") == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert members_of(str(run)) == []
