"""TensorBoard events read back."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_board(run_dir: Path) -> EventAccumulator:
    """All events of a run, none left out."""
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(run_dir), size_guidance=everything).Reload()


def steps_of(board: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in board.Scalars(tag)]


def last_image(board: EventAccumulator, tag: str) -> NDArray[np.uint8]:
    """(H, W), grey."""
    return np.asarray(Image.open(BytesIO(board.Images(tag)[-1].encoded_image_string)).convert("L"))
