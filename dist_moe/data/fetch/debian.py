"""Files out of a Debian package, without dpkg: an ``ar`` archive that holds a tar archive (see deb(5))."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

MAGIC = b"!<arch>\n"
HEADER_BYTES = 60


def read_members(package: Path, names: list[str]) -> list[bytes]:
    """The content of files of a package, by their paths from the root, without the leading slash.

    Raises:
        KeyError: the package has no such file.
        ValueError: it is not a Debian package.
    """
    data = data_archive(package.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [_content(archive, f"./{name}") for name in names]


def _content(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()


def data_archive(package: bytes) -> bytes:
    """The tar archive of the files that a package installs. Raises ValueError if it is no Debian package."""
    for name, content in _ar_members(package):
        if name.startswith("data.tar"):
            return content
    raise ValueError("not a Debian package: it has no data.tar")


def _ar_members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    if not archive.startswith(MAGIC):
        raise ValueError("not a Debian package: it is not an ar archive")
    position = len(MAGIC)
    while position + HEADER_BYTES <= len(archive):
        header = archive[position : position + HEADER_BYTES]
        name, size = header[:16].decode("ascii").rstrip(" /"), int(header[48:58])
        start = position + HEADER_BYTES
        yield name, archive[start : start + size]
        position = start + size + size % 2  # members begin at even offsets
