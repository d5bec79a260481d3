"""Tokenizers: byte-level BPE that is learned from the text, or the user's own tokenizer.json in its place.

Byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2): every text has tokens, and they give it back. The separator
of documents is a token of its own, which no text is encoded to, not even one that spells it out.

What a token of the user's own stands for may depend on where it is (SentencePiece's first word has a space that the
text has not), so bytes are counted place by place, from the characters of the text that each token reaches: their sum
is exact for every tokenizer that gives the text back, and any other one is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from dist_moe.config.files import read_json_object
from dist_moe.data.text.tokens import TokenIds
from dist_moe.data.tokenizer_files import LARGEST_VOCABULARY, ids_of, read_tokenizer, refusing
from dist_moe.errors import UserError, shown

SEPARATOR = "<|endoftext|>"
SEPARATOR_ID = 0

CHARACTERS_AT_ONCE = 1 << 20
"""Encodings of so much text are held in memory at a time."""

TOKENIZER_CONFIG, MODEL_CONFIG = "tokenizer_config.json", "config.json"
USUAL_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
"""Names of an end-of-text token, where nothing beside the tokenizer says which it is."""

BYTES_LIMIT = np.iinfo(np.uint16).max
"""Largest number of bytes that a token may stand for."""

_SHOWN = 40


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


@dataclass(frozen=True)
class OwnTokenizer:
    """A tokenizer of the user's own.

    ``end_of_text``: id of the token between documents. ``vocab_size``: that a model needs; at least the tokens.
    ``digest``: 16 hexadecimal digits of all that tokens depend on. ``path``: for messages alone.
    """

    path: Path
    tokenizer: Tokenizer
    end_of_text: int
    vocab_size: int
    digest: str

    def encode(self, name: str, documents: list[str]) -> tuple[TokenIds, NDArray[np.uint16]]:
        """Return the stream of ``documents``, a separator before each and one at the end; and the bytes of each token.

        Raises UserError for a document of the domain ``name`` that its tokens do not give back.
        """
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        tokens: list[TokenIds] = [np.array([self.end_of_text], dtype=dtype)]
        sizes = [np.zeros(1, dtype=np.uint16)]
        for text, encoding in self._encodings(name, documents):
            byte_N = _bytes_by_place(text, encoding)
            if byte_N.max(initial=0) > BYTES_LIMIT:
                raise UserError(
                    f"data.tokenizer={self.path}: in a document of the domain {name} one token stands for "
                    f"{byte_N.max():,} bytes; at most {BYTES_LIMIT:,} are counted. "
                    "Remedy: a tokenizer of shorter tokens"
                )
            tokens.append(np.array([*encoding.ids, self.end_of_text], dtype=dtype))
            sizes.append(np.append(byte_N, 0).astype(np.uint16))
        return np.concatenate(tokens), np.concatenate(sizes)

    def _encodings(self, name: str, documents: list[str]) -> Iterator[tuple[str, Encoding]]:
        for some in batches(documents):
            with refusing(f"data.tokenizer={self.path}", "a tokenizer that knows every byte"):
                encodings = self.tokenizer.encode_batch(some, add_special_tokens=False)
                again = self.tokenizer.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
            for text, encoding, back in zip(some, encodings, again, strict=True):
                if back != text:
                    raise UserError(
                        f"data.tokenizer={self.path} does not give the text back: in the domain {name} it makes "
                        f"{_difference(text, back)}; bits per byte would count another text. Remedy: a tokenizer that "
                        f"knows every byte and changes no letter (byte-level BPE, or byte fallback)"
                    )
                if self.end_of_text in encoding.ids:
                    raise UserError(
                        f"data.tokenizer={self.path}: a document of the domain {name} spells out "
                        f"{self.tokenizer.id_to_token(self.end_of_text)!r}, which is no special token of it and cannot "
                        f"stand between documents. Remedy: name another by data.end_of_text"
                    )
                yield text, encoding


def open_own_tokenizer(path: Path, end_of_text: str | None) -> OwnTokenizer:
    """Open a tokenizer.

    ``path``: a tokenizer.json, or a directory that has one; ``end_of_text``: None is what stands beside it.

    Raises UserError for a file that is no tokenizer, or has no end-of-text token, or several that could be it.
    """
    tokenizer, file, content = read_tokenizer(path)
    literal(tokenizer)
    end = _end_of_text(path, tokenizer, file.parent, end_of_text)
    # The embedding of a model beside it may have more rows than there are tokens.
    of_model = _content(file.parent / MODEL_CONFIG).get("vocab_size")
    if of_model is not None and not (type(of_model) is int and 0 < of_model <= LARGEST_VOCABULARY):
        raise UserError(
            f"data.tokenizer: {file.parent / MODEL_CONFIG} has vocab_size={shown(of_model)}; expected a whole number "
            f"from 1 to {LARGEST_VOCABULARY}"
        )
    vocab_size = max(ids_of(tokenizer, f"data.tokenizer={path}"), of_model or 0)
    digest = hashlib.sha256(content + f" {end} {vocab_size}".encode()).hexdigest()[:16]
    return OwnTokenizer(path, tokenizer, end, vocab_size, digest)


def _end_of_text(path: Path, tokenizer: Tokenizer, directory: Path, given: str | None) -> int:
    if given is not None:
        candidates, where = [given], "data.end_of_text"
    else:
        candidates, where = _named_beside(tokenizer, directory)
    if not candidates:
        raise UserError(
            f"data.tokenizer={path} has no end-of-text token: {TOKENIZER_CONFIG} (eos_token) and {MODEL_CONFIG} "
            f"(eos_token_id) beside it name none, and it has none of {', '.join(USUAL_NAMES)}. Remedy: name one of its "
            f"tokens by data.end_of_text"
        )
    if len(candidates) > 1:
        raise UserError(
            f"data.tokenizer={path}: {where} gives several end-of-text tokens, {', '.join(candidates)}. Remedy: choose "
            f"one by data.end_of_text"
        )
    number = tokenizer.token_to_id(candidates[0])
    if number is None:
        raise UserError(
            f"data.tokenizer={path} has no token {candidates[0]!r}, the end of text by {where}. Remedy: name "
            f"one of its tokens by data.end_of_text"
        )
    return int(number)


def _named_beside(tokenizer: Tokenizer, directory: Path) -> tuple[list[str], str]:
    """Return end-of-text tokens, and who says so: the tokenizer's settings, the model's, or usual names."""
    token = _content(directory / TOKENIZER_CONFIG).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
        return [token], TOKENIZER_CONFIG
    ids = _content(directory / MODEL_CONFIG).get("eos_token_id")
    if ids is not None:
        several = ids if isinstance(ids, list) else [ids]
        if not all(type(number) is int and 0 <= number < LARGEST_VOCABULARY for number in several):
            path = directory / MODEL_CONFIG
            raise UserError(f"data.tokenizer: {path} has eos_token_id={shown(ids)}, which is no token's id")
        numbers = dict.fromkeys(several)
        return [tokenizer.id_to_token(number) or f"id {number}" for number in numbers], MODEL_CONFIG
    return [name for name in USUAL_NAMES if tokenizer.token_to_id(name) is not None], "its vocabulary"


def _content(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; nothing if it is not there."""
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"data.tokenizer: {path} cannot be read: {error}. Remedy: mend or remove it") from error


def _bytes_by_place(text: str, encoding: Encoding) -> NDArray[np.int64]:
    """Return the bytes of UTF-8 from where the token before reached to where each token reaches.

    The last one has the rest. A character of several tokens belongs to the first of them.
    """
    code_C = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    until_C = np.cumsum(np.append(0, 1 + (code_C >= 0x80) + (code_C >= 0x800) + (code_C >= 0x10000)))
    end_N = np.maximum.accumulate([end for _, end in encoding.offsets])
    end_N[-1] = len(text)
    return np.diff(until_C[end_N], prepend=0)


def _difference(text: str, back: str) -> str:
    pairs = zip(text, back, strict=False)
    place = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(text), len(back)))
    before = max(0, place - _SHOWN // 2)
    return f"{back[before : before + _SHOWN]!r} of {text[before : before + _SHOWN]!r}"
