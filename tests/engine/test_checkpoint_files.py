"""A checkpoint is complete or invisible; what was altered afterwards is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_moe.engine.checkpoint import files as checkpoint_files
from dist_moe.engine.checkpoint import format as checkpoint_format
from dist_moe.engine.checkpoint.files import (
    best_of,
    checkpoints_of,
    complete_directories,
    drop_after,
    newest_checkpoint,
    newest_good_checkpoint,
    partial_directory,
    publish,
    step_directory,
    verify_checkpoint,
)
from dist_moe.engine.checkpoint.format import MANIFEST, Manifest, TrainerState
from dist_moe.engine.checkpoint.safetensors_writer import write_tensors
from dist_moe.errors import UserError

DENSE, TRAINER = "dense.safetensors", "trainer.json"


def write(root: Path, step: int) -> Path:
    final = step_directory(root, step)
    partial = partial_directory(final)
    partial.mkdir(parents=True)
    files = {DENSE: write_tensors(partial / DENSE, {"weight|master": torch.full((3,), float(step))})}
    publish(partial, final, Manifest(step, files | TrainerState(step, {}, 0).write(partial)))
    return final


def steps_of(root: Path) -> list[str]:
    return [path.name for path in complete_directories(root)]


def test_published_checkpoints_verify(tmp_path: Path) -> None:
    manifest = verify_checkpoint(write(tmp_path, 7))
    assert manifest.step == 7
    assert set(manifest.files) == {DENSE, TRAINER}


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


DAMAGE = [flip_a_bit, cut_short, empty, os.remove]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [DENSE, TRAINER])
def test_an_altered_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    directory = write(tmp_path, 1)
    damage(directory / name)
    with pytest.raises(UserError) as error:
        verify_checkpoint(directory)
    assert str(directory / name) in str(error.value)


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "{}", '{"step": 1}', '{"step": 1, "files": {}, "x": 1}', "99"]
)
def test_a_manifest_that_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    """Missing, torn, or (99) of another format."""
    directory = write(tmp_path, 1)
    manifest = directory / MANIFEST
    if content == "99":
        content = json.dumps(json.loads(manifest.read_text()) | {"format_version": 99})
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(UserError) as error:
        verify_checkpoint(directory)
    assert str(directory) in str(error.value)
    assert MANIFEST in str(error.value)
    assert ("format_version=99" in str(error.value)) == ("99" in (content or ""))


def test_a_file_that_the_manifest_does_not_know(tmp_path: Path) -> None:
    """It would be read with the others."""
    directory = write(tmp_path, 1)
    (directory / "experts-00007.safetensors").write_text("from elsewhere")
    with pytest.raises(UserError, match=r"experts-00007\.safetensors"):
        verify_checkpoint(directory)


def test_the_last_good_one_is_found(tmp_path: Path) -> None:
    root = checkpoints_of(tmp_path)
    for step in (1, 2, 3):
        write(root, step)
    cut_short(root / "step-00000003" / DENSE)
    directory, errors = newest_good_checkpoint(tmp_path)
    assert directory.name == "step-00000002"
    assert [str(root / "step-00000003" / DENSE) in str(error) for error in errors] == [True]
    with pytest.raises(UserError, match=DENSE):
        newest_checkpoint(tmp_path)


def test_no_good_one_left(tmp_path: Path) -> None:
    root = checkpoints_of(tmp_path)
    for step in (1, 2):
        cut_short(write(root, step) / TRAINER)
    with pytest.raises(UserError) as error:
        newest_good_checkpoint(tmp_path)
    for step in (1, 2):
        assert str(step_directory(root, step) / TRAINER) in str(error.value)
    assert "--run-dir" in str(error.value)


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    for find in (newest_checkpoint, newest_good_checkpoint):
        with pytest.raises(UserError, match="checkpoint"):
            find(tmp_path)


@pytest.mark.parametrize("last_call", ["format.json_text", "files._flush", "os.rename"])
def test_a_process_that_dies_leaves_the_older_one(tmp_path: Path, last_call: str) -> None:
    """It is killed at the first such call while it publishes step 2."""
    root = checkpoints_of(tmp_path)
    write(root, 1)
    child = os.fork()
    if child == 0:
        owner, _, name = last_call.rpartition(".")
        modules = {"os": os, "files": checkpoint_files, "format": checkpoint_format}
        setattr(modules[owner], name, lambda *_: os._exit(9))
        write(root, 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert steps_of(root) == ["step-00000001"]
    assert newest_good_checkpoint(tmp_path) == (root / "step-00000001", [])


def test_nothing_is_visible_before_it_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    flush = checkpoint_files._flush

    def watched(path: Path) -> None:
        seen.append((path.name, step_directory(tmp_path, 1).exists()))
        flush(path)

    monkeypatch.setattr(checkpoint_files, "_flush", watched)
    write(tmp_path, 1)
    before = {name for name, visible in seen if not visible}
    assert before == {DENSE, TRAINER, MANIFEST, partial_directory(step_directory(tmp_path, 1)).name}
    assert seen[-1] == (tmp_path.name, True)


def test_checkpoints_of_steps_to_be_done_again_go(tmp_path: Path) -> None:
    for step in (1000, 12_000, 999):
        write(tmp_path, step)
    assert steps_of(tmp_path) == ["step-00000999", "step-00001000", "step-00012000"]
    drop_after(tmp_path, 1000)
    assert steps_of(tmp_path) == ["step-00000999", "step-00001000"]
    drop_after(tmp_path / "nowhere", 0)


def test_the_best_one_speaks_for_a_run(tmp_path: Path) -> None:
    root = checkpoints_of(tmp_path)
    for step in (1, 2):
        write(root, step)
    assert checkpoint_files.tested_checkpoint(tmp_path).name == "step-00000002"
    best = write(best_of(root), 1)
    assert checkpoint_files.tested_checkpoint(tmp_path) == best
    assert newest_checkpoint(tmp_path).name == "step-00000002"
    cut_short(best / DENSE)
    with pytest.raises(UserError, match=f"best.*{DENSE}"):
        checkpoint_files.tested_checkpoint(tmp_path)
