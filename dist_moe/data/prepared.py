"""Arrays prepared once and memory-mapped ever after, however many processes ask and whenever one dies.

A prepared directory holds ``<name>.npy`` files and ``manifest.json``, which records the size and SHA-256 of
each. It appears by one rename when it is complete, under a lock that only one process holds; so it is
either whole or absent. Whatever happens to it afterwards (a truncated copy, a flipped bit) is noticed on
loading, and as everything in it can be made again, it is made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dist_moe.config.files import digest_of, read_json_object, write_json
from dist_moe.config.settings import Settings
from dist_moe.data.fetch.files import CACHE_ENV, cache_directory, locked, replacing, usable
from dist_moe.data.fetch.progress import Progress

MANIFEST = "manifest.json"
PARTS = ("train", "val", "test")


class DataSettings(Settings):
    """Which data set, and where its files are; a subclass narrows ``name`` to a Literal of one name or several."""

    name: str
    root: Path | None = Field(default=None, description="Directory of the original files.")
    cache: Path | None = Field(
        default=None,
        description="Directory where downloads and prepared arrays are kept. If not given, the environment "
        f"variable {CACHE_ENV}, or else ~/.cache/dist_moe.",
    )

    def fetch(self, progress: bool) -> str:
        """Prepare the data set, reporting on stderr if ``progress``, and return what there is of it, for a person.

        One whose task makes its data in memory has nothing to prepare. Raises `UserError` for anything that the user
        can fix.
        """
        return f"{self.name}: nothing to prepare, its task makes the data in memory"


@dataclass(frozen=True)
class Prepared:
    """Arrays by name (read-only memory maps once loaded) and what is known about them."""

    arrays: Mapping[str, NDArray[Any]]
    manifest: dict[str, Any]

    def columns(self, part: str) -> dict[str, Any]:
        """Return the arrays of a part of the data by the names that `by_part` was given."""
        prefix = f"{part}_"
        return {name.removeprefix(prefix): array for name, array in self.arrays.items() if name.startswith(prefix)}


def by_part(columns: Mapping[str, Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Return the named arrays of each part under names by which `Prepared.columns` finds them."""
    return {f"{part}_{name}": array for part, arrays in columns.items() for name, array in arrays.items()}


def digests_by_part(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return a SHA-256 for each part of the data, and for each array that belongs to none, by its name.

    ``files``: the entries that a manifest has of its arrays, whose digests these are made of.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(files):
        part = next((part for part in PARTS if name.startswith(f"{part}_")), name)
        found.setdefault(part, []).append(f"{name} {files[name]['sha256']}\n")
    return {part: hashlib.sha256("".join(lines).encode()).hexdigest() for part, lines in found.items()}


class NotUsable(Exception):
    """A prepared directory is absent or damaged; the message says in what way."""


def prepare_data(settings: DataSettings, key: str, build: Callable[[Path], Prepared], progress: Progress) -> Prepared:
    """Return the arrays of a data set from the cache, prepared by this process or another if they are not there.

    Safe to call from all ranks at once: one process prepares, the others wait for it. ``key``: all that the arrays
    depend on; names their directory. ``build``: makes them, given the directory for downloads; whatever it raises
    passes through. Raises `UserError` if the cache cannot be read or written.
    """
    cache = cache_directory(settings.cache)
    with usable(cache):
        return prepared(cache / settings.name / key, partial(build, cache / "downloads"), progress)


def prepared(target: Path, build: Callable[[], Prepared], progress: Progress) -> Prepared:
    """Return the content of the directory ``target``, built by this process or another if it is absent or damaged.

    Raises OSError if the cache cannot be written. Whatever ``build`` raises passes through, and leaves nothing.
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
            files = {}
            for name, array in content.arrays.items():
                path = directory / f"{name}.npy"
                np.save(path, array, allow_pickle=False)
                files[name] = {"bytes": path.stat().st_size, "sha256": digest_of(path)}
            write_json(directory / MANIFEST, content.manifest | {"files": files})
        return load(target)


def load(target: Path) -> Prepared:
    """Memory-map every array of ``target``, or raise NotUsable if a size or SHA-256 is not that of the manifest."""
    try:
        manifest = read_json_object(target / MANIFEST)
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


def split_off_tenths(classes_N: NDArray[Any], held_out: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Return row numbers to train on, then ``held_out`` times a tenth of each class (halves up), each in random order.

    The parts are disjoint and exhaustive. Only the generator's uniform doubles are drawn, so the result depends
    on its stream alone, and any prefix of a part is a fair sample of it.
    """
    order_N = np.argsort(rng.random(len(classes_N)), kind="stable")
    part_N = np.zeros(len(classes_N), dtype=np.int64)
    for each in np.unique(classes_N):
        rows = order_N[classes_N[order_N] == each]
        tenth = (len(rows) + 5) // 10
        for part in range(1, held_out + 1):
            part_N[rows[(part - 1) * tenth : part * tenth]] = part
    return [order_N[part_N[order_N] == part] for part in range(held_out + 1)]
