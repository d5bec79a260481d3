"""Every optimizer that the configuration lets through trains, saves, and goes on as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.commands import succeed
from tests.helpers.runs import losses_of, stage_overrides, write_config

OPTIMIZERS = {
    "Adam": "{lr: 0.01}",
    "AdamW": "{lr: 0.01, weight_decay: 0.1}",
    "SGD": "{lr: 0.01, momentum: 0.9}",
    "NAdam": "{lr: 0.01}",
    "RMSprop": "{lr: 0.001}",
}


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_saves_and_resumes(tmp_path: Path, tiny_data: dict[str, str], name: str, stage: int) -> None:
    config = write_config(tmp_path, tiny_data, train={"max_steps": 6}, deepspeed={"optimizer": {"type": name}})
    chosen = [f"deepspeed.optimizer.params={OPTIMIZERS[name]}", *stage_overrides(stage)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(1, "train", "--run-dir", whole, config, *chosen)
    assert losses_of(whole)[-1] < losses_of(whole)[0]
    succeed(1, "train", "--run-dir", parts, config, *chosen, "train.max_steps=3")
    succeed(1, "train", "--resume", parts, "train.max_steps=6")
    assert losses_of(parts).tolist() == losses_of(whole).tolist()
