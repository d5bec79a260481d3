"""Texts as token ids, all in one array, and examples as a model takes them: rows padded to the longest of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from dist_moe.data.batches import TensorBatch
from dist_moe.data.encoder import ENCODER_DESCRIPTION, open_encoder
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.labelled_text.texts import TextOrPair
from dist_moe.data.prepared import DataSettings
from dist_moe.data.tokenizer_files import ids_of, read_tokenizer, refusing
from dist_moe.errors import UserError, shown

TEXTS_AT_ONCE = 1024
PADDING_TOKENS = ("[PAD]", "<pad>", "<|padding|>")


@dataclass(frozen=True)
class TokenisedTexts:
    """N texts one after the other. Text or pair i is ``token_M[start_P[i] : start_P[i + 1]]`` (P = N + 1).

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

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The arrays by the names under which they are kept."""
        return {"token_M": self.token_M, "start_P": self.start_P, "first_N": self.first_N}


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

        Raises `UserError` if the encoder cannot be had, or a file is missing or is not a tokenizer.
        """
        found = self.tokenizer or given or open_encoder(self.encoder, self.cache, progress=progress).tokenizer
        return open_tokenizer(found, self.max_length)


def open_tokenizer(given: Tokenizer | Path, max_length: int) -> Tokenizer:
    """Return a copy that cuts at ``max_length`` tokens and does not pad; ``given`` may be the path of a tokenizer.json.

    Raises `UserError` if the file is missing or is not a tokenizer.
    """
    if isinstance(given, Tokenizer):
        tokenizer = Tokenizer.from_str(given.to_str())
        ids_of(tokenizer)
    else:
        tokenizer, _, _ = read_tokenizer(given)
    tokenizer.no_padding()
    with refusing(
        "data.tokenizer",
        f"a larger data.max_length than {max_length}, or a tokenizer that adds fewer tokens",
        "cannot cut",
    ):
        tokenizer.enable_truncation(max_length)
    return tokenizer


def padding_of(tokenizer: Tokenizer) -> int:
    """Return the id that fills rows up; 0 where the tokenizer has no token for this."""
    ids = (tokenizer.token_to_id(token) for token in PADDING_TOKENS)
    return next((number for number in ids if number is not None), 0)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return 16 hexadecimal digits that stand for the tokenizer and its length limit."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]


def tokens_digest(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 that stands for the tokenizer, whatever the length at which it cuts."""
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.no_truncation()
    return hashlib.sha256(whole.to_str().encode()).hexdigest()


def tokenised(tokenizer: Tokenizer, texts: list[TextOrPair], part: str, progress: Progress) -> TokenisedTexts:
    """Tokenise texts or pairs, in order.

    Raises `UserError` if a text gives no tokens, or a tokenizer that numbers them otherwise than BERT's.
    """
    ids: list[NDArray[np.int32]] = []
    first: list[int] = []
    cut = 0
    for row, encoding in enumerate(encodings(tokenizer, texts, part, progress)):
        if not encoding.ids:
            raise UserError(f"data.tokenizer gives no tokens for {shown(texts[row])}; it has to add special tokens")
        types = np.array(encoding.type_ids)
        first.append(encoding.type_ids.count(0))
        if (types != (np.arange(len(types)) >= first[-1])).any():
            raise UserError(
                f"data.tokenizer numbers the parts of {shown(texts[row])} otherwise than 0, then 1, as BERT's do; "
                "leave it out to have the encoder's own"
            )
        ids.append(np.array(encoding.ids, dtype=np.int32))
        cut += bool(encoding.overflowing)
    return TokenisedTexts.of(ids, first, cut)


def encodings(tokenizer: Tokenizer, texts: list[TextOrPair], part: str, progress: Progress) -> Iterator[Encoding]:
    """Yield the encoding of each text or pair, in order. ``part``: what is tokenised, for a person to see."""
    blocks = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
    for block in progress.track(blocks, f"tokenising {part}", total=len(blocks), unit=f"x {TEXTS_AT_ONCE} texts"):
        with refusing("data.tokenizer", "a tokenizer that has a token for every text, [UNK] for one"):
            found = tokenizer.encode_batch([text[0] if len(text) == 1 else text for text in block])
        yield from found


@dataclass(frozen=True)
class LabelledBatch(TensorBatch):
    """One rank's share of a step.

    ``token_BS``: int64 [B, S], S the longest row's tokens, shorter rows filled up. ``length_B``: int64 [B], the
    tokens of each row. ``type_BS``: int64 [B, S], 0 for the first text of a pair and 1 for the second; None where
    an example is one text. ``label_B``: int64 [B] class numbers, fp32 [B] numbers to be predicted, or int64 [B, 2] the
    first and the last token of an answer.
    ``examples_in_step``, ``tokens_in_step``: the size of the whole step over all ranks and micro-batches, without
    what rows are filled up with.
    """

    token_BS: Tensor
    length_B: Tensor
    type_BS: Tensor | None
    label_B: Tensor
    examples_in_step: int
    tokens_in_step: int

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Arguments of the model."""
        lengths = (self.token_BS, self.length_B)
        return lengths if self.type_BS is None else (*lengths, self.type_BS)


@dataclass(frozen=True)
class LabelledTable:
    """N tokenised examples, as read-only memory maps; see `TokenisedTexts` for ``token_M, start_P, first_N``.

    ``target_N``: int64 class numbers, fp32, or int64 [N, 2]. ``padding``: the id that rows are filled up with.
    ``has_pairs``: an example is two texts.
    """

    token_M: NDArray[np.int32]
    start_P: NDArray[np.int64]
    first_N: NDArray[np.int32]
    target_N: NDArray[Any]
    padding: int
    has_pairs: bool

    def __len__(self) -> int:
        return len(self.target_N)

    @property
    def length_N(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.start_P)

    def batch(self, index_B: NDArray[np.int64], step_index: NDArray[np.int64]) -> LabelledBatch:
        """Return the examples ``index_B`` of a step that uses ``step_index`` over all ranks and micro-batches."""
        start_B, length_B = self.start_P[index_B], self._lengths(index_B)
        position_S = np.arange(length_B.max(initial=1))
        real_BS = position_S < length_B[:, None]
        token_BS = np.full(real_BS.shape, self.padding, dtype=np.int64)
        token_BS[real_BS] = self.token_M[(start_B[:, None] + position_S)[real_BS]]
        type_BS = (position_S >= self.first_N[index_B][:, None]) & real_BS if self.has_pairs else None
        return LabelledBatch(
            torch.from_numpy(token_BS),
            torch.from_numpy(length_B),
            None if type_BS is None else torch.from_numpy(type_BS.astype(np.int64)),
            torch.from_numpy(np.array(self.target_N[index_B])),
            len(step_index),
            int(self._lengths(step_index).sum()),
        )

    def _lengths(self, index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(self.start_P[index_B + 1] - self.start_P[index_B])
