"""The BERT encoder whose tokenizer cuts the texts of a task and on whose sizes its models are built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_moe.data.encoder import WEIGHTS, open_encoder
from dist_moe.models import BertShape
from dist_moe.models.bert import read_shape


@dataclass(frozen=True)
class Encoder:
    """A checkpoint directory, its sizes, where it came from (never a path), and the SHA-256 of its weights."""

    directory: Path
    shape: BertShape
    provenance: dict[str, Any]
    weights: str

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json of the library tokenizers."""
        return self.directory / "tokenizer.json"


def find_encoder(directory: Path | None, cache: Path | None, *, progress: bool) -> Encoder:
    """Return the encoder in ``directory``; None: all-MiniLM-L6-v2, fetched. Raises UserError if it cannot be had."""
    source = open_encoder(directory, cache, progress=progress)
    return Encoder(source.directory, read_shape(source.directory), source.provenance, source.files[WEIGHTS])
