"""What a decoder language model starts from: a section of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from dist_moe.config.settings import Settings
from dist_moe.models.conversion import DecoderConversionConfig


class DecoderStartConfig(Settings):
    """The weights that a new run of a decoder begins with."""

    name: Literal["transformer"] = Field("transformer", description="of which model this is the start")
    run: Path = Field(
        description="finished or imported run of a decoder with the same tokens, whose weights are taken (its best "
        "checkpoint); those of a dense one become experts where the model has some"
    )
    conversion: DecoderConversionConfig = Field(
        default_factory=lambda: DecoderConversionConfig(), description="how dense feed-forward networks become experts"
    )
