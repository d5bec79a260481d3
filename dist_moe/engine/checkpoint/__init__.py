"""Checkpoints: complete or invisible, portable between layouts, every file with a digest; and bare models on disk."""

from dist_moe.engine.checkpoint.files import newest_checkpoint
from dist_moe.engine.checkpoint.models import (
    ROUTERS,
    ModelWeights,
    place_weights,
    read_model,
    write_first_checkpoint,
    write_model,
)

__all__ = [
    "ROUTERS",
    "ModelWeights",
    "newest_checkpoint",
    "place_weights",
    "read_model",
    "write_first_checkpoint",
    "write_model",
]
