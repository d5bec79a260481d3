"""Same seed, same global batch: every layout and ZeRO stage gives the same run, from first step to checkpoint.

A few steps in many more layouts, with and without clipping: tests/engine/test_parity_matrix.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.pool import on_ranks
from tests.helpers.runs import (
    largest_difference,
    losses_of,
    records_of,
    stage_overrides,
    tensors_of,
    train_all,
    write_config,
)

CELLS = {(1, 1): [0, 3], (2, 2): [0, 1, 2, 3], (2, 1): [1], (4, 2): [2, 3]}
"""(world, expert-parallel size): ZeRO stages."""
CLIPPING = 0.3
PERMUTATION = {"epochs": 0.3}
SEED = 1  # with which no ReLU sits at its kink, where rounding alone would decide whether its unit learns


def run_name(world: int, ep: int, stage: int) -> str:
    return f"world{world}-ep{ep}-zero{stage}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    deepspeed = {"gradient_clipping": CLIPPING}
    config = write_config(root, tiny_data, model={"permutation": PERMUTATION}, deepspeed=deepspeed, seed=SEED)
    for (world, ep), stages in CELLS.items():
        cells = {
            str(root / run_name(world, ep, stage)): [f"parallel.expert_parallel_size={ep}", *stage_overrides(stage)]
            for stage in stages
        }
        on_ranks(world, train_all, config, cells)
    return root


RUNS = [(world, ep, stage) for (world, ep), stages in CELLS.items() for stage in stages]


@pytest.mark.parametrize(("world", "ep", "stage"), RUNS)
def test_same_run(runs: Path, world: int, ep: int, stage: int) -> None:
    reference = runs / run_name(1, 1, 0)
    run = runs / run_name(world, ep, stage)
    assert len(losses_of(run)) == 50
    torch.testing.assert_close(losses_of(run), losses_of(reference), rtol=0, atol=1e-5)
    masters = [{k: v for k, v in tensors_of(r).items() if "|master" in k} for r in (run, reference)]
    assert largest_difference(*masters) < 1e-5


@pytest.mark.parametrize(("world", "ep", "stage"), RUNS[1:])
def test_same_global_gradient_norm(runs: Path, world: int, ep: int, stage: int) -> None:
    norms = [
        torch.tensor([record["grad_norm"] for record in records_of(runs / name)])
        for name in (run_name(world, ep, stage), run_name(1, 1, 0))
    ]
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-5)


def test_clipping_did_clip(runs: Path) -> None:
    norms = [record["grad_norm"] for record in records_of(runs / run_name(1, 1, 0))]
    assert sum(norm > CLIPPING for norm in norms) > 25
