"""Same seed, same global batch: every layout, ZeRO stage and clipping gives the same run."""

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

LAYOUTS = [(1, 1), (2, 2), (2, 1), (4, 2)]
STAGES = [0, 1, 2, 3]
CLIPPING = [0.0, 0.3]
PERMUTATION = {"epochs": 0.3}
SEED = 1  # with which no ReLU sits at its kink, where rounding alone would decide whether its unit learns


def run_name(world: int, ep: int, stage: int, clipping: float) -> str:
    return f"world{world}-ep{ep}-zero{stage}-clip{clipping}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    config = write_config(root, tiny_data, model={"permutation": PERMUTATION}, seed=SEED)
    for world, ep in LAYOUTS:
        cells = {
            str(root / run_name(world, ep, stage, clipping)): [
                f"parallel.expert_parallel_size={ep}",
                *stage_overrides(stage),
                f"deepspeed.gradient_clipping={clipping}",
            ]
            for stage in STAGES
            for clipping in CLIPPING
        }
        on_ranks(world, train_all, config, cells)
    return root


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_same_run(runs: Path, world: int, ep: int, stage: int, clipping: float) -> None:
    reference = runs / run_name(1, 1, 0, clipping)
    run = runs / run_name(world, ep, stage, clipping)
    assert len(losses_of(run)) == 50
    torch.testing.assert_close(losses_of(run), losses_of(reference), rtol=0, atol=1e-5)
    masters = [{k: v for k, v in tensors_of(r).items() if "|master" in k} for r in (run, reference)]
    assert largest_difference(*masters) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world", "ep"), LAYOUTS[1:])
def test_same_global_gradient_norm(runs: Path, world: int, ep: int, stage: int) -> None:
    norms = [
        torch.tensor([record["grad_norm"] for record in records_of(runs / name)])
        for name in (run_name(world, ep, stage, 0.3), run_name(1, 1, 0, 0.3))
    ]
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-5)


def test_clipping_did_clip(runs: Path) -> None:
    norms = [record["grad_norm"] for record in records_of(runs / run_name(1, 1, 0, 0.3))]
    assert sum(norm > 0.3 for norm in norms) > 25
