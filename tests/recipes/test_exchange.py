"""Training runs whose experts are split over (emulated) nodes: two levels equal flat, and less crosses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.board import read_board
from tests.helpers.pool import on_ranks
from tests.helpers.runs import largest_difference, losses_of, records_of, tensors_of, train_all, write_config

NODES = ["parallel.expert_parallel_size=4", "parallel.ranks_per_node=2"]
EXCHANGES = ["flat", "two_level", "auto"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("exchange")
    gate = {"name": "top_k", "k": 3}
    config = write_config(root, tiny_data, model={"gate": gate, "num_experts": 8}, train={"max_steps": 20}, seed=1)
    for exchange in EXCHANGES:
        on_ranks(4, train_all, config, {str(root / exchange): [*NODES, f"parallel.exchange={exchange}"]})
    return root


def test_two_levels_train_like_flat(runs: Path) -> None:
    assert len(losses_of(runs / "flat")) == 20
    torch.testing.assert_close(losses_of(runs / "two_level"), losses_of(runs / "flat"), rtol=0, atol=1e-5)
    masters = [
        {name: x for name, x in tensors_of(runs / exchange).items() if "|master" in name}
        for exchange in ("flat", "two_level")
    ]
    assert largest_difference(*masters) < 1e-5
    norms = [[record["grad_norm"] for record in records_of(runs / exchange)] for exchange in ("flat", "two_level")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def total(runs: Path, exchange: str, name: str) -> Any:
    return sum(record[name] for record in records_of(runs / exchange))


def test_fewer_rows_and_bytes_cross_nodes(runs: Path) -> None:
    for name in ("wire_rows_across_nodes", "wire_bytes_across_nodes"):
        assert 0 < total(runs, "two_level", name) < total(runs, "flat", name)
    for exchange in EXCHANGES:
        for what in ("rows", "bytes"):
            assert total(runs, exchange, f"wire_{what}_across_nodes") < total(runs, exchange, f"wire_{what}")
    assert total(runs, "two_level", "rows_computed") == total(runs, "flat", "rows_computed")


def test_auto_is_two_levels_on_several_nodes_of_several_ranks(runs: Path) -> None:
    assert losses_of(runs / "auto").tolist() == losses_of(runs / "two_level").tolist()
    for name in ("wire_rows", "wire_bytes", "wire_rows_across_nodes", "wire_bytes_across_nodes"):
        assert total(runs, "auto", name) == total(runs, "two_level", name)


def test_tensorboard_shows_what_crosses_nodes(runs: Path) -> None:
    board = read_board(runs / "two_level")
    for tag, name in (("bytes", "wire_bytes_across_nodes"), ("rows", "wire_rows_across_nodes")):
        shown = {event.step: event.value for event in board.Scalars(f"traffic/{tag}_across_nodes")}
        assert shown == {record["step"]: pytest.approx(record[name]) for record in records_of(runs / "two_level")}
