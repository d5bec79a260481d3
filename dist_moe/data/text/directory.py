"""A user's own text: one directory per domain, one file NAME.txt per document."""

from __future__ import annotations

from pathlib import Path

from dist_moe.data.fetch.files import sha256_of
from dist_moe.data.fetch.locations import readable
from dist_moe.data.text.documents import Document, decoded
from dist_moe.errors import UserError

REMEDY = "Remedy: give a directory with one directory per domain and in each one file NAME.txt per document."


def directory_files(root: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of every file by domain and name; hidden directories, and files that are no .txt, are passed over.

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
    files = {path.name: sha256_of(path) for path in sorted(folder.glob("*.txt")) if path.is_file()}
    if deeper := sorted(str(path.relative_to(root)) for path in folder.glob("*/**/*.txt")):
        raise UserError(f"the data root {root} has text that lies deeper than in a domain: {deeper[0]}. {REMEDY}")
    if not files:
        raise UserError(f"the data root {root} has no .txt file in its directory {folder.name}. {REMEDY}")
    return files


def read_domain(root: Path, domain: str, files: dict[str, str]) -> list[Document]:
    """The documents of a domain, whose files must still be those of ``files``."""
    with readable(root):
        documents = [decoded(f"{domain}/{name}", (root / domain / name).read_bytes()) for name in files]
        if _texts(root, root / domain) != files:
            raise UserError(f"the files in {root / domain} changed while they were read. Remedy: run it again.")
    return documents
