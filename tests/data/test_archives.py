"""Files out of archives, Debian packages among them without dpkg."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.data.fetch.archives import File, read_members

from .tiny_images import ar

CONTENT = {"usr/share/a.txt": b"alpha" * 1000, "usr/share/b.bin": bytes(range(256))}


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}


def package(path: Path, compression: str = "xz") -> Path:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in CONTENT.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        folder = tarfile.TarInfo("./usr/share/folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    members = [
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz/", b"odd"),
        (f"data.tar.{compression}", COMPRESS[compression](data.getvalue())),
    ]
    path.write_bytes(ar(members))
    return path


@pytest.mark.parametrize("compression", COMPRESS)
def test_files_come_in_the_order_asked_for(tmp_path: Path, compression: str) -> None:
    names = list(reversed(CONTENT))
    assert read_members(package(tmp_path / "some.deb", compression), names) == [
        File(tmp_path / "some.deb" / name, CONTENT[name]) for name in names
    ]


@pytest.mark.parametrize("name", ["usr/share/absent", "usr/share/folder"])
def test_what_is_no_file_of_the_package(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyError, match=name):
        read_members(package(tmp_path / "some.deb"), [name])


def test_what_is_no_package(tmp_path: Path) -> None:
    path = tmp_path / "some.deb"
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="not an ar archive"):
        read_members(path, [])
    path.write_bytes(ar([("debian-binary", b"2.0\n")]))
    with pytest.raises(ValueError, match=r"no data\.tar"):
        read_members(path, [])


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_package_made_by_dpkg(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name, content in CONTENT.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    (tree / "DEBIAN").mkdir()
    control = (
        "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\nDescription: none\n"
    )
    (tree / "DEBIAN" / "control").write_text(control)
    built = tmp_path / "tiny.deb"
    subprocess.run(["dpkg-deb", "-Zxz", "--build", tree, built], check=True, capture_output=True)
    assert [file.content for file in read_members(built, list(CONTENT))] == list(CONTENT.values())
