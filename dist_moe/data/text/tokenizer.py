"""Byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2): every text has tokens, and they give it back.

The separator of documents is a token of its own, which no text is encoded to, not even one that spells it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEPARATOR = "<|endoftext|>"
SEPARATOR_ID = 0

CHARACTERS_AT_ONCE = 1 << 20
"""Encodings of so much text are held in memory at a time."""


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a tokenizer with at most ``vocab_size`` tokens; a function of the documents, in whatever order they come.

    Pairs that come up once are not merged, so that little text gives fewer tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    return literal(tokenizer)


def tokenizer_bytes(tokenizer: Tokenizer) -> NDArray[np.uint8]:
    """Return the tokenizer as JSON in UTF-8, as an array that can be kept beside others."""
    return np.frombuffer(tokenizer.to_str().encode(), dtype=np.uint8)


def tokenizer_from_bytes(content: NDArray[np.uint8]) -> Tokenizer:
    """Return the tokenizer that :func:`tokenizer_bytes` wrote."""
    return literal(Tokenizer.from_str(content.tobytes().decode()))


def literal(tokenizer: Tokenizer) -> Tokenizer:
    """Have a document that spells out the separator encoded as the text that it is; JSON does not keep this."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Return the bytes of text that each token stands for; 0 for the separator."""
    size = tokenizer.get_vocab_size()
    # Byte-level BPE writes every byte as one character.
    bytes_V = np.array([len(tokenizer.id_to_token(token) or "") for token in range(size)], dtype=np.int64)
    bytes_V[SEPARATOR_ID] = 0
    return bytes_V


def encode(tokenizer: Tokenizer, documents: list[str]) -> NDArray[np.uint16]:
    """Return the stream of ``documents``: a separator before each, and one at the end."""
    pieces = [np.array([SEPARATOR_ID], dtype=np.uint16)]
    for some in batches(documents):
        encodings = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        pieces += [np.array([*encoding.ids, SEPARATOR_ID], dtype=np.uint16) for encoding in encodings]
    return np.concatenate(pieces)


def batches(documents: list[str]) -> Iterator[list[str]]:
    """Yield ``documents``, so many at a time as have about `CHARACTERS_AT_ONCE` characters."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
