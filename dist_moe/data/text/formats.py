"""Formats that packages have text in: SWORD's Bibles (OSIS), dictionaries of dictd, character vectors of R.

zText, a Bible: ``ot.bzs`` and ``nt.bzs`` list the compressed blocks, one a book: offset and size in ``.bzz``, and the
size of the text, 4 bytes each. Notes and the numbers of Strong's lexicon go; paragraphs, lines of verse and titles
begin new lines; a chapter is a document.

dictd (RFC 2229's server): a text, and an index of offsets into it in digits of base 64.

R: ``Rdata.rdb`` holds the objects of a package one after the other: the length in 4 bytes, then a zlib stream of R's
serialization (R Internals, 1.8). Of that only what a plain character vector needs is read.
"""

from __future__ import annotations

import functools
import html
import io
import re
import struct
import zlib
from collections.abc import Iterator

from dist_moe.data.text.documents import Document, decoded

CHAPTER = re.compile(r'<chapter n="[^"]*" osisID="([^"]*)" sID="[^"]*"/>')
BOOK = re.compile(r'<div [^>]*type="book"/>')
NOTE = re.compile(r"<note\b.*?</note>", re.DOTALL)
NEW_LINE = re.compile(r"<(?:/?title|lg?|lb|/?item|/?speaker|div [^>]*type=\"x-p\")\b[^>]*>")
TAG = re.compile(r"<[^>]*>")
SPACES = re.compile(r"[ \t]+")
LINES = re.compile(r" ?\n\s*")
BEFORE_MARK = re.compile(r" (?=[,.;:?!”\u2019)])")

DIGITS = {
    character: digit
    for digit, character in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}

R_HEADER = b"X\n"
R_CHARACTER_VECTOR, R_STRING = 16, 9
R_LATIN1 = 1 << 14
"""A flag of strings: bit 2 of the 16 bits that R keeps from bit 12 on."""


def books(bzs: bytes, bzz: bytes) -> Iterator[str]:
    """Yield the marked up text of every block of a Bible."""
    for offset, size, _text_size in struct.iter_unpack("<III", bzs):
        yield zlib.decompress(bzz[offset : offset + size]).decode()


def chapters(book: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of each chapter; the book's title belongs to the first. Front matter is no chapter."""
    before, *pieces = CHAPTER.split(book)
    title = BOOK.split(before)[-1]
    for name, piece in zip(pieces[::2], pieces[1::2], strict=True):
        yield name, plain(title + piece)
        title = ""


def plain(marked: str) -> str:
    """Return the text without notes and tags."""
    text = TAG.sub("", NEW_LINE.sub("\n", NOTE.sub(" ", marked)))
    text = SPACES.sub(" ", html.unescape(text))
    return BEFORE_MARK.sub("", LINES.sub("\n", text)).strip()


def entries(index: bytes, text: bytes) -> Iterator[Document]:
    """Yield every entry of a dictionary once, in the order of the text, named after its first headword in the index.

    What dictd itself says of the dictionary, under headwords that begin with 00-, is no entry.
    """
    headwords: dict[tuple[int, int], str] = {}
    for line in index.decode(errors="replace").splitlines():
        headword, offset, length = line.split("\t")[:3]
        if headword.startswith("00-"):
            continue
        headwords.setdefault((_number(offset), _number(length)), headword)
    for begin, size in sorted(headwords):
        yield decoded(headwords[begin, size], text[begin : begin + size])


def _number(digits: str) -> int:
    return functools.reduce(lambda value, digit: value * 64 + DIGITS[digit], digits, 0)


def character_vectors(rdb: bytes) -> Iterator[list[str]]:
    """Yield every object of an ``Rdata.rdb``. Raises ValueError if one is not a plain character vector."""
    while rdb:
        stream = zlib.decompressobj()
        yield _character_vector(stream.decompress(rdb[4:]))
        rdb = stream.unused_data


def _character_vector(content: bytes) -> list[str]:
    """Return the strings of a serialization: integers of 4 bytes, big-endian, and bytes, one after the other."""
    stream = io.BytesIO(content)

    def integer() -> int:
        return int.from_bytes(stream.read(4), signed=True)

    if stream.read(len(R_HEADER)) != R_HEADER:
        raise ValueError("not in R's binary serialization")
    version, _written_by, _readable_by = integer(), integer(), integer()
    if version == 3:  # the first with a native encoding
        stream.read(integer())
    if integer() & 0xFF != R_CHARACTER_VECTOR:
        raise ValueError("not a character vector")
    strings = []
    for _ in range(integer()):
        flags, length = integer(), integer()
        if flags & 0xFF != R_STRING:
            raise ValueError("not a string")
        content = stream.read(max(length, 0))  # -1: missing
        strings.append(content.decode("latin-1" if flags & R_LATIN1 else "utf-8"))
    return strings
