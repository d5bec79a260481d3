"""Entries of a dictionary in the format of dictd (RFC 2229's server): a text and an index of offsets into it."""

from __future__ import annotations

from collections.abc import Iterator

from dist_moe.data.text.documents import Document, decoded

DIGITS = {
    character: digit
    for digit, character in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}


def entries(index: bytes, text: bytes) -> Iterator[Document]:
    """Every entry once, in the order of the text, named after its first headword in the index.

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
    value = 0
    for digit in digits:
        value = value * 64 + DIGITS[digit]
    return value
