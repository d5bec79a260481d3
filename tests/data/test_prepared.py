"""A prepared directory is whole or absent, whoever dies and however many ask at once; splits are fair."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dist_moe.data import prepared as cache
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.labelled_text import LabelledTextConfig, QuestionsConfig
from dist_moe.data.movielens import MovieLensConfig
from dist_moe.data.prepared import MANIFEST, DataSettings, Prepared, prepare_data, prepared, split_off_tenths
from dist_moe.data.text import TextConfig
from dist_moe.data.two_images import TwoImagesConfig
from dist_moe.errors import UserError

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


def test_data_that_is_made_in_memory_has_nothing_to_prepare() -> None:
    assert DataSettings(name="waves").fetch(progress=False).startswith("waves: nothing to prepare")


def flip_a_bit(target: Path) -> None:
    content = bytearray((target / "a.npy").read_bytes())
    content[-3] ^= 1
    (target / "a.npy").write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda target: os.truncate(target / "a.npy", 400),
        lambda target: (target / "b.npy").unlink(),
        lambda target: (target / MANIFEST).unlink(),
        lambda target: os.truncate(target / MANIFEST, 20),
        lambda target: (target / MANIFEST).write_text("[]"),
    ],
)
def test_damage_is_noticed_said_and_fixed(
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


def test_an_error_while_building_or_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Prepared:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "key", fail, SILENT)
    assert leftovers(tmp_path / "key") == []
    written: list[Path] = []

    def second_fails(path: Path, array: object, **_: object) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        path.write_bytes(b"half")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", second_fails)
        with pytest.raises(OSError, match="No space left"):
            prepared(tmp_path / "key", build, SILENT)
    assert leftovers(tmp_path / "key") == []
    prepared(tmp_path / "key", build, SILENT)


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        *((MovieLensConfig, wrong) for wrong in ({"seed": -1}, {"name": "movielens-20m"}, {"sead": 1})),
        *((TwoImagesConfig, wrong) for wrong in ({"name": "multi-cifar"}, {"train_examples": 0})),
        *((LabelledTextConfig, wrong) for wrong in ({"max_length": 7}, {"name": "imdb"}, {"seed": -1})),
        (TextConfig, {"end_of_text": "</s>"}),
        (QuestionsConfig, {"max_length": 60, "stride": 57}),
    ],
)
def test_a_wrong_configuration_is_refused(config: type[DataSettings], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=list(wrong)[-1]):
        config.model_validate(wrong)


def test_a_cache_that_cannot_be_written_is_an_error_of_the_user(tmp_path: Path) -> None:
    (blocked := tmp_path / "a-file").write_text("")
    with pytest.raises(UserError, match=f"the cache {blocked} cannot be used[\\s\\S]*DIST_MOE_CACHE"):
        prepare_data(MovieLensConfig(cache=blocked), "key", lambda downloads: build(), SILENT)


@pytest.mark.parametrize("held_out", [1, 2])
@given(st.lists(st.integers(0, 3), max_size=80), st.integers(0, 5))
def test_a_tenth_of_each_class_is_split_off_for_each_part(held_out: int, classes: list[int], seed: int) -> None:
    classes_N = np.array(classes, dtype=np.int64)
    parts = split_off_tenths(classes_N, held_out, np.random.default_rng(seed))
    assert len(parts) == held_out + 1
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(classes)))
    for rows in parts[1:]:
        got = Counter(classes_N[rows].tolist())
        assert got == Counter({each: (n + 5) // 10 for each, n in Counter(classes).items() if n >= 5})
    again = split_off_tenths(classes_N, held_out, np.random.default_rng(seed))
    assert [rows.tolist() for rows in again] == [rows.tolist() for rows in parts]


def test_every_part_is_in_random_order() -> None:
    classes_N = np.arange(10_000) < 5_000
    for part in split_off_tenths(classes_N, 2, np.random.default_rng(0)):
        assert 0.4 < classes_N[part[: len(part) // 2]].mean() < 0.6


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
