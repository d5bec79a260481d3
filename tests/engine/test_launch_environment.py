"""Rank, world size and ranks per node as launchers give them; freed memory that is used again."""

from __future__ import annotations

import platform
import pwd
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dist_moe.cli.main import main
from dist_moe.config.files import absolute
from dist_moe.data.fetch.files import cache_directory
from dist_moe.engine.launch.environment import LaunchEnvironment, launched_ranks_per_node
from dist_moe.engine.launch.signals import speaks_for_node
from dist_moe.errors import LaunchError, UserError

PROGRAM = """
import os, resource, torch
from dist_moe.engine.launch.environment import disable_malloc_trim

def step():
    tensors = [torch.ones(16 * 2**20) for _ in range(4)]  # 64 MiB each: above what glibc keeps by itself
def faults(trims):
    assert trims or disable_malloc_trim()
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for trims in (False, False, False, True):  # a fork each: what malloc is told holds for the process
    if os.fork() == 0:
        print(faults(trims), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_without_a_launcher() -> None:
    environment = LaunchEnvironment.read()
    assert (environment.rank, environment.world_size, environment.launched) == (0, 1, False)
    assert environment.is_rank_zero


@pytest.mark.parametrize(("rank", "world_size", "local_rank"), [(0, 1, 0), (1, 2, 1), (5, 8, 1)])
def test_with_one(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, local_rank: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    environment = LaunchEnvironment.read()
    assert environment == LaunchEnvironment(rank, world_size, local_rank, launched=True)
    assert environment.is_rank_zero == (rank == 0)


JOB = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE=None is not a number", "with none of them set"]),
        ({"WORLD_SIZE": "2"}, ["RANK=None is not a number"]),
        (JOB | {"RANK": "4"}, ["RANK=4 is not in 0..3", "WORLD_SIZE=4"]),
        (JOB | {"WORLD_SIZE": "0"}, ["RANK=1 is not in 0..-1"]),
        *(
            (JOB | {"LOCAL_RANK": bad}, [f"LOCAL_RANK={bad!r} is not a number"])
            for bad in ("-1", "", "1.0", "²", "9" * 30)
        ),
        *((JOB | {"RANK": bad}, [f"RANK={bad!r} is not a number"]) for bad in ("abc", "-1", " 1", "٣")),
        (JOB | {"LOCAL_RANK": "2"}, ["LOCAL_RANK=2, LOCAL_WORLD_SIZE=2 and WORLD_SIZE=4 contradict each other"]),
        (JOB | {"LOCAL_WORLD_SIZE": "5"}, ["LOCAL_WORLD_SIZE=5 and WORLD_SIZE=4 contradict each other"]),
        *((JOB | {"LOCAL_WORLD_SIZE": bad}, [f"{bad!r} is not a number of ranks"]) for bad in ("0", "-2", "two", "")),
        *(
            (
                JOB | MEETING | {"MASTER_PORT": bad},
                [f"MASTER_PORT={bad.strip()!r} is not a port", "1 to 65535", "10.0.0.1"],
            )
            for bad in ("abc", "0", "65536", "70000", "-1", "", " ", "9" * 5000)
        ),
        *((JOB | MEETING | {"MASTER_ADDR": bad}, ["MASTER_ADDR is missing or empty"]) for bad in ("", " ")),
        (JOB | {"MASTER_ADDR": "10.0.0.1"}, ["MASTER_PORT='' is not a port"]),
        (JOB | {"MASTER_PORT": "29500"}, ["MASTER_ADDR is missing or empty"]),
        *(
            ({"OMP_NUM_THREADS": bad}, [f"OMP_NUM_THREADS={bad!r}", "set 1 or more"])
            for bad in ("abc", "0", "-3", "2,x")
        ),
    ],
    ids=lambda value: " ".join(f"{k}={v[:9]}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_variables_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], parts: list[str]
) -> None:
    for name in (*MEETING, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError) as refusal:
        LaunchEnvironment.read()
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    "variables", [{"LOCAL_RANK": "-1"}, {"LOCAL_RANK": "3"}, {"OMP_NUM_THREADS": ""}, {"OMP_NUM_THREADS": "4,2"}]
)
def test_variables_that_say_nothing(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Of a job without rank and size there is no launcher, whatever other programs set."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert LaunchEnvironment.read() == LaunchEnvironment()


@pytest.mark.parametrize(
    ("variables", "speaks"),
    [
        ({}, True),
        (JOB | {"LOCAL_RANK": "0"}, True),
        (JOB, False),
        (JOB | {"LOCAL_RANK": "-1"}, True),
        ({"LOCAL_RANK": "3"}, True),
        (JOB | {"RANK": "x"}, True),
    ],
)
def test_one_process_of_a_machine_speaks_unless_their_variables_are_wrong(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], speaks: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert speaks_for_node() is speaks


@pytest.mark.parametrize(
    ("limits", "raised_to"), [((32, 10**6), 320), ((70, 70), None), ((-1, -1), None), ((999, -1), None)]
)
def test_the_limit_of_open_files_is_raised_where_it_may(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], raised_to: int | None
) -> None:
    new: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: new.append(both))
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    if limits != (70, 70):
        LaunchEnvironment.read()
        assert new == ([(raised_to, limits[1])] if raised_to else [])
    else:
        with pytest.raises(LaunchError, match=r"70 files open at once, and needs 72 or more.*ulimit -n"):
            LaunchEnvironment.read()


def test_without_a_directory_for_temporary_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    assert main(["train", "configs/movielens_small.yaml"]) == 2
    assert "No usable temporary directory found in ['/nowhere']: set TMPDIR" in capsys.readouterr().err


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(pwd, "getpwnam", nobody)
    with pytest.raises(UserError, match=r"data\.cache and DIST_MOE_CACHE are not given.*set HOME"):
        cache_directory(None)
    assert cache_directory(Path("/given")) == Path("/given")
    for path in ("~/data", "~somebody/data"):
        with pytest.raises(UserError, match="no such home directory"):
            absolute(Path(path))
    for relative in ("", "here"):
        monkeypatch.setenv("HOME", relative)
        with pytest.raises(UserError, match="is no absolute path"):
            cache_directory(None)


def test_a_process_tells_what_is_wrong_with_its_own_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (JOB | {"RANK": "9"}).items():
        monkeypatch.setenv(name, value)
    assert main(["train", "configs/movielens_small.yaml"]) == 2
    assert "dist-moe: RANK=9 is not in 0..3" in capsys.readouterr().err


def test_ranks_per_node_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched_ranks_per_node() is None
    monkeypatch.setenv("LOCAL_SIZE", "3")
    assert launched_ranks_per_node() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launched_ranks_per_node() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "none")
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE='none' is not a number of ranks"):
        launched_ranks_per_node()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own tuning")
def test_a_step_faults_its_memory_in_only_once() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    *kept, trimmed = map(int, done.stdout.split())
    assert min(kept) * 4 < trimmed  # the kernel may take pages away meanwhile
