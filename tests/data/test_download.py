"""Fetching: what arrives is verified or deleted, and being out of reach is told apart from being wrong."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dist_moe.data.fetch import download
from dist_moe.data.fetch.download import NetworkFailure, download_sdist, download_wheel
from dist_moe.data.fetch.packages import fetch, url_file
from dist_moe.data.fetch.progress import Progress
from dist_moe.errors import UserError

from .packing import tar, write_wheel

SILENT = Progress(enabled=False)
BODY = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """/whole: the body; /wrong: other bytes; /short: half of what Content-Length says; else 404."""

    def do_GET(self) -> None:
        if self.path not in ("/whole", "/wrong", "/short"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        bodies = {"/whole": BODY, "/wrong": BODY[::-1], "/short": BODY[: len(BODY) // 2]}
        self.wfile.write(bodies[self.path])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def fetch_url(url: str, downloads: Path) -> Path:
    return fetch(url_file("a test server", url, SHA256, "data.zip"), downloads, SILENT)


def files_in(downloads: Path) -> list[str]:
    return sorted(path.name for path in downloads.iterdir() if path.suffix != ".lock")


def test_a_verified_file_is_kept_and_not_fetched_again(server: str, tmp_path: Path, closed_port: int) -> None:
    path = fetch_url(f"{server}/whole", tmp_path / "downloads")
    assert path.read_bytes() == BODY
    assert files_in(path.parent) == ["data.zip"]
    assert fetch_url(f"http://127.0.0.1:{closed_port}/whole", path.parent) == path


def test_wrong_bytes_are_an_error_and_are_deleted(server: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        fetch_url(f"{server}/wrong", tmp_path)
    for part in ("data.zip", "a test server", SHA256, hashlib.sha256(BODY[::-1]).hexdigest(), "Remedy"):
        assert part in str(error.value)
    assert files_in(tmp_path) == []


def test_a_kept_file_that_rotted_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    path.write_bytes(BODY[:-1])
    with pytest.raises(UserError, match=rf"{path} is corrupt[\s\S]*delete that file"):
        fetch_url("http://never.asked", tmp_path)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("short", "broke off after 512,000 of 1,024,000"), ("absent", "HTTP 404"), (None, "refused")],
)
def test_what_breaks_off_or_does_not_answer_is_out_of_reach_not_wrong(
    server: str, tmp_path: Path, closed_port: int, path: str | None, reason: str
) -> None:
    with pytest.raises(NetworkFailure, match=reason):
        fetch_url(f"http://127.0.0.1:{closed_port}/" if path is None else f"{server}/{path}", tmp_path)
    assert files_in(tmp_path) == []


def test_a_source_that_trickles_is_out_of_reach(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT_S", 0.0)
    with pytest.raises(NetworkFailure, match="not finished after 0 s"):
        fetch_url(f"{server}/whole", tmp_path)


PipSeesOnly = Callable[[Path | None], None]


def test_pip_downloads_a_wheel(tmp_path: Path, pip_sees_only: PipSeesOnly) -> None:
    wheels, brought = tmp_path / "wheels", tmp_path / "brought"
    wheels.mkdir()
    brought.mkdir()
    wheel = write_wheel(wheels / "some_name-0.1.0-py3-none-any.whl", {"some.txt": b"text"})
    pip_sees_only(wheels)
    download_wheel("some-name==0.1.0", brought / wheel.name, SILENT)
    assert (brought / wheel.name).read_bytes() == wheel.read_bytes()
    assert list(brought.iterdir()) == [brought / wheel.name]


def test_a_source_archive_is_found_by_pip_and_its_setup_is_not_run(tmp_path: Path, pip_sees_only: PipSeesOnly) -> None:
    ran, folder, path = tmp_path / "ran", tmp_path / "archives", tmp_path / "some-name-0.1.0.tar.gz"
    folder.mkdir()
    content = tar("some-name-0.1.0/", {"setup.py": f"open({os.fspath(ran)!r}, 'w')".encode()}, "gz")
    for version in ("0.1.0", "0.1.0.1"):
        (folder / f"some-name-{version}.tar.gz").write_bytes(content)
    pip_sees_only(folder)
    download_sdist("some-name==0.1.0", path, SILENT)
    assert path.read_bytes() == content
    with pytest.raises(NetworkFailure, match=r"No matching distribution found for some-name==0\.2\.0"):
        download_sdist("some-name==0.2.0", tmp_path / "some-name-0.2.0.tar.gz", SILENT)
    assert not ran.exists()


def test_pip_out_of_reach_in_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip_sees_only: PipSeesOnly
) -> None:
    pip_sees_only(None)
    with pytest.raises(NetworkFailure, match=r"No matching distribution found for some-name==0\.1\.0"):
        download_wheel("some-name==0.1.0", tmp_path / "x.whl", SILENT)
    monkeypatch.setattr(download.sys, "executable", "/bin/false")
    with pytest.raises(NetworkFailure, match="pip exited with code 1"):
        download_wheel("some-name==0.1.0", tmp_path / "x.whl", SILENT)
    monkeypatch.undo()
    monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT_S", 0.01)
    with pytest.raises(NetworkFailure, match="pip had not finished"):
        download_wheel("some-name==0.1.0", tmp_path / "x.whl", SILENT)
