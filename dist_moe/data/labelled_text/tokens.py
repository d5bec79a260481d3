"""Texts as token ids: a tokenizer of any kind, all texts in one array."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Encoding, Tokenizer

from dist_moe.data.encoder import ENCODER_DESCRIPTION, open_encoder
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.labelled_text.texts import TextOrPair
from dist_moe.data.settings import DataSettings
from dist_moe.errors import UserError

TEXTS_AT_ONCE = 1024
PADDING_TOKENS = ("[PAD]", "<pad>", "<|padding|>")


@dataclass(frozen=True)
class TokenisedTexts:
    """N texts one after the other. TextOrPair i is ``token_M[start_P[i] : start_P[i + 1]]`` (P = N + 1).

    ``first_N``: how many of its tokens belong to the first text, with special tokens; the others belong
    to the second of a pair. ``cut``: texts that were longer than allowed.
    """

    token_M: NDArray[np.int32]
    start_P: NDArray[np.int64]
    first_N: NDArray[np.int32]
    cut: int

    @classmethod
    def of(cls, ids: list[NDArray[np.int32]], first: Sequence[int], cut: int) -> TokenisedTexts:
        """Lay the ids of the texts one after the other."""
        start_P = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, np.int32), *ids]), start_P, np.array(first, dtype=np.int32), cut)


class TokenisedSettings(DataSettings):
    """Texts that a BERT reads, and the encoder whose tokenizer cuts them."""

    encoder: Path | None = Field(default=None, description=ENCODER_DESCRIPTION)
    tokenizer: Path | None = Field(
        default=None,
        description="A tokenizer.json of the library tokenizers. If not given, the one that belongs to the encoder.",
    )
    max_length: int

    def open_tokenizer(self, given: Tokenizer | Path | None, *, progress: bool) -> Tokenizer:
        """Return the tokenizer of the configuration, else the ``given`` one, else the encoder's, which is fetched.

        Raises:
            UserError: the encoder cannot be had, or a file is missing or is not a tokenizer.
        """
        found = self.tokenizer or given or open_encoder(self.encoder, self.cache, progress=progress).tokenizer
        return open_tokenizer(found, self.max_length)


def open_tokenizer(given: Tokenizer | Path, max_length: int) -> Tokenizer:
    """Return a copy that cuts at ``max_length`` tokens and does not pad; ``given`` may be the path of a tokenizer.json.

    Raises:
        UserError: the file is missing or is not a tokenizer.
    """
    if isinstance(given, Tokenizer):
        tokenizer = Tokenizer.from_str(given.to_str())
    else:
        path = given.expanduser()
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(
                f"data.tokenizer={path} cannot be read: {error}. Remedy: give a tokenizer.json as the library "
                f"tokenizers writes it."
            ) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def padding_of(tokenizer: Tokenizer) -> int:
    """Return the id that fills rows up; 0 where the tokenizer has no token for this."""
    ids = (tokenizer.token_to_id(token) for token in PADDING_TOKENS)
    return next((number for number in ids if number is not None), 0)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return 16 hexadecimal digits that stand for the tokenizer and its length limit."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]


def tokenised(tokenizer: Tokenizer, texts: list[TextOrPair], part: str, progress: Progress) -> TokenisedTexts:
    """Tokenise texts or pairs, in order.

    Raises `UserError` if a text gives no tokens, or a tokenizer that numbers more than two texts.
    """
    ids: list[NDArray[np.int32]] = []
    first: list[int] = []
    cut = 0
    for row, encoding in enumerate(encodings(tokenizer, texts, part, progress)):
        if not encoding.ids:
            raise UserError(f"data.tokenizer gives no tokens for {texts[row]!r}; it has to add special tokens")
        types = np.array(encoding.type_ids)
        first.append(encoding.type_ids.count(0))
        assert (types == (np.arange(len(types)) >= first[-1])).all(), "types are 0, then 1"
        ids.append(np.array(encoding.ids, dtype=np.int32))
        cut += bool(encoding.overflowing)
    return TokenisedTexts.of(ids, first, cut)


def encodings(tokenizer: Tokenizer, texts: list[TextOrPair], part: str, progress: Progress) -> Iterator[Encoding]:
    """Yield the encoding of each text or pair, in order. ``part``: what is tokenised, for a person to see."""
    blocks = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
    for block in progress.track(blocks, f"tokenising {part}", total=len(blocks), unit=f"x {TEXTS_AT_ONCE} texts"):
        yield from tokenizer.encode_batch([text[0] if len(text) == 1 else text for text in block])
