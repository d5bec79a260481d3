"""Running text of a Bible in SWORD's zText format, whose markup is OSIS.

``ot.bzs`` and ``nt.bzs`` list the compressed blocks, one a book: offset and size in ``.bzz``, and the size of the
text, 4 bytes each. Notes and the numbers of Strong's lexicon go; paragraphs, lines of verse and titles begin
new lines; a chapter is a document.
"""

from __future__ import annotations

import html
import re
import struct
import zlib
from collections.abc import Iterator

CHAPTER = re.compile(r'<chapter n="[^"]*" osisID="([^"]*)" sID="[^"]*"/>')
BOOK = re.compile(r'<div [^>]*type="book"/>')
NOTE = re.compile(r"<note\b.*?</note>", re.DOTALL)
NEW_LINE = re.compile(r"<(?:/?title|lg?|lb|/?item|/?speaker|div [^>]*type=\"x-p\")\b[^>]*>")
TAG = re.compile(r"<[^>]*>")
SPACES = re.compile(r"[ \t]+")
LINES = re.compile(r" ?\n\s*")
BEFORE_MARK = re.compile(r" (?=[,.;:?!”\u2019)])")


def books(bzs: bytes, bzz: bytes) -> Iterator[str]:
    """The marked up text of every block."""
    for offset, size, _text_size in struct.iter_unpack("<III", bzs):
        yield zlib.decompress(bzz[offset : offset + size]).decode()


def chapters(book: str) -> Iterator[tuple[str, str]]:
    """Name and text of each chapter; the book's title belongs to the first. Front matter is no chapter."""
    before, *pieces = CHAPTER.split(book)
    title = BOOK.split(before)[-1]
    for name, piece in zip(pieces[::2], pieces[1::2], strict=True):
        yield name, plain(title + piece)
        title = ""


def plain(marked: str) -> str:
    """The text without notes and tags."""
    text = TAG.sub("", NEW_LINE.sub("\n", NOTE.sub(" ", marked)))
    text = SPACES.sub(" ", html.unescape(text))
    return BEFORE_MARK.sub("", LINES.sub("\n", text)).strip()
