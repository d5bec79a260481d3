"""dist-moe plan: what a run will need in memory on each rank, and in time, before it is begun."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dist_moe.cli import plan_scale
from dist_moe.cli.commands import Commands, add_config
from dist_moe.config.files import json_text
from dist_moe.errors import UserError

if TYPE_CHECKING:
    from dist_moe.planning.memory import MemoryPlan

_GIB = 2**30
_LEGEND = """* as configured; activations include the dispatch and are estimates
gathered: parameters that stage 3 brings together within a step, at most; less with a smaller
zero_optimization.stage3_max_reuse_distance
rows: that the experts of the rank with most compute for a micro-batch, in all MoE layers; sent: by the busiest rank, in
the flat exchanges of a step, forward and backward"""


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    plan = commands.add_parser(
        "plan",
        help="memory and time that a run will need on each rank",
        description="Parameters, gradients, masters and optimizer states by ZeRO stage (exact, padding included), "
        "activations and dispatch buffers (estimated) under an even and under the worst load, before anything is "
        "allocated. With --nodes, the time of a step too, by either exchange, from a machine's constants "
        "(docs/plan.md).",
    )
    add_config(plan, nargs="?")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="fields to set differently")
    plan.add_argument("--ranks", type=int, metavar="N", help="processes in all (default: 1)")
    plan.add_argument("--memory-gib", type=float, metavar="M", help="memory of a rank: how large a batch fits?")
    plan.add_argument("--json", action="store_true", help="print JSON, in bytes")
    plan_scale.add_options(plan)
    plan.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.measure is not None:
        return plan_scale.measure(options)
    if options.config is None:
        raise UserError("CONFIG: required, but not given; for example: dist-moe plan @movielens_comet_plus")
    plan_scale.check(options)
    return plan_scale.plan(options) if options.nodes is not None else _plan_memory(options)


def _plan_memory(options: argparse.Namespace) -> int:
    from dist_moe.planning.memory import plan_memory
    from dist_moe.recipes.recipe import load_config

    ranks = 1 if options.ranks is None else options.ranks
    if ranks < 1:
        raise UserError(f"--ranks={ranks} must be at least 1")
    if options.memory_gib is not None and not options.memory_gib > 0:
        raise UserError(f"--memory-gib={options.memory_gib} must be above 0")
    config = load_config(options.config, options.overrides)
    config.fitted(ranks).check(ranks)
    memory = None if options.memory_gib is None else int(options.memory_gib * _GIB)
    plan = plan_memory(config, config.data.open(progress=True), ranks, memory)
    print(json_text(plan.plain()).rstrip() if options.json else _table(plan))
    return 0


def _table(plan: MemoryPlan) -> str:
    names = ("dense", "experts", "gradients", "masters", "optimizer", "bucket", "gathered", "total", "padding")
    layers = f", {plan.moe_layers} MoE layers" if plan.moe_layers != 1 else ""
    lines = [
        f"{plan.ranks} rank(s), experts over {plan.expert_parallel_size}, {plan.tokens:,} tokens per rank and "
        f"micro-batch{layers}",
        f"{'':24}" + "".join(f"{name:>14}" for name in names),
    ]
    for state in plan.states:
        mark = " *" if state.stage == plan.stage else ""
        parts = (
            state.dense_parameters,
            state.expert_parameters,
            state.gradients,
            state.masters,
            state.optimizer,
            state.bucket,
            state.gathered,
            state.total,
            state.padding,
        )
        lines.append(f"{f'ZeRO stage {state.stage}{mark}':24}" + "".join(f"{_size(n):>14}" for n in parts))
    if plan.teachers:
        lines.append(f"beside these, of the model that is followed: {_size(plan.teachers)}")
    if plan.search:
        lines.append(f"while a table search lasts, at most, beside these and a pass in fp64: {_size(plan.search)}")
    heads = ("rows", "sent", "dispatch", "activations", "with states")
    lines += ["", f"{'':40}" + "".join(f"{head:>14}" for head in heads) + f"{'largest batch':>16}"]
    for load in plan.loads:
        whole = plan.state.total + plan.buffers + plan.teachers + load.activations
        batch = "-" if load.largest_batch is None else f"{load.largest_batch:,}" if load.largest_batch else "none fits"
        sizes = (load.sent_per_step, load.dispatch, load.activations, whole)
        columns = (f"{load.received_rows:,}", *map(_size, sizes))
        lines.append(f"{load.load:40}" + "".join(f"{column:>14}" for column in columns) + f"{batch:>16}")
    return "\n".join([*lines, _LEGEND])


def _size(count: int) -> str:
    for unit, scale in (("GiB", _GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
