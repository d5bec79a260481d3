"""A tokenizer beside a model, as transformers looks for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dist_moe.errors import UserError

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def write_tokenizer(
    directory: Path,
    tokenizer: Tokenizer,
    max_length: int,
    special: Mapping[str, str | None],
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
) -> None:
    """``max_length``: tokens of a text. ``special``: what tokens are for: ``{"pad_token": "[PAD]"}`` (None: none).
    ``inputs``: what a model is to be given of a text.

    Raises UserError if the directory cannot be written.
    """
    about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    about["model_input_names"] = list(inputs)
    about |= {use: token for use, token in special.items() if token is not None}
    try:
        (directory / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (directory / TOKENIZER_CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error}") from error
