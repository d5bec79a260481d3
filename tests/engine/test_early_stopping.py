"""Patience: counts validations since the best, the same whether a run was interrupted or not."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_moe.config.settings import Settings
from dist_moe.engine.callbacks import EarlyStopping
from dist_moe.engine.checkpoint.format import TrainingHistory
from dist_moe.engine.settings import TrainConfig

LOSSES = st.lists(st.sampled_from([0.1, 0.2, 0.3, math.inf, math.nan]), max_size=12)


def naive_course(losses: list[float], patience: int) -> tuple[list[bool], list[bool]]:
    """After each validation: whether it was the best so far, and whether patience is at its end."""
    best, waited = math.inf, 0
    is_best, is_exhausted = [], []
    for loss in losses:
        better = loss < best
        best, waited = (loss, 0) if better else (best, waited + 1)
        is_best.append(better)
        is_exhausted.append(waited >= patience)
    return is_best, is_exhausted


@settings(max_examples=80, deadline=None, derandomize=True)
@example([0.5, 0.5, 0.5], 2)
@example([math.nan, math.nan], 2)
@given(LOSSES, st.integers(1, 4))
def test_by_a_loop(losses: list[float], patience: int) -> None:
    progress = EarlyStopping(patience)
    assert not progress.exhausted
    is_best, is_exhausted = naive_course(losses, patience)
    for i, loss in enumerate(losses):
        assert progress.is_better(loss) == is_best[i]
        assert progress.exhausted == is_exhausted[i]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LOSSES, st.integers(0, 12), st.integers(1, 4))
def test_a_history_in_any_order_is_as_good_as_having_seen_it(losses: list[float], seen: int, patience: int) -> None:
    whole, resumed, ended = EarlyStopping(patience), EarlyStopping(patience), []
    history = {7 * (i + 1): loss for i, loss in enumerate(losses[:seen])}
    for loss in history.values():
        whole.is_better(loss)
    read = TrainingHistory(dict(reversed(history.items())))
    trainer: Any = SimpleNamespace(history=read, end=lambda: ended.append(True))
    resumed.on_start(trainer)
    assert bool(ended) == whole.exhausted == resumed.exhausted
    for loss in losses[seen:]:
        assert resumed.is_better(loss) == whole.is_better(loss)
        assert resumed.exhausted == whole.exhausted


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"epochs": 2}, 20),
        ({"epochs": 0.01}, 1),
        ({"epochs": 2, "max_steps": 7}, 7),
        ({"epochs": 1, "max_steps": 99}, 10),
    ],
)
def test_length_of_a_run(options: dict[str, Any], steps: int) -> None:
    config = TrainConfig(**options)
    assert isinstance(config, Settings)
    assert config.total_steps(10) == steps
