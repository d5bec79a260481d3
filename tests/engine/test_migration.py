"""Experts that change their ranks take masters and optimizer state along, bit for bit, at every ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_moe.engine.checkpoint.format import expert_ids_by_parameter
from dist_moe.engine.deepspeed import migration
from dist_moe.engine.deepspeed.config import import_deepspeed
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.deepspeed.migration import migrate, state_bytes_per_expert
from dist_moe.engine.deepspeed.parameter_state import read_parameter_state
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.parallel import Placement
from dist_moe.recipes.recipe import plan_new_run
from dist_moe.recipes.supervised.recipe import SupervisedPlan
from dist_moe.tasks import build_model
from dist_moe.tasks.objective import WeightedObjective
from tests.helpers.pool import on_ranks
from tests.helpers.runs import write_config

EXPERTS = 8
LAYOUTS = [(2, 2), (4, 4), (4, 2)]
STAGES = [0, 1, 2, 3]
ORDER = (6, 1, 4, 0, 3, 5, 7, 2)
PARAMETERS = 16 * 16 + 16
HOT = 3


@dataclass(frozen=True)
class Moved:
    """``wrong``: states that differ after the move. ``follows``: whether parameters are their masters."""

    wrong: list[str]
    states: list[str]
    follows: bool
    ids: tuple[int, ...]
    experts: tuple[int, ...]
    bytes: int
    bytes_per_expert: int
    expected_bytes_sent: int


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    return write_config(tmp_path_factory.mktemp("migration"), tiny_data, model={"num_experts": EXPERTS})


def engine_of(plan: SupervisedPlan, groups: Any) -> ExpertParallelEngine:
    return ExpertParallelEngine(build_model(plan.config, plan.task, groups.world), plan.deepspeed, groups)


def train_steps(engine: ExpertParallelEngine, plan: SupervisedPlan, steps: range) -> None:
    loss = WeightedObjective(plan.task, (0.5, 0.5), plan.start.environment.world_size)
    for step in steps:
        (batch,) = plan.feed.micro_batches(step)
        engine.backward(loss(engine, batch).loss)
        engine.step()


def states_by_id(engine: ExpertParallelEngine) -> dict[str, Tensor]:
    """Every state of every expert of this rank, and of all dense parameters, copied."""
    state = read_parameter_state(engine)
    return {
        f"{name}|{key}" + ("" if expert is None else f"|{expert}"): (
            tensor if expert is None else tensor[index]
        ).clone()
        for name, _, ids in expert_ids_by_parameter(engine.module)
        for key, tensor in state.tensors[name].items()
        for index, expert in enumerate(ids or [None])
    }


def states_of_all(engine: ExpertParallelEngine) -> dict[str, Tensor]:
    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, states_by_id(engine))
    return {name: tensor for one in everyones for name, tensor in one.items()}


def move_at_every_stage(config: Path, ep: int, unused: Path, steps: int = 3) -> list[Moved]:
    results = []
    overrides = [
        [f"parallel.expert_parallel_size={ep}", f"deepspeed.zero_optimization.stage={stage}"] for stage in STAGES
    ]
    plans = [plan_new_run(config, of_stage, unused) for of_stage in overrides]
    with process_groups(plans[0].start.environment, plans[0].config.parallel) as groups:
        for plan in plans:
            engine = engine_of(plan, groups)
            train_steps(engine, plan, range(steps))
            results.append(move(engine, Placement(ORDER, ep)))
            engine.destroy()
    return results


def move(engine: ExpertParallelEngine, placement: Placement) -> Moved:
    layer = engine.module.moe
    before, mine = states_of_all(engine), set(layer.experts.expert_ids)
    done = migrate(engine, layer, placement)
    after = states_by_id(engine)
    masters = [after[f"moe.experts.weight|master|{expert}"] for expert in layer.experts.expert_ids]
    per_expert = state_bytes_per_expert(engine, layer)
    return Moved(
        wrong=[name for name, tensor in after.items() if not torch.equal(bits(tensor), bits(before[name]))],
        states=sorted({name.split("|")[1] for name in after}),
        follows=torch.equal(whole(engine, layer.experts.weight), torch.stack(masters)),
        ids=layer.experts.expert_ids,
        experts=done.experts,
        bytes=done.bytes,
        bytes_per_expert=per_expert,
        expected_bytes_sent=len(mine - set(layer.experts.expert_ids)) * per_expert,
    )


def whole(engine: ExpertParallelEngine, parameter: torch.nn.Parameter) -> Tensor:
    with import_deepspeed().zero.GatheredParameters([parameter], enabled=engine.shards_parameters):
        return parameter.detach().clone()


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_masters_and_moments_move_bit_for_bit(config: Path, tmp_path: Path, world: int, ep: int) -> None:
    ranks = on_ranks(world, move_at_every_stage, config, ep, tmp_path / "unused")
    placement = Placement(ORDER, ep)
    for rank, results in enumerate(ranks):
        for stage, moved in zip(STAGES, results, strict=True):
            assert moved.wrong == [], (rank, stage)
            assert moved.states == ["exp_avg", "exp_avg_sq", "master"]
            assert moved.follows
            assert moved.ids == placement.experts_of(rank % ep)
            assert moved.experts == Placement.identity(EXPERTS, ep).moved_to(placement)
            assert moved.bytes_per_expert == PARAMETERS * 3 * 4
    for stage in STAGES:
        sent = sum(results[stage].expected_bytes_sent for results in ranks)
        assert sent > 0
        assert {results[stage].bytes for results in ranks} == {sent}


def move_before_the_first_step(config: Path, unused: Path) -> list[str]:
    moved = move_at_every_stage(config, 2, unused, steps=0)
    assert all(one.states == ["master"] for one in moved)
    return [name for one in moved for name in one.wrong]


def test_before_the_first_step_there_are_only_masters(config: Path, tmp_path: Path) -> None:
    assert on_ranks(2, move_before_the_first_step, config, tmp_path / "unused") == [[], []]


def move_beside_rounded_tokens(config: Path, unused: Path) -> list[str]:
    plan = plan_new_run(config, ["parallel.expert_parallel_size=2", "parallel.wire_dtype=fp8_e4m3"], unused)
    with process_groups(plan.start.environment, plan.config.parallel) as groups:
        engine = engine_of(plan, groups)
        train_steps(engine, plan, range(1))
        moved = move(engine, Placement(ORDER, 2))
        engine.destroy()
    assert moved.expected_bytes_sent > 0
    return moved.wrong


def test_experts_are_not_rounded_where_tokens_are(config: Path, tmp_path: Path) -> None:
    assert on_ranks(2, move_beside_rounded_tokens, config, tmp_path / "unused") == [[], []]


def faulty_moves(config: Path, unused: Path) -> list[str]:
    """What is said on this rank when ranks disagree, and when a row is garbled on its way to rank 0."""
    plan = plan_new_run(config, ["parallel.expert_parallel_size=2"], unused)
    messages = []
    with process_groups(plan.start.environment, plan.config.parallel) as groups:
        engine = engine_of(plan, groups)
        layer, rank = engine.module.moe, plan.start.environment.rank
        orders = [ORDER, ORDER[::-1]]
        for attempt in (lambda: migrate(engine, layer, Placement(orders[rank], 2)), lambda: garbled(engine, rank)):
            try:
                attempt()
            except RuntimeError as error:
                messages.append(str(error))
        engine.destroy()
    return messages


def garbled(engine: ExpertParallelEngine, rank: int) -> None:
    original = migration._checksums
    migration._checksums = lambda rows: original(rows) + (rank == 0)
    try:
        migrate(engine, engine.module.moe, Placement(ORDER, 2))
    finally:
        migration._checksums = original


def test_ranks_that_disagree_and_rows_that_do_not_arrive_are_errors_on_every_rank(config: Path, tmp_path: Path) -> None:
    first, second = on_ranks(2, faulty_moves, config, tmp_path / "unused")
    assert first == second
    assert first[0] == "the placement before or after the move of ranks [1] differs from that of rank 0"
    assert first[1].startswith("experts did not arrive as they were sent (rank 0: weight|master, bias|master; rank 1:")


def test_checksums_tell_any_bit_and_any_place() -> None:
    row = torch.tensor([[1.0, 2.0, 0.0, 4.0]])
    others = torch.tensor([[2.0, 1.0, 0.0, 4.0], [1.0, 2.0, -0.0, 4.0], [1.0, 2.0, 0.0, 4.0000005]])
    sums = migration._checksums(torch.cat([row, others, row])).flatten().tolist()
    assert sums[0] == sums[-1]
    assert len(set(sums)) == 4
    assert migration._checksums(row[:0]).shape == (0, 1)


def extreme_steps(config: Path, unused: Path) -> list[tuple[list[int], float]]:
    """Steps of experts that have moved: a rank without data, no data at all, all tokens to one expert; the
    experts that got rows, by id, and the loss."""
    overrides = ["parallel.expert_parallel_size=2", "model.gate={name: top_k, k: 1}"]
    plan = plan_new_run(config, overrides, unused)
    results = []
    with process_groups(plan.start.environment, plan.config.parallel) as groups:
        engine = engine_of(plan, groups)
        loss = WeightedObjective(plan.task, (0.5, 0.5), plan.start.environment.world_size)
        train_steps(engine, plan, range(1))
        migrate(engine, engine.module.moe, Placement(ORDER, 2))
        examples = np.arange(6)
        for here in ([6, 0], [0, 0], [3, 3]):
            index_B = examples[: here[0]] if groups.environment.rank == 0 else examples[len(examples) - here[1] :]
            if here == [3, 3]:
                make_hot(engine, HOT)
            result = loss(engine, plan.task.train.batch(index_B, examples))
            engine.backward(result.loss)
            engine.step()
            load_E = groups.world.sum(result.sums["load"][0])
            results.append((load_E.nonzero().flatten().tolist(), float(groups.world.sum(result.sums["loss"]))))
        engine.destroy()
    return results


def make_hot(engine: ExpertParallelEngine, expert: int) -> None:
    for gate in engine.module.moe.gates:
        with torch.no_grad():
            gate.bias[expert] += 1000.0


def test_empty_ranks_and_one_hot_expert_after_a_move(config: Path, tmp_path: Path) -> None:
    first, second = on_ranks(2, extreme_steps, config, tmp_path / "unused")
    assert first == second
    (some, loss), (none, nothing), (hot, last) = first
    assert some
    assert (none, nothing) == ([], 0.0)
    assert hot == [HOT]
    assert np.isfinite([loss, last]).all()
