"""Documents of a corpus on their way to a model: cleaned, without doubles, in random order, in three parts.

Cleaning is slight: line ends become ``\\n``, a byte order mark and white space around a document go. Bytes
that are no text in the expected encoding become U+FFFD and are counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dist_moe.data.prepared import PARTS
from dist_moe.errors import UserError


@dataclass(frozen=True)
class Document:
    """A text as it was read. ``name``: where it was. ``replaced``: characters that stand for unreadable bytes."""

    name: str
    text: str
    replaced: int = 0


def decoded(name: str, content: bytes) -> Document:
    """Return the document that ``content`` is in UTF-8; what is no UTF-8 becomes U+FFFD and is counted."""
    try:
        return Document(name, content.decode())
    except UnicodeDecodeError:
        text = content.decode(errors="replace")
        return Document(name, text, text.count("\ufffd") - content.count("\ufffd".encode()))


@dataclass
class Domain:
    """The documents of one domain by part, and what was left out.

    ``documents``: by part, in random order. ``dropped``: documents left out because they were "empty", a
    "duplicate" of one that was read before (in any domain), or "beyond_limit".
    """

    documents: Mapping[str, list[str]]
    dropped: Mapping[str, int]
    replaced_characters: int


@dataclass
class Splitter:
    """Splits the documents of one domain after the other; the same documents give the same parts.

    ``held_out``: share of a domain's documents to validate on, and as many to test on, at least one each.
    ``limit``: characters of a domain. A domain's split does not depend on which others there are, but for
    documents that are in both.
    """

    seed: int
    held_out: float
    limit: int | None
    _seen: set[bytes] = field(default_factory=set)

    def split(self, name: str, documents: Iterable[Document]) -> Domain:
        """Clean, choose and deal out the documents of a domain. Raises `UserError` if there are fewer than three."""
        found = list(documents)
        line_ends = (document.text.replace("\r\n", "\n").replace("\r", "\n") for document in found)
        cleaned = list(filter(None, (text.removeprefix("\ufeff").strip() for text in line_ends)))
        unique = []
        for text in cleaned:
            if (digest := hashlib.sha256(text.encode()).digest()) not in self._seen:
                self._seen.add(digest)
                unique.append(text)
        chosen = self._chosen(name, unique)
        if len(chosen) < len(PARTS):
            limit = "" if self.limit is None else f" within data.characters_per_domain={self.limit}"
            raise UserError(
                f"the domain {name} has {len(chosen)} documents that differ and are not empty (of {len(found)}){limit}"
                "; at least 3 are needed, one each to train, validate and test on.\n"
                "Remedy: give it more documents or a higher limit, or leave it out (data.domains)."
            )
        held_out = max(1, round(self.held_out * len(chosen)))
        # Where half is nearly held out of few documents, training still has one.
        held_out = min(held_out, (len(chosen) - 1) // 2)
        dropped = {
            "empty": len(found) - len(cleaned),
            "duplicate": len(cleaned) - len(unique),
            "beyond_limit": len(unique) - len(chosen),
        }
        ends = (chosen[2 * held_out :], chosen[:held_out], chosen[held_out : 2 * held_out])
        return Domain(dict(zip(PARTS, ends, strict=True)), dropped, sum(document.replaced for document in found))

    def _chosen(self, name: str, texts: list[str]) -> list[str]:
        """Return the documents in random order, up to the limit of characters."""
        stream = np.random.SeedSequence((self.seed, *name.encode()))
        # Only uniform doubles are drawn, so the order does not hang on how a NumPy version shuffles.
        order = np.argsort(np.random.Generator(np.random.PCG64(stream)).random(len(texts)), kind="stable")
        shuffled = [texts[i] for i in order]
        if self.limit is None:
            return shuffled
        total_N = np.cumsum([len(text) for text in shuffled])
        return shuffled[: int(np.searchsorted(total_N, self.limit, side="right"))]
