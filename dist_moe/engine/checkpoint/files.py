"""Checkpoints on disk: which are ours, complete and intact, which one is the newest good, and what may be removed.

Nothing here needs a process group: a torn checkpoint is found before any exists. Of what lies in the directories of
checkpoints only names that this module gives are ours; all else is neither read nor counted nor removed.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

from dist_moe.config.files import digest_of
from dist_moe.engine.checkpoint.contents import check_contents
from dist_moe.engine.checkpoint.format import FORMAT_VERSION, MANIFEST, OWN_DIGEST, Manifest, read_json
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.errors import UserError

_OURS = re.compile(r"step-[0-9]{8}")
_OUR_PARTIAL = re.compile(rf"\.{_OURS.pattern}\.partial")


def checkpoints_of(run_dir: Path) -> Path:
    """Return the directory of a run's checkpoints."""
    return run_dir / "checkpoints"


def best_of(checkpoints: Path) -> Path:
    """Return the directory of the checkpoint of the best validation loss, beside the others."""
    return checkpoints.with_name("best")


def step_directory(root: Path, step: int) -> Path:
    """Return the directory of the checkpoint of ``step``, at most LARGEST_STEP."""
    return root / f"step-{step:08d}"


def partial_directory(final: Path) -> Path:
    """Return where a checkpoint is being written: beside its place, under a name that is never read."""
    return final.with_name(f".{final.name}.partial")


def complete_directories(root: Path) -> list[Path]:
    """Return all checkpoints under ``root``, oldest first, without those still being written."""
    return sorted(path for path in root.glob("step-*") if _OURS.fullmatch(path.name) and path.is_dir())


def publish(partial: Path, final: Path, manifest: Manifest) -> Path | None:
    """Write the manifest, flush everything to disk and make the checkpoint visible in one rename.

    What stands in its place is moved aside; returns where that is now. Raises OSError, also where a file is missing.
    """
    sizes = {name: (partial / name).stat().st_size for name in manifest.files}
    (partial / MANIFEST).write_text(replace(manifest, sizes=sizes).text, encoding="utf-8")
    for path in [*partial.iterdir(), partial]:
        _flush(path)
    aside = set_aside(final, "replaced") if os.path.lexists(final) else None
    os.rename(partial, final)
    _flush(final.parent)
    return aside


def set_aside(path: Path, reason: str) -> Path:
    """Give what is not to be read, nor to be lost, a name that is not ours; return it. Raises OSError."""
    aside, number = path.with_name(f"{path.name}.{reason}"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.{reason}-{number}")
    os.rename(path, aside)
    return aside


def remove(directory: Path) -> None:
    """Remove a checkpoint, at first from sight: a process that dies meanwhile leaves no half of it. Raises OSError."""
    if directory.is_symlink():
        raise OSError("it is a link to another place, which is not removed")
    partial = partial_directory(directory)
    os.rename(directory, partial)
    shutil.rmtree(partial)


def drop_old(newest: Path, keep: int) -> dict[str, str]:
    """Remove all but ``keep`` checkpoints of those up to ``newest``, which is one of them, where they are readable.

    Returns sentences on what stays against that, by their causes.
    """
    left = {}
    for old in [directory for directory in complete_directories(newest.parent) if directory <= newest][:-keep]:
        try:
            check_files(old)
            remove(old)
        except (UserError, OSError) as error:
            cause = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            left[cause] = f"the old checkpoint {old} stays: {error}"
    return left


def drop_after(root: Path, step: int) -> list[str]:
    """Remove the checkpoints of steps that a resumed run does again, and what a dead process left half written.

    Those that cannot be read are moved aside. Returns sentences on them, and on what could not be removed.
    """
    told = []
    for directory in complete_directories(root):
        if int(directory.name.rpartition("-")[2]) > step:
            try:
                told += _take_away(directory)
            except OSError as error:
                told.append(f"checkpoint {directory}, of a step that is done again, could not be removed: {error}")
    for partial in root.glob(".step-*"):
        if _OUR_PARTIAL.fullmatch(partial.name) and partial.is_dir() and not partial.is_symlink():
            try:
                shutil.rmtree(partial)
            except OSError as error:
                told.append(f"{partial}, which a dead process left, could not be removed: {error}")
    return told


def _take_away(directory: Path) -> list[str]:
    try:
        verify_checkpoint(directory, whole=True)
    except UserError as error:
        return [f"{error}; it is kept as {set_aside(directory, 'damaged')}"]
    if directory.is_symlink():
        return [f"the link {directory}, to a step that is done again, is kept as {set_aside(directory, 'replaced')}"]
    remove(directory)
    return []


class OtherFormatError(UserError):
    """A checkpoint is of a format that this version of dist_moe neither reads nor removes."""


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises OtherFormatError if it is of another format, and UserError if it cannot be read or is not, to the byte, as
    it was written.
    """
    path = directory / MANIFEST
    try:
        content = read_json(path)
    except UserError as error:
        raise UserError(f"checkpoint {directory} has no readable {MANIFEST}: {error}") from error
    version = content.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        raise OtherFormatError(
            f"checkpoint {directory} has format_version={version} in its {MANIFEST}; this version of dist_moe reads "
            f"and writes {FORMAT_VERSION} only: go on with the version that wrote it, or train anew"
        )
    digest = content.pop(OWN_DIGEST, None)
    manifest = Manifest.of(content, path)
    if digest != manifest.digest or path.read_bytes() != manifest.text.encode():
        raise UserError(f"checkpoint file {path} is torn or altered: its sha256 is not the one that it names")
    return manifest


def check_files(directory: Path) -> Manifest:
    """Return the manifest of a checkpoint whose files are all there in their sizes, not read. Raises UserError."""
    manifest = read_manifest(directory)
    if _OURS.fullmatch(directory.name) and directory.name != step_directory(directory, manifest.step).name:
        raise UserError(f"checkpoint {directory} was moved or replaced: its {MANIFEST} is of step {manifest.step}")
    for name, expected in manifest.sizes.items():
        file = directory / name
        if not file.is_file():
            raise UserError(f"checkpoint file {file} is missing")
        if (size := file.stat().st_size) != expected:
            raise UserError(f"checkpoint file {file} is torn or altered: it has {size} bytes, not {expected}")
    unknown = {file.name for file in directory.iterdir()} - manifest.files.keys() - {MANIFEST}
    if unknown:
        raise UserError(f"checkpoint {directory} holds files that its {MANIFEST} does not name: {sorted(unknown)}")
    return manifest


def reads_all() -> bool:
    """Return whether this rank reads files from end to end for its node; the others trust it."""
    return LaunchEnvironment.read().local_rank == 0


def verify_checkpoint(directory: Path, *, whole: bool | None = None) -> Manifest:
    """Check a checkpoint: its files, their digests, and that what they hold can be a model's state.

    ``whole``: read every byte, else only what is small, sizes and heads; None: on the first rank of each node, so that
    a file system gives every byte once per node. Raises UserError naming the file, and what in it is wrong.
    """
    manifest = check_files(directory)
    whole = reads_all() if whole is None else whole
    for name, expected in manifest.files.items() if whole else ():
        if digest_of(directory / name) != expected:
            file = directory / name
            raise UserError(f"checkpoint file {file} is torn or altered: its sha256 is not the one of {MANIFEST}")
    check_contents(directory, manifest, values=whole)
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


def newest_good_checkpoint(run_dir: Path, *, whole: bool | None = None) -> tuple[Path, list[UserError]]:
    """Return the newest checkpoint of ``run_dir`` that is intact, and what is wrong with newer ones.

    ``whole``: as for :func:`verify_checkpoint`; a rank that decides for others must read all. Raises UserError if
    there is none, and if a newer one, or the best one, is of another format: that is no damage, and a run that went on
    from before it would lose what was done since.
    """
    root = checkpoints_of(run_dir)
    errors: list[UserError] = []
    for directory in [*complete_directories(best_of(root)), *reversed(complete_directories(root))]:
        try:
            read_manifest(directory)
            if directory.parent == root:
                verify_checkpoint(directory, whole=whole)
                return directory, errors
        except OtherFormatError as error:
            remedy = f"to go on without it, move {directory.name} out of {directory.parent}"
            raise UserError(f"{error}; {remedy}") from error
        except UserError as error:
            errors += [error] if directory.parent == root else []
    reasons = "; ".join(map(str, errors)) or "none was written"
    raise UserError(f"no usable checkpoint in {root}: {reasons}. Start again with a new --run-dir")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
