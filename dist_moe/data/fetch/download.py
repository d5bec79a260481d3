"""Fetching a published file whose SHA-256 is pinned: from a URL, or as a package through pip, npm or apt-get.

A file is either verified or absent: it is fetched into a scratch directory, checked, and renamed to its
place. Failing to reach a source (`NetworkFailure`) is told apart from being served the wrong bytes
(`UserError`): the first lets a caller try another source, the second must never pass unseen.
"""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dist_moe.data.fetch.files import locked, scratch, sha256_of
from dist_moe.data.fetch.progress import Progress
from dist_moe.errors import UserError

SOCKET_TIMEOUT_S = 10.0
"""Longest wait for a connection, and for the next bytes on it."""

DOWNLOAD_TIMEOUT_S = 900.0
"""Longest whole download, by URL or by package manager: a source that only trickles counts as out of reach."""

CHUNK_BYTES = 1 << 18


class NetworkFailure(Exception):
    """A source could not be reached, or broke off; the message is the reason, in one line."""


@dataclass(frozen=True)
class Archive:
    """A published file: its name, its SHA-256 (hexadecimal) and who publishes it (for messages)."""

    filename: str
    sha256: str
    origin: str


def kept(archive: Archive, downloads: Path) -> Path | None:
    """The archive in ``downloads``, verified again; None if it is not there.

    Raises:
        UserError: the kept file's SHA-256 is not the pinned one.
    """
    path = downloads / archive.filename
    if not path.exists():
        return None
    if (found := sha256_of(path)) != archive.sha256:
        raise UserError(
            f"the kept download {path} is corrupt: expected SHA-256 {archive.sha256}, got {found}.\n"
            f"Remedy: delete that file; it is then fetched again."
        )
    return path


def fetch(archive: Archive, downloads: Path, bring: Callable[[Path], None], progress: Progress) -> Path:
    """Path of the verified archive in ``downloads``; ``bring(path)`` fetches it if it is not there yet.

    Raises:
        NetworkFailure: from ``bring``; nothing is left behind.
        UserError: the SHA-256 is wrong (the file is deleted), or a kept file is corrupt.
    """
    target = downloads / archive.filename
    with locked(target, progress):
        if (path := kept(archive, downloads)) is not None:
            return path
        with scratch(target) as directory:
            incoming = directory / archive.filename
            bring(incoming)
            if (found := sha256_of(incoming)) != archive.sha256:
                raise UserError(
                    f"{archive.filename} from {archive.origin} is not the file that was published: "
                    f"expected SHA-256 {archive.sha256}, got {found}. It was deleted, not used.\n"
                    f"Remedy: try again on a network without a filtering proxy or a stale mirror, "
                    f"or give your own copy of the data (--data-root DIR)."
                )
            os.replace(incoming, target)
    return target


def bring_url(url: str, path: Path, progress: Progress) -> None:
    """Write the body of ``url`` to ``path``. Raises `NetworkFailure`; disk errors stay ``OSError``."""
    with path.open("wb") as file:
        for chunk in _chunks(url, progress):
            file.write(chunk)


def _chunks(url: str, progress: Progress) -> Iterator[bytes]:
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT_S
    try:
        with urllib.request.urlopen(url, timeout=SOCKET_TIMEOUT_S) as response:
            expected = response.headers.get("Content-Length")
            total = None if expected is None else int(expected)
            received = 0
            with progress.meter(f"downloading {url}", total) as meter:
                while chunk := response.read(CHUNK_BYTES):
                    if time.monotonic() > deadline:
                        raise NetworkFailure(f"not finished after {DOWNLOAD_TIMEOUT_S:.0f} s")
                    received += len(chunk)
                    meter.update(len(chunk))
                    yield chunk
    except urllib.error.HTTPError as error:
        raise NetworkFailure(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise NetworkFailure(str(getattr(error, "reason", None) or error or type(error).__name__)) from error
    # http.client ends a body that breaks off silently; only its length tells.
    if total is not None and received < total:
        raise NetworkFailure(f"the connection broke off after {received:,} of {total:,} bytes")


def bring_wheel(requirement: str, path: Path, progress: Progress) -> None:
    """Have pip download the wheel of ``requirement`` (``name==version``) to ``path``; nothing is installed.

    Runs this interpreter's pip, in a process of its own, with the user's pip configuration, without
    dependencies and without a terminal to ask on. Raises `NetworkFailure` with pip's last error.
    """
    progress.say(f"downloading {requirement} with pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(path.parent), requirement]
    _run("pip", command, path, partial(_last_error, prefix="ERROR:"), cwd=None)


def bring_npm_package(requirement: str, path: Path, progress: Progress) -> None:
    """Have npm download the package ``requirement`` (``name@version``) to ``path``; nothing is installed or run.

    Uses the user's npm configuration. Raises `NetworkFailure` with npm's last error, or if this system has no npm.
    """
    if shutil.which("npm") is None:
        raise NetworkFailure("this system has no npm; install it, or let npm_config_registry name a registry")
    progress.say(f"downloading {requirement} with npm")
    command = ["npm", "pack", requirement, "--pack-destination", str(path.parent)]
    command += ["--ignore-scripts", "--no-update-notifier", "--loglevel=error"]
    # Away from any package.json, which npm would read.
    _run("npm", command, path, _npm_error, cwd=path.parent)


def bring_debian_package(requirement: str, path: Path, progress: Progress) -> None:
    """Have apt-get download the package ``requirement`` (``name=version``) to ``path``; nothing is installed.

    Needs the package lists of a Debian release that has this version, but no privileges. Raises
    `NetworkFailure` with apt-get's last error, or if this system has no apt-get.
    """
    if shutil.which("apt-get") is None:
        raise NetworkFailure("this system has no apt-get")
    progress.say(f"downloading {requirement} with apt-get")
    # apt-get has no option for the destination: it writes to the directory it runs in.
    command = ["apt-get", "--quiet", "download", requirement]
    _run("apt-get", command, path, partial(_last_error, prefix="E:"), cwd=path.parent)


def _run(tool: str, command: list[str], path: Path, reason: Callable[[str], str], *, cwd: Path | None) -> None:
    """Run a package manager that has to leave the file ``path``; ``reason`` finds the error in its stderr."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DOWNLOAD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise NetworkFailure(f"{tool} had not finished after {DOWNLOAD_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        raise NetworkFailure(reason(done.stderr) or f"{tool} exited with code {done.returncode}")
    if not path.exists():
        raise NetworkFailure(f"{tool} did not bring {path.name}")


def _last_error(stderr: str, prefix: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(prefix)]
    return (errors or lines or [""])[-1].removeprefix(prefix).strip()


def _npm_error(stderr: str) -> str:
    """The line that says what happened: npm prints a code before it, and advice after it."""
    errors = [line.removeprefix("npm error").strip() for line in stderr.splitlines() if line.startswith("npm error")]
    said = [line for line in errors if line and not line.startswith(("code ", "errno ", "syscall "))]
    return (said or errors or [""])[0]
