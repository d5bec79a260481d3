"""Wheels as pip takes them, npm and Debian packages, with any content."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path


def write_wheel(path: Path, files: Mapping[str, bytes], name: str = "", version: str = "") -> Path:
    """Pack ``files`` into a wheel; its name and version are those of the file, if not given."""
    name, version = name or path.name.split("-")[0], version or path.name.split("-")[1]
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}


def tar(root: str, files: Mapping[str, bytes], compression: str) -> bytes:
    """Pack ``files`` below ``root``, with a folder ``folder`` and a link ``link.txt`` beside them."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(root + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.txt", tarfile.SYMTYPE)):
            other = tarfile.TarInfo(root + name)
            other.type, other.linkname = kind, "x"
            archive.addfile(other)
    return COMPRESS[compression](packed.getvalue())


def write_npm_package(path: Path, files: Mapping[str, bytes]) -> Path:
    path.write_bytes(tar("package/", files, "gz"))
    return path


def write_debian_package(path: Path, files: Mapping[str, bytes], compression: str = "xz") -> Path:
    members = [("debian-binary", b"2.0\n"), ("control.tar.xz/", b"odd")]
    path.write_bytes(ar([*members, (f"data.tar.{compression}", tar("./", files, compression))]))
    return path


def ar(members: list[tuple[str, bytes]]) -> bytes:
    """Return an ``ar`` archive: headers of 60 characters, contents padded to an even length."""
    archive = b"!<arch>\n"
    for name, content in members:
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        archive += content + b"\n" * (len(content) % 2)
    return archive
