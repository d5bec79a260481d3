"""Downloading one file to a path: from an address, or as a package through pip, npm or apt-get.

The user's configuration of the package managers holds (mirrors, proxies); nothing is installed or run.
"""

from __future__ import annotations

import http.client
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_moe.data.fetch.progress import Progress

SOCKET_TIMEOUT_S = 10.0
"""Longest wait for a connection, and for the next bytes on it."""

DOWNLOAD_TIMEOUT_S = 900.0
"""Longest whole download, by URL or by package manager: a source that only trickles counts as out of reach."""

CHUNK_BYTES = 1 << 18


class NetworkFailure(Exception):
    """No source could be reached, or it broke off; the arguments are the reasons, a line for each source."""

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


def download_url(url: str, path: Path, progress: Progress) -> None:
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


def download_wheel(requirement: str, path: Path, progress: Progress, options: Sequence[str] = ()) -> None:
    """Have pip download the wheel of ``requirement`` (``name==version``) to ``path``; ``options``: further ones of pip.

    Runs this interpreter's pip without dependencies and without a terminal to ask on. Raises `NetworkFailure`.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", *options, "--dest", str(path.parent), requirement]
    _run("pip", requirement, command, path, progress, error_prefix="ERROR:")


def download_sdist(requirement: str, path: Path, progress: Progress) -> None:
    """Download the source archive of ``requirement`` (``name==version``) to ``path`` from where pip finds it.

    Downloading one with pip would run its setup.py. So pip is asked for wheels alone, and the address is among the
    links that it says it skips. Raises `NetworkFailure`.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "-vv"]
    command += ["--disable-pip-version-check", "--dest", str(path.parent), requirement]
    done = _finished("pip", command, path)
    if (link := re.search(rf"\S+/{re.escape(path.name)}(?!\S)", done.stdout)) is None:
        raise NetworkFailure(_reason(done.stderr, "ERROR:") or f"pip finds no {path.name}")
    download_url(link[0], path, progress)


def download_npm_package(requirement: str, path: Path, progress: Progress) -> None:
    """Have npm download the package ``requirement`` (``name@version``) to ``path``. Raises `NetworkFailure`."""
    if shutil.which("npm") is None:
        raise NetworkFailure("this system has no npm; install it, or let npm_config_registry name a registry")
    command = ["npm", "pack", requirement, "--pack-destination", str(path.parent)]
    command += ["--ignore-scripts", "--no-update-notifier", "--loglevel=error"]
    _run("npm", requirement, command, path, progress, error_prefix="npm error")


def download_debian_package(requirement: str, path: Path, progress: Progress) -> None:
    """Have apt-get download the package ``requirement`` (``name=version``) to ``path``. Raises `NetworkFailure`.

    Needs the package lists of a Debian release that has this version, but no privileges.
    """
    if shutil.which("apt-get") is None:
        raise NetworkFailure("this system has no apt-get")
    _run("apt-get", requirement, ["apt-get", "--quiet", "download", requirement], path, progress, error_prefix="E:")


def _run(tool: str, requirement: str, command: list[str], path: Path, progress: Progress, *, error_prefix: str) -> None:
    """Run a package manager, which has to leave the file ``path``. Raises `NetworkFailure` with its last error."""
    progress.say(f"downloading {requirement} with {tool}")
    done = _finished(tool, command, path)
    if done.returncode != 0:
        raise NetworkFailure(_reason(done.stderr, error_prefix) or f"{tool} exited with code {done.returncode}")
    if not path.exists():
        raise NetworkFailure(f"{tool} did not download {path.name}")


def _finished(tool: str, command: list[str], path: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that is about the file ``path`` to its end. Raises `NetworkFailure` if that takes too long."""
    try:
        return subprocess.run(
            command,
            # apt-get writes to the directory it runs in, and npm reads no package.json there; pip's settings may have
            # paths relative to the user's own.
            cwd=None if tool == "pip" else path.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DOWNLOAD_TIMEOUT_S,
            encoding="utf-8",
        )
    except subprocess.TimeoutExpired as error:
        raise NetworkFailure(f"{tool} had not finished after {DOWNLOAD_TIMEOUT_S:.0f} s") from error


def _reason(stderr: str, prefix: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix(prefix).strip() for line in lines if line.startswith(prefix)]
    if prefix == "npm error":  # npm prints a code before the line that says what happened, and advice after it
        said = [line for line in errors if line and not line.startswith(("code ", "errno ", "syscall "))]
        return (said or errors or [""])[0]
    return (errors or lines or [""])[-1]
