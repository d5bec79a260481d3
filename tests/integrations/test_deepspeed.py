"""Split experts under a user's own DeepSpeed: the numbers of one process, and refusals."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_moe.engine.deepspeed.checks import REFUSALS
from dist_moe.engine.deepspeed.parameter_state import MASTER, read_parameter_state
from dist_moe.errors import UserError
from dist_moe.integrations import deepspeed as integration
from dist_moe.integrations.deepspeed import initialize, split_optimizer_groups
from dist_moe.parallel import ProcessWorld, SingleWorld
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


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_with_copies_of_experts(stage: int) -> None:
    assert_one_process(on_ranks(4, train_by_deepspeed, 2, stage, True), 1e-6, dtype=torch.float32)


def schedules(kind: str) -> tuple[list[list[float]], str]:
    """Learning rates of all groups after each step, or why the schedule was refused."""
    with plain_group():
        model = build(expert_world(2), torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        if kind == "split first":
            split_optimizer_groups(optimizer, model)
        schedule: Any = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
        if kind != "function":
            schedule = schedule(optimizer)
        try:
            engine, _, _, _ = initialize(model, section(1), optimizer=optimizer, lr_scheduler=schedule)
        except UserError as error:
            return [], str(error)
        rates = []
        for step in range(2):
            engine.backward(engine(tokens(step, dist.get_rank(), 2, torch.float32)))
            engine.step()
            rates.append([group["lr"] for group in engine.optimizer.param_groups])
        engine.destroy()
        return rates, ""


@pytest.mark.parametrize("kind", ["function", "split first", "too early"])
def test_a_schedule_reaches_experts_too(kind: str) -> None:
    for rates, refused in on_ranks(2, schedules, kind):
        if kind == "too early":
            assert "lr_scheduler" in refused
            assert "split_optimizer_groups" in refused
        else:
            assert rates == [[0.25, 0.25], [0.125, 0.125]]


def refusal(field: str, value: Any) -> str:
    with plain_group():
        model = build(expert_world(2), torch.float32)
        config: Any = section(1, optimizer={"type": "SGD", "params": SGD})
        *above, last = field.split(".")
        (config[above[0]] if above else config)[last] = value
        with pytest.raises(UserError) as raised:
            initialize(model, config)
        return str(raised.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("zero_optimization.contiguous_gradients", False),
        ("zero_optimization.reduce_scatter", False),
        ("zero_optimization.zero_hpz_partition_size", 2),
        ("prescale_gradients", True),
        ("gradient_predivide_factor", 2.0),
        ("use_data_before_expert_parallelism", True),
        ("zero_optimization.stage", 4),
    ],
)
def test_what_deepspeed_would_compute_wrongly_is_refused(field: str, value: Any) -> None:
    for message in on_ranks(2, refusal, field, value):
        assert f"{field}={value}" in message


def test_the_reasons_are_those_of_a_run() -> None:
    assert set(integration._WRONG_FOR_EXPERTS) <= {refusal.field for refusal in REFUSALS}


def test_bf16_without_zero_is_refused() -> None:
    with pytest.raises(UserError, match="bf16"):
        initialize(build(SingleWorld()), {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}})


def test_without_a_process_group() -> None:
    with pytest.raises(UserError, match="init_process_group"):
        initialize(build(SingleWorld()), section(1))


def strangely_spread(how: str) -> str:
    with plain_group():
        groups = [dist.new_group([0, 1]), dist.new_group([1, 0]), dist.new_group([0]), dist.new_group([1])]
        world = ProcessWorld(groups[0])
        model = build(world, torch.float32)
        if how == "different sizes":
            model.blocks[1] = build(SingleWorld(), torch.float32).blocks[1]
        else:
            world.group = groups[2 + dist.get_rank()]
        with pytest.raises(UserError) as raised:
            initialize(model, section(1, optimizer={"type": "SGD", "params": SGD}))
        return str(raised.value)


@pytest.mark.parametrize(("how", "named"), [("different sizes", "[1, 2]"), ("other ranks", "neighbours")])
def test_worlds_that_are_not_deepspeeds_groups_are_refused(how: str, named: str) -> None:
    assert all(named in message for message in on_ranks(2, strangely_spread, how))


def saved(stage: int, directory: str) -> tuple[str, bool]:
    """Why a checkpoint was refused, and whether one that was written comes back to the bit."""
    with plain_group():
        model = build(expert_world(2), torch.float32)
        engine, *_ = initialize(model, section(stage, optimizer={"type": "AdamW", "params": {"torch_adam": True}}))
        try:
            engine.backward(engine(tokens(0, dist.get_rank(), 2, torch.float32)))
            engine.step()
            engine.save_checkpoint(directory, "one")
            before = engine.whole_parameters()
            engine.backward(engine(tokens(1, dist.get_rank(), 2, torch.float32)))
            engine.step()
            engine.load_checkpoint(directory, "one")
            return "", all(torch.equal(value, before[name]) for name, value in engine.whole_parameters().items())
        except RuntimeError as error:
            return str(error), False
        finally:
            engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeeds_checkpoints_keep_experts_or_are_refused(stage: int, tmp_path: Path) -> None:
    for refused, came_back in on_ranks(2, saved, stage, str(tmp_path)):
        assert came_back == (stage == 3), refused
        assert ("read_parameter_state" in refused) == (stage != 3)


def test_deepspeed_compiles_nothing_where_there_is_no_gpu() -> None:
    ops = integration.import_deepspeed().ops.__compatible_ops__
    assert ops["deepspeed_shm_comm"] is False
