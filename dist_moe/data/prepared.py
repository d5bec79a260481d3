"""Arrays prepared once and memory-mapped ever after, however many processes ask and whenever one dies.

A prepared directory holds ``<name>.npy`` files and ``manifest.json``, which records the size and SHA-256 of
each. It appears by one rename when it is complete, under a lock that only one process holds; so it is
either whole or absent. Whatever happens to it afterwards (a truncated copy, a flipped bit) is noticed on
loading, and as everything in it can be made again, it is made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_moe.config.files import digest_of, write_json
from dist_moe.data.fetch.files import cache_directory, locked, replacing, usable
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.settings import DataSettings

MANIFEST = "manifest.json"
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Prepared:
    """Arrays by name (read-only memory maps once loaded) and what is known about them."""

    arrays: Mapping[str, NDArray[Any]]
    manifest: dict[str, Any]

    def columns(self, part: str, names: Sequence[str]) -> list[NDArray[Any]]:
        """Return the arrays of a part of the data, in the order of ``names``."""
        return [self.arrays[f"{part}_{name}"] for name in names]


def by_part(names: Sequence[str], columns: Mapping[str, Sequence[NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Return arrays under the names by which `Prepared.columns` finds them: of each part its ``columns``."""
    return {
        f"{part}_{name}": column for part, arrays in columns.items() for name, column in zip(names, arrays, strict=True)
    }


class NotUsable(Exception):
    """A prepared directory is absent or damaged; the message says in what way."""


def prepare_data(settings: DataSettings, key: str, build: Callable[[Path], Prepared], progress: Progress) -> Prepared:
    """Return the arrays of a data set from the cache, prepared by this process or another if they are not there.

    Safe to call from all ranks at once: one process prepares, the others wait for it.

    Args:
        settings: which data set, and its cache.
        key: all that the arrays depend on; names their directory.
        build: makes them; it is given the directory for downloads.
        progress: tells the person who waits.

    Raises:
        UserError: the cache cannot be read or written. Whatever ``build`` raises passes through.
    """
    cache = cache_directory(settings.cache)
    with usable(cache):
        return prepared(cache / settings.name / key, partial(build, cache / "downloads"), progress)


def prepared(target: Path, build: Callable[[], Prepared], progress: Progress) -> Prepared:
    """Return the content of the directory ``target``, built by this process or another if it is absent or damaged.

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
        content = build()
        with replacing(target) as directory:
            files = {name: _write_array(directory / f"{name}.npy", array) for name, array in content.arrays.items()}
            write_json(directory / MANIFEST, content.manifest | {"files": files})
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
    if (size := path.stat().st_size) != entry["bytes"]:
        raise NotUsable(f"{path.name} has {size:,} bytes, not {entry['bytes']:,}")
    if digest_of(path) != entry["sha256"]:
        raise NotUsable(f"{path.name} does not have its recorded SHA-256")
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _write_array(path: Path, array: NDArray[Any]) -> dict[str, Any]:
    np.save(path, array, allow_pickle=False)
    return {"bytes": path.stat().st_size, "sha256": digest_of(path)}
