"""Where text comes from: packages, or the user's own: a directory per domain, a file NAME.txt per document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dist_moe.config.files import digest_of
from dist_moe.data.fetch.files import readable, short_digest
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.text.brown import GENRES
from dist_moe.data.text.config import TextConfig
from dist_moe.data.text.documents import Document, decoded
from dist_moe.data.text.domains import DOMAINS
from dist_moe.data.text.packaged import PackagedDomain
from dist_moe.errors import UserError

T = TypeVar("T")

CORPORA: Mapping[str, Mapping[str, PackagedDomain]] = {"text": DOMAINS, "brown": GENRES}
REMEDY = "Remedy: give a directory with one directory per domain and in each one file NAME.txt per document."


class Corpus(Protocol):
    """The chosen domains, in order, and a digest of the files they are read from."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Their names."""
        ...

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for all files."""
        ...

    def read(self, domain: str, downloads: Path, report: Progress) -> tuple[list[Document], dict[str, Any]]:
        """Return a domain's documents, and what the manifest shall say of them. Raises `UserError`."""
        ...


def choose(config: TextConfig) -> Corpus:
    """Return the corpus that ``config`` names. Raises `UserError` for an unknown domain or a wrong directory."""
    if config.root is None:
        return PackagedText(_selected(config, CORPORA[config.name]))
    root = config.root.expanduser().absolute()
    return OwnText(root, _selected(config, directory_files(root)))


def _selected(config: TextConfig, known: Mapping[str, T]) -> Mapping[str, T]:
    if config.domains is None:
        return known
    if unknown := [name for name in config.domains if name not in known]:
        raise UserError(f"data.domains: there is no domain {unknown[0]}; there are {', '.join(known)}")
    return {name: domain for name, domain in known.items() if name in config.domains}


@dataclass(frozen=True)
class PackagedText:
    """Domains that are fetched."""

    chosen: Mapping[str, PackagedDomain]

    @property
    def domains(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.chosen)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for all packages."""
        archives = (package for domain in self.chosen.values() for package in domain.packages)
        return short_digest({archive.filename: archive.sha256 for archive in archives})

    def read(self, domain: str, downloads: Path, report: Progress) -> tuple[list[Document], dict[str, Any]]:
        """Read a domain's packages, kept or fetched."""
        return self.chosen[domain].fetch(domain, downloads, report)


@dataclass(frozen=True)
class OwnText:
    """Domains in a directory of the user. ``files``: SHA-256 by domain and name, as they were found."""

    root: Path
    files: Mapping[str, dict[str, str]]

    @property
    def domains(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.files)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for all files."""
        # Names count: a file that moves to another domain is another corpus.
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()[:16]

    def read(self, domain: str, downloads: Path, report: Progress) -> tuple[list[Document], dict[str, Any]]:
        """Read a domain's files, which must not have changed meanwhile."""
        report.say(f"reading the text in {self.root / domain}")
        documents = read_domain(self.root, domain, self.files[domain])
        source = {"name": "directory", "sha256": {"all files": short_digest(self.files[domain])}}
        return documents, {"title": domain, "licence": "the user's own", "source": source}


def directory_files(root: Path) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of every file by domain and name; hidden directories, and files but .txt, are passed over.

    Raises:
        UserError: it is no directory or cannot be read; text lies outside a domain; a domain has no text.
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


def read_domain(root: Path, domain: str, files: dict[str, str]) -> list[Document]:
    """Return the documents of a domain, whose files must still be those of ``files``."""
    with readable(root):
        documents = [decoded(f"{domain}/{name}", (root / domain / name).read_bytes()) for name in files]
        if _texts(root, root / domain) != files:
            raise UserError(f"the files in {root / domain} changed while they were read. Remedy: run it again.")
    return documents
