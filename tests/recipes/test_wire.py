"""Training runs whose rows travel rounded: the bytes they count, and losses close to those of exact rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.pool import on_ranks
from tests.helpers.runs import losses_of, records_of, train_all, write_config

STEPS, WIDTH = 6, 16
WIRES = {"null": (4 * WIDTH, 4 * WIDTH), "bf16": (2 * WIDTH, 2 * WIDTH), "fp8_e4m3": (WIDTH + 1, 2 * WIDTH)}
"""Bytes of a row of tokens or results, and of its gradient."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("wire")
    model = {
        "gate": {"name": "top_k", "k": 3},
        "num_experts": 8,
        "embedding_dim": WIDTH // 2,
        "experts": {"units": WIDTH, "dropout": 0.0},
    }
    config = write_config(root, tiny_data, model=model, train={"max_steps": STEPS}, seed=1)
    for name in WIRES:
        overrides = ["parallel.expert_parallel_size=2", f"parallel.wire_dtype={name}"]
        on_ranks(2, train_all, config, {str(root / name): overrides})
    return root


@pytest.mark.parametrize("name", WIRES)
def test_a_run_counts_the_bytes_of_its_format(runs: Path, name: str) -> None:
    for record in records_of(runs / name):
        rows_each_way = record["wire_rows"] / 2
        assert record["wire_rows"] > 0
        assert record["wire_bytes"] == rows_each_way * sum(WIRES[name])


def test_losses_are_off_by_little_and_not_by_nothing(runs: Path) -> None:
    exact = losses_of(runs / "null")
    for name, allowed in (("bf16", 2e-3), ("fp8_e4m3", 3e-2)):
        difference = (losses_of(runs / name) - exact).abs() / exact
        assert 0 < difference.max() < allowed, difference
    assert len(exact) == STEPS
    assert torch.isfinite(exact).all()
