"""What an engine really holds and a step really takes, to compare with what was planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.planning.memory import MemoryPlan, plan_memory
from dist_moe.recipes.recipe import load_config, plan_new_run
from dist_moe.recipes.supervised.recipe import SupervisedPlan
from dist_moe.tasks import build_model
from dist_moe.tasks.objective import WeightedObjective

Step = Callable[[int], None]


@dataclass(frozen=True)
class Held:
    """Bytes of tensors that an engine holds after a step."""

    parameters: int
    masters: int
    optimizer: int
    gradients: int | None = None
    kept: int = 0


def size_of(tensors: Any) -> int:
    """Bytes, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())


def engines_of(config: Path, run: str, cases: list[list[str]]) -> Iterator[tuple[ExpertParallelEngine, Step]]:
    """Of each case its engine, and a function that does the training step of a given number. Collective."""
    plans = [plan_new_run(config, case, Path(run)) for case in cases]
    with process_groups(plans[0].environment, plans[0].config.parallel) as groups:
        for plan in plans:
            engine = ExpertParallelEngine(build_model(plan.config, plan.task, groups.world), plan.deepspeed, groups)
            loss = WeightedObjective(plan.task, plan.config.target_weights, groups.environment.world_size)
            yield engine, partial(_step, plan, engine, loss)
            engine.destroy()


def _step(plan: SupervisedPlan, engine: ExpertParallelEngine, loss: WeightedObjective, number: int) -> None:
    for batch in plan.feed.micro_batches(number):
        engine.backward(loss(engine, batch).loss)
        engine.step()


def held_after_a_step(config: Path, run: str, cases: list[list[str]]) -> list[Held]:
    found = []
    for engine, step in engines_of(config, run, cases):
        step(0)
        found.append(held_in_slices(engine) if engine.shards_parameters else held_whole(engine))
    return found


def held_whole(engine: ExpertParallelEngine) -> Held:
    zero = engine.optimizer if engine.zero_optimization() else None
    states = (zero.optimizer if zero else engine.optimizer).state.values()
    return Held(
        size_of(engine.module.parameters()),
        size_of(zero.single_partition_of_fp32_groups) if zero else 0,
        sum(size_of([value]) for state in states for value in state.values()),
    )


def held_in_slices(engine: ExpertParallelEngine) -> Held:
    """``kept``: storages of whole parameters that are not those of the slices."""
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    slices = [p.ds_tensor for p in parameters]
    states = zero.optimizer.state.values()
    return Held(
        size_of(slices),
        size_of(zero.fp32_partitioned_groups_flat),
        sum(size_of([value]) for state in states for value in state.values()),
        size_of([zero.grad_partitions_flat_buffer]),
        size_of([*slices, *(p.data for p in parameters)]) - size_of(slices),
    )


def plan_of(config: Path, ranks: int, *settings: str, memory: int | None = None) -> MemoryPlan:
    loaded = load_config(config, settings)
    return plan_memory(loaded, loaded.data.open(progress=False), ranks, memory)


def peak_of_a_step(config: Path, run: str, settings: list[str]) -> tuple[int, int]:
    """Peak of what forward and backward allocate, by torch's profiler; and the experts' rows, of all layers."""
    plan = plan_new_run(config, settings, Path(run))
    with process_groups(plan.start.environment, plan.config.parallel) as groups:
        model = build_model(plan.config, plan.task, groups.world)
        objective = WeightedObjective(plan.task, plan.config.target_weights, 1)
        (batch,) = plan.feed.micro_batches(0)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step = objective(model, batch)
            step.loss.backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, int(step.sums["load"].sum())
