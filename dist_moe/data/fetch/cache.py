"""Arrays prepared once and memory-mapped ever after, however many processes ask and whenever one dies.

A prepared directory holds ``<name>.npy`` files and ``manifest.json``, which records the size and SHA-256 of
each. It appears by one rename when it is complete, under a lock that only one process holds; so it is
either whole or absent. Whatever happens to it afterwards (a truncated copy, a flipped bit) is noticed on
loading, and as everything in it can be made again, it is made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.fetch.files import locked, scratch, sha256_of
from dist_moe.data.fetch.progress import Progress

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Prepared:
    """Arrays by name (read-only memory maps once loaded) and what is known about them."""

    arrays: Mapping[str, NDArray[Any]]
    manifest: dict[str, Any]


class NotUsable(Exception):
    """A prepared directory is absent or damaged; the message says in what way."""


def prepared(target: Path, build: Callable[[], Prepared], progress: Progress) -> Prepared:
    """The prepared directory ``target``, built by this process or another if it is absent or damaged.

    Raises:
        OSError: the cache cannot be written. Whatever ``build`` raises passes through, and leaves nothing.
    """
    try:
        return load(target)
    except NotUsable:
        pass
    with locked(target, progress):
        try:
            return load(target)
        except NotUsable as reason:
            if target.exists():
                progress.say(f"the prepared data {target} is damaged ({reason}): preparing it again")
        publish(target, build())
        return load(target)


def load(target: Path) -> Prepared:
    """Memory-map every array of ``target``, after comparing its size and SHA-256 with the manifest.

    Raises:
        NotUsable: it is not there, incomplete, or altered.
    """
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        arrays = {name: _load_array(target / f"{name}.npy", entry) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotUsable(f"{type(error).__name__}: {error}") from error
    return Prepared(arrays, manifest)


def _load_array(path: Path, entry: Mapping[str, Any]) -> NDArray[Any]:
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise NotUsable(f"{path.name} has {size:,} bytes, not {entry['bytes']:,}")
    if sha256_of(path) != entry["sha256"]:
        raise NotUsable(f"{path.name} does not have its recorded SHA-256")
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def publish(target: Path, content: Prepared) -> None:
    """Make ``target`` appear complete, in place of whatever is there. Needs the lock of ``target``."""
    with scratch(target) as directory:
        new = directory / "new"
        new.mkdir()
        files = {name: _write_array(new / f"{name}.npy", array) for name, array in content.arrays.items()}
        manifest = json.dumps(content.manifest | {"files": files}, indent=2)
        (new / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        if target.exists():
            os.rename(target, directory / "old")
        os.rename(new, target)


def _write_array(path: Path, array: NDArray[Any]) -> dict[str, Any]:
    np.save(path, array, allow_pickle=False)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
