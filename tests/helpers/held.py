"""What an engine really holds and a step really takes, to compare with what was planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.planning.memory import MemoryPlan, StatePlan, plan_memory
from dist_moe.recipes.recipe import load_config, plan_new_run
from dist_moe.tasks import build_model
from dist_moe.tasks.objective import WeightedObjective
from tests.helpers.pool import on_ranks

Step = Callable[[int], None]


@dataclass(frozen=True)
class Held:
    """Bytes of tensors that an engine holds after a step. ``kept``: storages of whole parameters that are not those
    of the slices."""

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
    """Each case's engine, and a function that does the training step of a given number. Collective."""
    plans = [plan_new_run(config, case, Path(run)) for case in cases]
    with process_groups(plans[0].start.environment, plans[0].config.parallel) as groups:
        for plan in plans:
            engine = ExpertParallelEngine(build_model(plan.config, plan.task, groups.world), plan.deepspeed, groups)
            loss = WeightedObjective(plan.task, plan.config.target_weights, groups.environment.world_size)

            def step(number: int, engine: Any = engine, loss: Any = loss, feed: Any = plan.feed) -> None:
                for batch in feed.micro_batches(number):
                    engine.backward(loss(engine, batch).loss)
                    engine.step()

            yield engine, step
            engine.destroy()


def check_states(
    config: Path, run: Path, ranks: int, cases: list[list[str]], settings: Sequence[str] = ()
) -> list[StatePlan]:
    """Parameters, masters and optimizer states of every rank are as planned, to the byte; the plans of all cases."""
    cases = [[*case, *settings] for case in cases]
    states = [plan_of(config, ranks, *case).state for case in cases]
    for rank, held in enumerate(on_ranks(ranks, held_after_a_step, config, str(run), cases)):
        for case, state, measured in zip(cases, states, held, strict=True):
            rest = (state.gradients, state.kept) if state.stage == 3 else ()
            planned = Held(state.dense_parameters + state.expert_parameters, state.masters, state.optimizer, *rest)
            assert planned == measured, (rank, case)
    return states


def held_after_a_step(config: Path, run: str, cases: list[list[str]]) -> list[Held]:
    found = []
    for engine, step in engines_of(config, run, cases):
        step(0)
        zero = engine.optimizer if engine.zero_optimization() else None
        states = (zero.optimizer if zero else engine.optimizer).state.values()
        of_optimizer = sum(size_of([value]) for state in states for value in state.values())
        parameters = list(engine.module.parameters())
        if engine.shards_parameters:
            slices = [p.ds_tensor for p in parameters]
            held = Held(
                size_of(slices),
                size_of(zero.fp32_partitioned_groups_flat),
                of_optimizer,
                size_of([zero.grad_partitions_flat_buffer]),
                size_of([*slices, *(p.data for p in parameters)]) - size_of(slices),
            )
        else:
            held = Held(size_of(parameters), size_of(zero.single_partition_of_fp32_groups) if zero else 0, of_optimizer)
        found.append(held)
    return found


def plan_of(config: Path, ranks: int, *settings: str, memory: int | None = None) -> MemoryPlan:
    loaded = load_config(config, settings)
    return plan_memory(loaded, loaded.data.open(progress=False), ranks, memory)


def check_largest_batch(config: Path, load: int, memory: int, *settings: str) -> None:
    """The largest batch of a load fits ``memory``, and none of one example more per rank does."""
    settings = (*settings, "deepspeed.zero_optimization={stage: 1, reduce_bucket_size: 1000}")
    largest = plan_of(config, 2, *settings, memory=memory).loads[load].largest_batch
    assert largest
    assert largest % 2 == 0
    for batch, fits in ((largest, True), (largest + 2, False)):
        plan = plan_of(config, 2, *settings, f"train.batch_size={batch}")
        assert (plan.state.total + plan.buffers + plan.loads[load].activations <= memory) == fits


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
