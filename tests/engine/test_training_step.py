"""A training step of two ranks is read in few places: the files and functions of ours that it enters."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import dist_moe
from dist_moe.engine.training import Trainer
from tests.helpers.pool import on_ranks
from tests.helpers.runs import train_all, write_config

MOST_FILES, MOST_FUNCTIONS = 33, 113
TRACED = 7


def functions_of_a_step(config: Path, run: Path) -> set[tuple[str, str]]:
    """(file, function) of each that a step enters, from its data to its callbacks, on this thread."""
    seen: set[tuple[str, str]] = set()
    package = str(Path(dist_moe.__file__).parent)
    step = Trainer._train_step

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and not code.co_name.startswith("<"):
            seen.add((code.co_filename.removeprefix(package), code.co_qualname))

    def traced(self: Trainer, *arguments: Any) -> None:
        sys.setprofile(watch if self.step == TRACED else None)
        try:
            step(self, *arguments)
        finally:
            sys.setprofile(None)

    Trainer._train_step = traced  # type: ignore[method-assign]
    try:
        train_all(config, {str(run): ["train.max_steps=9", "parallel.expert_parallel_size=2"]})
    finally:
        Trainer._train_step = step  # type: ignore[method-assign]
    return seen


def test_how_much_must_be_read(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    config = write_config(tmp_path, tiny_data)
    seen = on_ranks(2, functions_of_a_step, config, tmp_path / "run")[0]
    listing = "\n".join(f"{file}: {name}" for file, name in sorted(seen))
    assert len({file for file, _ in seen}) <= MOST_FILES, listing
    assert len(seen) <= MOST_FUNCTIONS, listing
