"""One workload: every candidate checked for equality, then all timed by turns, forward and backward."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch

from dist_moe.parallel import World, gather_objects, wait_for_all
from tools.bench import ours, peers
from tools.bench.candidate import Candidate, Layer, local_experts, step
from tools.bench.equal import differences, expected, unequal
from tools.bench.jobs import COUNTING, Job
from tools.bench.limit import Needed, Products, measure_roof
from tools.bench.timing import Clock, interleaved
from tools.bench.workloads import Material, Workload, material

CANDIDATES: tuple[Candidate, ...] = ours.CANDIDATES + peers.CANDIDATES
OURS = ours.CANDIDATES[0].name
LIMIT = "the limit"
FEWEST, MOST = 5, 25
SHARE_OF_MEMORY = 0.7


Say = Callable[[str], None]


def _nobody(what: str) -> None:
    """Whom to tell what is done now, where nobody listens."""


@dataclass
class Effort:
    """``seconds``: to spend on timing a workload, within ``FEWEST`` to ``MOST`` repetitions."""

    seconds: float = 20.0
    seed: int = 0
    clock: Clock = "wall"
    only: tuple[str, ...] = ()
    excluded: dict[str, str] = field(default_factory=dict)

    def wanted(self, candidate: Candidate) -> bool:
        """Whether its name has one of ``only`` in it; ours always."""
        return candidate.name == OURS or not self.only or any(part in candidate.name for part in self.only)


@dataclass(frozen=True)
class Place:
    """Where a layer is measured: the ranks that share the experts, and how to say what is done now."""

    world: World
    say: Say = _nobody


def measure(workload: Workload, effort: Effort, place: Place) -> dict[str, Any]:
    """All of it, as numbers that JSON can hold; the same on every rank. Collective."""
    world = place.world
    given = material(workload, world.rank, effort.seed)
    left_out = reasons(workload, effort)
    chosen = [c for c in CANDIDATES if effort.wanted(c) and c.name not in left_out]
    errors, first_seconds = check(workload, effort, given, chosen, place, left_out)
    equals = [c for c in chosen if c.name not in left_out]
    products = Products(workload, given, rows_of_experts(workload, given, world), local_experts(workload, world))
    place.say("limit")
    ways = in_turns(products.ways(), 2, effort.clock, place.say)
    fastest = min(ways, key=lambda way: min(ways[way]))
    products_only = products.ways()[fastest]
    seconds: list[dict[str, list[float]]] = []
    for batch in batches(equals, workload):
        place.say("timing " + ", ".join(c.name for c in batch))
        layers = {c.name: c.build(workload, given, world) for c in batch}
        round_seconds = sum(first_seconds[c.name] for c in batch) + min(ways[fastest])
        repetitions = int(max(FEWEST, min(MOST, effort.seconds / round_seconds)))
        calls: dict[str, Callable[[], object]] = {LIMIT: products_only}
        calls |= {name: _step_of(layers[name], given) for name in layers}
        seconds.append(in_turns(calls, repetitions, effort.clock, place.say))
        del layers, calls
        gc.collect()
    rows = sum(products.rows)
    needed = Needed.of(workload, rows, len(given.x_TD), len(products.rows))
    roof = measure_roof(workload.torch_dtype, effort.clock)
    return {
        "workload": asdict(workload),
        "name": workload.name,
        "hidden": workload.hidden,
        "rows": rows,
        "batches": seconds,
        "left_out": left_out,
        "errors": errors,
        "limit": {"way": fastest, "ways": ways},
        "needed": asdict(needed) | {"roofline_s": roof.seconds(needed)} | asdict(roof),
    }


def study(job: Job, place: Place) -> dict[str, Any]:
    """The comparison, as a job."""
    return measure(job.workload, Effort(job.seconds, job.seed, job.clock, job.candidates, dict(job.excluded)), place)


def reasons(workload: Workload, effort: Effort) -> dict[str, str]:
    """Why candidates are not even tried."""
    memory = SHARE_OF_MEMORY * psutil.virtual_memory().available
    found = dict(effort.excluded)
    for c in CANDIDATES:
        needs = c.extra_bytes(workload) + 3 * workload.weight_bytes
        if reason := c.missing() or c.unfit(workload):
            found[c.name] = reason
        elif needs > memory:
            found[c.name] = f"needs some {needs / 2**30:.0f} GiB of memory"
    return found


def check(
    workload: Workload,
    effort: Effort,
    given: Material,
    candidates: Sequence[Candidate],
    place: Place,
    left_out: dict[str, str],
) -> tuple[dict[str, float], dict[str, float]]:
    """Largest relative error of each, and the seconds of a second step; what is unequal goes to ``left_out``."""
    place.say("expected values")
    wanted = expected(workload, given, place.world.rank, effort.seed)
    errors, seconds = {}, {}
    for candidate in candidates:
        place.say(candidate.name)
        wait_for_all()
        layer = candidate.build(workload, given, place.world)
        found = differences(layer, given, wanted)
        started = time.perf_counter()
        step(layer, given.x_TD, given.cotangent_TD)
        taken = time.perf_counter() - started
        of_ranks = gather_objects((unequal(workload, found), max(norm for norm, _ in found.values()), taken))
        wrong = [f"rank {rank}: {reason}" for rank, (reason, _, _) in enumerate(of_ranks) if reason]
        if wrong:
            left_out[candidate.name] = "; ".join(wrong)
        errors[candidate.name] = max(norm for _, norm, _ in of_ranks)
        seconds[candidate.name] = max(taken for _, _, taken in of_ranks)
        del layer
        gc.collect()
    return errors, seconds


def in_turns(
    candidates: Mapping[str, Callable[[], object]], repetitions: int, clock: Clock = "wall", say: Say = _nobody
) -> dict[str, list[float]]:
    """Time candidates like :func:`interleaved`; all ranks start together, and the slowest counts."""
    calls = 0

    def together() -> None:
        nonlocal calls
        wait_for_all()
        say(f"{COUNTING}{calls} of {(repetitions + 1) * len(candidates)}")
        calls += 1

    mine = interleaved(candidates, repetitions, before_each=together, clock=clock)
    of_ranks = gather_objects(mine)
    return {name: [max(taken) for taken in zip(*(each[name] for each in of_ranks), strict=True)] for name in mine}


def rows_of_experts(workload: Workload, given: Material, world: World) -> list[int]:
    """Rows that each of this rank's experts gets from all ranks."""
    counts = gather_objects(torch.bincount(given.expert_TK.flatten(), minlength=workload.experts).tolist())
    here = local_experts(workload, world)
    return [sum(of_expert) for of_expert in zip(*counts, strict=True)][here]


def batches(candidates: Sequence[Candidate], workload: Workload) -> list[list[Candidate]]:
    """Candidates whose weights fit into memory together; ours is in every batch."""
    weights = max(workload.weight_bytes // workload.ranks, 1)
    memory = SHARE_OF_MEMORY * psutil.virtual_memory().available / workload.ranks
    together = max(1, int(memory / weights) - 6)
    own = [c for c in candidates if c.name == OURS]
    others = [c for c in candidates if c.name != OURS]
    starts = range(0, max(len(others), 1), together)
    return [own + others[start : start + together] for start in starts]


def _step_of(layer: Layer, given: Material) -> Callable[[], object]:
    def run() -> None:
        step(layer, given.x_TD, given.cotangent_TD)
        layer.zero_grad(set_to_none=True)

    return run
