"""TensorBoard events read back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.data.server_ingester import SubprocessServerDataIngester, get_server_binary
from tensorboard.util.grpc_util import ChannelCredsType


def read_board(run_dir: Path) -> EventAccumulator:
    """All events of a run, none left out."""
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(run_dir), size_guidance=everything).Reload()


@contextmanager
def served(logdir: Path) -> Iterator[Any]:
    """A provider of the runs in a directory: what the server beside TensorBoard gives its pages."""
    pytest.importorskip("tensorboard_data_server", reason="there is none for this machine")
    ingester = SubprocessServerDataIngester(
        get_server_binary(), str(logdir), reload_interval=1, channel_creds_type=ChannelCredsType.LOCAL
    )
    ingester.start()
    try:
        provider, patience = ingester.data_provider, time.monotonic() + 30
        while not provider.list_runs(None, experiment_id="") and time.monotonic() < patience:
            time.sleep(0.1)
        yield provider
    finally:
        ingester._stdin_handle.close()  # at which it ends


def steps_of(board: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in board.Scalars(tag)]


def last_image(board: EventAccumulator, tag: str) -> NDArray[np.uint8]:
    """(H, W), grey."""
    return np.asarray(Image.open(BytesIO(board.Images(tag)[-1].encoded_image_string)).convert("L"))
