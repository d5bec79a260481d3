"""Files out of packages, Debian's among them without dpkg."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest

from dist_moe.data.fetch.archives import File, matching_files, read_members

from .packing import COMPRESS, ar, tar, write_debian_package, write_npm_package, write_wheel

CONTENT = {"usr/share/b.bin": bytes(range(256)), "usr/share/a.txt": b"alpha" * 1000}


@pytest.mark.parametrize("compression", COMPRESS)
def test_files_come_in_the_order_asked_for(tmp_path: Path, compression: str) -> None:
    package = write_debian_package(tmp_path / "some.deb", CONTENT, compression)
    for names in (list(CONTENT), list(reversed(CONTENT))):
        assert read_members(package, names) == [File(package / name, CONTENT[name]) for name in names]
    for name in ("usr/share/absent", "folder"):
        with pytest.raises(KeyError, match=name):
            read_members(package, [name])


def test_files_of_a_source_archive(tmp_path: Path) -> None:
    (package := tmp_path / "some-0.1.tar.gz").write_bytes(tar("some-0.1/", {"a": b"1", "b": b"2"}, "gz"))
    assert [file.content for file in read_members(package, ["some-0.1/b", "some-0.1/a"])] == [b"2", b"1"]
    with pytest.raises(KeyError, match="absent"):
        read_members(package, ["some-0.1/absent"])


def test_what_is_no_package(tmp_path: Path) -> None:
    path = tmp_path / "some.deb"
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="not an ar archive"):
        read_members(path, [])
    path.write_bytes(ar([("debian-binary", b"2.0\n")]))
    with pytest.raises(ValueError, match=r"no data\.tar"):
        read_members(path, [])


def test_files_by_pattern(tmp_path: Path) -> None:
    files = {"b.txt": b"2", "a.txt": b"1", "no.js": b"3"}
    expected = [("a.txt", b"1"), ("b.txt", b"2")]
    for package in (
        write_npm_package(tmp_path / "p.tgz", files),
        write_debian_package(tmp_path / "p.deb", files),
        write_wheel(tmp_path / "p-1-py3-none-any.whl", files),
    ):
        assert list(matching_files(package, r"[^/]+\.txt").items()) == expected
    package = write_debian_package(tmp_path / "p.deb", {"usr/x.gz": gzip.compress(b"x")})
    assert matching_files(package, r"usr/x\.gz") == {"usr/x": b"x"}


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_package_made_by_dpkg(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    control = "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: No <nobody@example.org>\nDescription: none\n"
    for name, content in (CONTENT | {"DEBIAN/control": control.encode()}).items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    built = tmp_path / "tiny.deb"
    subprocess.run(["dpkg-deb", "-Zxz", "--build", tree, built], check=True, capture_output=True)
    assert [file.content for file in read_members(built, list(CONTENT))] == list(CONTENT.values())
