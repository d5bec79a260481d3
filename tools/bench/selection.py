"""Which workloads are measured: quick, by default, or all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from tools.bench.jobs import Job
from tools.bench.timing import Clock
from tools.bench.workloads import Workload

TOKENS, WIDTHS, EXPERTS, KS = (2048, 8192), (512, 1024), (8, 16, 64, 256), (1, 2, 8)
DTYPES, VIOLATIONS, RANKS = ("float32", "bfloat16"), (0.0, 0.2, 1.0, 4.0), (1, 2, 4)
SCOPES = ("quick", "default", "full")

_PLAIN = Workload(2048, 512, 16, 2)
_SMALL = Workload(256, 256, 8, 2)
_MANY = replace(_PLAIN, experts=64)


def jobs(scope: str, seconds: float, seed: int, candidates: tuple[str, ...], clock: Clock = "wall") -> list[Job]:
    """In the order in which they are run. By the processor's clock, those only which it can time."""
    of_scope = {"quick": _quick, "default": _default, "full": _full}[scope]
    made = [Job(study, workload, seconds, seed, candidates) for study, workload in of_scope()]
    if scope != "quick":
        made.append(replace(made[0], disable_malloc_trim=False))
    if clock == "cpu":
        return [replace(job, clock=clock) for job in made if job.study == "layer" and job.workload.ranks == 1]
    return made


def _quick() -> Iterator[tuple[str, Workload]]:
    yield "layer", _SMALL
    yield "layer", replace(_SMALL, max_violation=1.0)
    yield "layer", replace(_SMALL, ranks=2)
    yield "memory", _SMALL
    yield "ragged", replace(_SMALL, k=4)
    yield "exchange", replace(_SMALL, ranks=2)


def _default() -> Iterator[tuple[str, Workload]]:
    for experts in (16, 8, 64, 256):
        yield "layer", replace(_PLAIN, experts=experts)
    for k in (1, 8):
        yield "layer", replace(_MANY, k=k)
    for violation in VIOLATIONS[1:]:
        yield "layer", replace(_MANY, max_violation=violation)
    for experts in (16, 64):
        yield "layer", replace(_PLAIN, experts=experts, dtype="bfloat16")
    yield "layer", replace(_PLAIN, width=1024)
    yield "layer", replace(_PLAIN, tokens=8192)
    yield "layer", Workload(128, 512, 8, 2)
    for ranks in RANKS[1:]:
        yield "layer", replace(_MANY, ranks=ranks)
    yield "layer", replace(_MANY, ranks=2, max_violation=1.0)
    yield "layer", replace(_MANY, ranks=2, empty_rank=True)
    yield from _other_studies()


def _full() -> Iterator[tuple[str, Workload]]:
    """Every combination that there can be."""
    empty = (False, True)
    for dtype, tokens, width, experts, k, violation, ranks, of_rank in product(
        DTYPES, TOKENS, WIDTHS, EXPERTS, KS, VIOLATIONS, RANKS, empty
    ):
        workload = Workload(tokens, width, experts, k, dtype, violation, ranks, of_rank)
        if not workload.impossible() and (ranks > 1 or not of_rank):
            yield "layer", workload
    yield from _other_studies()


def _other_studies() -> Iterator[tuple[str, Workload]]:
    for workload in (_PLAIN, _MANY, replace(_MANY, max_violation=4.0)):
        yield "memory", workload
    yield "ragged", replace(_PLAIN, k=8)
    yield "ragged", replace(_PLAIN, k=8, ranks=2)
    for ranks, tokens in product(RANKS[1:], TOKENS):
        yield "exchange", replace(_PLAIN, tokens=tokens, ranks=ranks)
