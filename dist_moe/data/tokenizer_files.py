"""Tokenizers of the user's own: a tokenizer.json of the library tokenizers, and what it may do wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from dist_moe.config.files import absolute, read_bytes
from dist_moe.errors import UserError

FILE = "tokenizer.json"
LARGEST_VOCABULARY = 1 << 24
"""Ids that a tokenizer may have: some tables have a row for each, and no tokenizer in use has a tenth of them."""


_SAID = 300
"""Characters of what the library says that are passed on."""


@contextmanager
def refusing(subject: str, remedy: str, failure: str = "fails on the text") -> Iterator[None]:
    """Turn what the library raises within, bare exceptions and panics, into a `UserError` about ``subject``.

    ``failure``: what it says of that.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = str(error)[:_SAID]  # the library quotes what it cannot read, however long it is
        raise UserError(f"{subject} {failure}: {said}. Remedy: {remedy}") from error


def read_tokenizer(path: Path, subject: str | None = None) -> tuple[Tokenizer, Path, bytes]:
    """Return a tokenizer that neither cuts nor pads, its file and what is in it.

    ``path``: a tokenizer.json, or a directory that has one. ``subject``: how messages name it. Raises `UserError` for
    any other file, and for one whose ids go beyond `LARGEST_VOCABULARY`.
    """
    subject = subject or f"data.tokenizer={path}"
    file = absolute(path)
    remedy = "give a tokenizer.json as the library tokenizers writes it, or a Hugging Face directory that has one"
    with refusing(subject, remedy, "cannot be read"):
        if file.is_dir():
            file = file / FILE
        content = read_bytes(file)
        tokenizer = Tokenizer.from_str(content.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    ids_of(tokenizer, subject)
    return tokenizer, file, content


def ids_of(tokenizer: Tokenizer, subject: str = "data.tokenizer") -> int:
    """Return one more than the largest id: there may be fewer tokens, where ids have gaps.

    Raises `UserError` for a tokenizer without tokens, with an id of two tokens, or with ids beyond
    `LARGEST_VOCABULARY`.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise UserError(f"{subject} has no tokens; give one that was trained")
    if twice := [number for number, count in Counter(ids).items() if count > 1]:
        raise UserError(f"{subject} gives the id {twice[0]} to several tokens; give each an id of its own")
    if max(ids) >= LARGEST_VOCABULARY:
        raise UserError(
            f"{subject} has {len(ids):,} tokens, but one of id {max(ids):,}; allowed: ids below "
            f"{LARGEST_VOCABULARY:,}. Remedy: number them without large gaps"
        )
    return max(ids) + 1
