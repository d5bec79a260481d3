"""Gradient accumulation changes the memory that a step needs, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.pool import on_ranks
from tests.helpers.runs import largest_difference, losses_of, records_of, tensors_of, train_all, write_config

STEPS = 12
CELLS = [
    (1, 0, 1),
    (1, 0, 4),
    (1, 1, 2),
    (1, 2, 4),
    (2, 0, 2),
    (2, 0, 4),
    (2, 1, 2),
    (2, 1, 4),
    (2, 2, 2),
    (2, 2, 4),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("accumulation")
    config = write_config(
        root,
        tiny_data,
        model={"permutation": {"epochs": 0.1}},
        train={"max_steps": STEPS},
        deepspeed={"gradient_clipping": 0.3},
    )
    for ranks in (1, 2):
        runs = {
            str(root / f"{world}-{stage}-{accumulation}"): [
                f"parallel.expert_parallel_size={world}",
                f"deepspeed.zero_optimization.stage={stage}",
                f"deepspeed.gradient_accumulation_steps={accumulation}",
            ]
            for world, stage, accumulation in CELLS
            if world == ranks
        }
        on_ranks(ranks, train_all, config, runs)
    return root


@pytest.mark.parametrize(("world", "stage", "accumulation"), CELLS)
def test_same_run(runs: Path, world: int, stage: int, accumulation: int) -> None:
    run, reference = runs / f"{world}-{stage}-{accumulation}", runs / "1-0-1"
    assert [record["step"] for record in records_of(run)] == list(range(1, STEPS + 1))
    torch.testing.assert_close(losses_of(run), losses_of(reference), rtol=0, atol=1e-5)
    masters = [{k: v for k, v in tensors_of(path).items() if "|master" in k} for path in (run, reference)]
    assert largest_difference(*masters) < 1e-5
    for ours, theirs in zip(records_of(run), records_of(reference), strict=True):
        assert ours["load"] == theirs["load"]
        assert ours["active_experts"] == pytest.approx(theirs["active_experts"], abs=1e-9)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
