"""A prepared directory is whole or absent, whoever dies and however many ask at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_moe.data import prepared as cache
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.prepared import MANIFEST, Prepared, prepared

SILENT = Progress(enabled=False)
REPOSITORY = Path(cache.__file__).parents[3]


def build() -> Prepared:
    return Prepared({"a": np.arange(1000, dtype=np.int32), "b": np.zeros(0, dtype=np.int8)}, {"answer": 42})


def no_build() -> Prepared:
    raise AssertionError("built although it was prepared")


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path.name != f"{target.name}.lock")


def test_built_once_then_mapped_from_disk(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "key"
    prepared(target, build, SILENT)
    content = prepared(target, no_build, SILENT)
    assert content.manifest["answer"] == 42
    assert isinstance(content.arrays["a"], np.memmap)
    assert not content.arrays["a"].flags.writeable
    np.testing.assert_array_equal(content.arrays["a"], np.arange(1000))
    assert content.arrays["b"].shape == (0,)
    assert leftovers(target) == ["key"]


def test_a_prepared_cache_need_not_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(tmp_path / "key", build, SILENT)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(cache, "locked", refuse)
    assert prepared(tmp_path / "key", no_build, SILENT).manifest["answer"] == 42


def truncate(target: Path) -> None:
    os.truncate(target / "a.npy", 400)


def flip_a_bit(target: Path) -> None:
    content = bytearray((target / "a.npy").read_bytes())
    content[-3] ^= 1
    (target / "a.npy").write_bytes(content)


def lose_an_array(target: Path) -> None:
    (target / "b.npy").unlink()


def lose_the_manifest(target: Path) -> None:
    (target / MANIFEST).unlink()


def tear_the_manifest(target: Path) -> None:
    os.truncate(target / MANIFEST, 20)


def replace_the_manifest(target: Path) -> None:
    (target / MANIFEST).write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit, lose_an_array, lose_the_manifest, tear_the_manifest, replace_the_manifest],
)
def test_damage_is_noticed_said_and_mended(
    tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "key"
    prepared(target, build, SILENT)
    damage(target)
    content = prepared(target, build, Progress(enabled=True))
    np.testing.assert_array_equal(content.arrays["a"], np.arange(1000))
    assert f"the prepared data {target} is damaged" in capsys.readouterr().err
    prepared(target, no_build, SILENT)
    assert leftovers(target) == ["key"]


def test_an_error_while_building_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Prepared:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "key", fail, SILENT)
    assert leftovers(tmp_path / "key") == []
    prepared(tmp_path / "key", build, SILENT)


def test_an_error_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        written: list[Path] = []

        def second_fails(path: Path, array: object, **_: object) -> None:
            if written:
                raise OSError(28, "No space left on device")
            written.append(path)
            path.write_bytes(b"half")

        patch.setattr(np, "save", second_fails)
        with pytest.raises(OSError, match="No space left"):
            prepared(tmp_path / "key", build, SILENT)
    assert leftovers(tmp_path / "key") == []
    prepared(tmp_path / "key", build, SILENT)


def run_python(source: str, *arguments: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
import numpy as np
from dist_moe.data.prepared import Prepared, prepared
from dist_moe.data.fetch.progress import Progress

save, written = np.save, []
def save_once_then_die(path, array, **options):
    if written:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(save(path, array, **options))
np.save = save_once_then_die
prepared(Path(sys.argv[1]), lambda: Prepared({"a": np.arange(9), "b": np.arange(9)}, {}), Progress(False))
"""


def test_a_killed_preparation_leaves_no_result_and_the_next_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "key"
    killed = run_python(KILLED_WHILE_WRITING, target)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    (stale,) = tmp_path.glob(".key.*.tmp")
    assert (stale / "new" / "a.npy").exists()
    prepared(target, build, SILENT)
    assert leftovers(target) == ["key"]


def test_scratch_of_another_key_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / ".key-2.1-abcd.tmp"
    other.mkdir()
    prepared(tmp_path / "key", build, SILENT)
    assert other.exists()


SLOW_BUILD = """
import os, sys, time
from pathlib import Path
import numpy as np
from dist_moe.data.prepared import Prepared, prepared
from dist_moe.data.fetch.progress import Progress

target, start, log = map(Path, sys.argv[1:])
(start.parent / f"ready-{os.getpid()}").touch()
while not start.exists():
    time.sleep(0.01)
def build():
    with log.open("a") as file:
        file.write("built\\n")
    time.sleep(1.0)
    return Prepared({"a": np.random.default_rng().random(100)}, {})
array = prepared(target, build, Progress(True)).arrays["a"]
with log.open("a") as file:
    file.write(f"got {array.sum().hex()}\\n")
"""


def test_of_three_processes_one_builds_and_all_get_the_same(tmp_path: Path) -> None:
    start, log = tmp_path / "start", tmp_path / "log"
    processes = [run_python(SLOW_BUILD, tmp_path / "cache" / "key", start, log) for _ in range(3)]
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("ready-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    start.touch()
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    lines = log.read_text().splitlines()
    assert lines.count("built") == 1
    assert len({line for line in lines if line.startswith("got")}) == 1
    assert sum(line.startswith("got") for line in lines) == 3
