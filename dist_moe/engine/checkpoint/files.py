"""Checkpoints on disk: where they lie, which are complete and intact, which one is the newest good.

Nothing here needs a process group: a torn checkpoint is found before any exists.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from dist_moe.config.files import digest_of
from dist_moe.engine.checkpoint.format import FORMAT_VERSION, MANIFEST, OWN_DIGEST, Manifest
from dist_moe.errors import UserError

_PREFIX = "step-"


def checkpoints_of(run_dir: Path) -> Path:
    """Return the directory of a run's checkpoints."""
    return run_dir / "checkpoints"


def best_of(checkpoints: Path) -> Path:
    """Return the directory of the checkpoint of the best validation loss, beside the others."""
    return checkpoints.with_name("best")


def step_directory(root: Path, step: int) -> Path:
    """Return the directory of the checkpoint of ``step``."""
    return root / f"{_PREFIX}{step:08d}"


def partial_directory(final: Path) -> Path:
    """Return where a checkpoint is being written: beside its place, under a name that is never read."""
    return final.with_name(f".{final.name}.partial")


def complete_directories(root: Path) -> list[Path]:
    """Return all checkpoints under ``root``, oldest first, without those still being written."""
    return sorted(path for path in root.glob(f"{_PREFIX}*") if path.is_dir())


def publish(partial: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest, flush everything to disk and make the checkpoint visible in one rename."""
    (partial / MANIFEST).write_text(manifest.text, encoding="utf-8")
    for path in [*partial.iterdir(), partial]:
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    _flush(final.parent)


def drop_after(root: Path, step: int) -> None:
    """Remove the checkpoints of steps that a resumed run does again, and what a dead process left half written."""
    for directory in complete_directories(root):
        if directory > step_directory(root, step):
            shutil.rmtree(directory)
    for partial in root.glob(partial_directory(root / f"{_PREFIX}*").name):
        shutil.rmtree(partial)


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises UserError if it cannot be read, is of another format or is not, to the byte, as it was written.
    """
    path = directory / MANIFEST
    try:
        text = path.read_bytes().decode()
        content = json.loads(text)
        version = content["format_version"]
        if version == FORMAT_VERSION:
            del content[OWN_DIGEST]
            manifest = Manifest(**content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"checkpoint {directory} has no readable {MANIFEST}: {error}") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {directory} has format_version={version} in its {MANIFEST}; this version of dist_moe reads "
            f"and writes {FORMAT_VERSION} only: go on with the version that wrote it, or train anew"
        )
    if manifest.text != text:
        raise UserError(f"checkpoint file {path} is torn or altered: its sha256 is not the one that it names")
    return manifest


def verify_checkpoint(directory: Path) -> Manifest:
    """Compare every file with its digest. Raises UserError naming the file that is missing or altered."""
    manifest = read_manifest(directory)
    if directory.name.startswith(_PREFIX) and directory.name != step_directory(directory.parent, manifest.step).name:
        raise UserError(f"checkpoint {directory} was moved or replaced: its {MANIFEST} is of step {manifest.step}")
    for name, expected in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise UserError(f"checkpoint file {file} is missing")
        if digest_of(file) != expected:
            raise UserError(f"checkpoint file {file} is torn or altered: its sha256 is not the one of {MANIFEST}")
    unknown = {file.name for file in directory.iterdir()} - manifest.files.keys() - {MANIFEST}
    if unknown:
        raise UserError(f"checkpoint {directory} holds files that its {MANIFEST} does not name: {sorted(unknown)}")
    return manifest


def tested_checkpoint(run_dir: Path) -> Path:
    """Return the checkpoint that stands for a run: its best where one is kept, else its newest.

    Raises UserError if there is none or if it is not intact.
    """
    best = best_of(checkpoints_of(run_dir))
    return _newest_in(best if complete_directories(best) else checkpoints_of(run_dir))


def newest_checkpoint(run_dir: Path) -> Path:
    """Return the newest checkpoint of ``run_dir``. Raises UserError if there is none or if it is not intact."""
    return _newest_in(checkpoints_of(run_dir))


def _newest_in(root: Path) -> Path:
    directories = complete_directories(root)
    if not directories:
        raise UserError(f"{root} holds no checkpoint yet")
    verify_checkpoint(directories[-1])
    return directories[-1]


def newest_good_checkpoint(run_dir: Path) -> tuple[Path, list[UserError]]:
    """Return the newest checkpoint of ``run_dir`` whose digests hold, and what is wrong with newer ones.

    Raises UserError if there is none.
    """
    root = checkpoints_of(run_dir)
    errors: list[UserError] = []
    for directory in reversed(complete_directories(root)):
        try:
            verify_checkpoint(directory)
        except UserError as error:
            errors.append(error)
        else:
            return directory, errors
    reasons = "; ".join(map(str, errors)) or "none was written"
    raise UserError(f"no usable checkpoint in {root}: {reasons}. Start again with a new --run-dir")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
