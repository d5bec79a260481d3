"""Split experts under a user's own DeepSpeed: the numbers of one process, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_moe.engine.deepspeed.parameter_state import MASTER, read_parameter_state
from dist_moe.integrations.deepspeed import initialize
from tests.helpers.pool import on_ranks
from tests.integrations.steps import (
    CLIPPING,
    SGD,
    STEPS,
    Numbers,
    assert_one_process,
    build,
    expert_world,
    numbers,
    plain_group,
    tokens,
)

Course = tuple[Numbers, list[float]]


def section(stage: int, **more: Any) -> dict[str, Any]:
    small = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 200} | small,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": CLIPPING,
    } | more


def train_by_deepspeed(ep: int, stage: int, own_optimizer: bool) -> Course:
    import torch.distributed as dist

    with plain_group():
        model = build(expert_world(ep), torch.float32)
        if own_optimizer:
            engine, *_ = initialize(model, section(stage), optimizer=torch.optim.SGD(model.parameters(), **SGD))
        else:
            engine, *_ = initialize(model, section(stage, optimizer={"type": "SGD", "params": SGD}))
        try:
            norms = []
            for step in range(STEPS):
                engine.backward(engine(tokens(step, dist.get_rank(), dist.get_world_size(), torch.float32)))
                engine.step()
                norms.append(engine.grad_norm)
            masters = {name: of[MASTER] for name, of in read_parameter_state(engine).tensors.items()}
            return numbers(engine.module, masters), norms
        finally:
            engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("own_optimizer", [False, True])
def test_zero(stage: int, own_optimizer: bool) -> None:
    assert_one_process(on_ranks(2, train_by_deepspeed, 2, stage, own_optimizer), 1e-6, dtype=torch.float32)
