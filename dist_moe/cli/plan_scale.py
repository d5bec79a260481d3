"""The part of dist-moe plan that speaks of time: options, the table of sizes, and measuring a machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_moe.config.files import json_text
from dist_moe.errors import UserError

_NEED_NODES = ("gpus", "machine", "exchange", "skew", "experts_per_token", "tokens_per_rank", "sweep", "png")


def add_options(plan: argparse.ArgumentParser) -> None:
    """Add what has to do with time to the options of the command."""
    time = plan.add_argument_group("time of a step (docs/plan.md)")
    time.add_argument("--nodes", type=int, metavar="N", help="nodes: predict the time of a step on them")
    time.add_argument("--gpus", type=int, metavar="G", help="ranks on each node (default: 1)")
    time.add_argument("--machine", metavar="NAME", help="h100, h200, a100, or a YAML file (default: h100)")
    only = time.add_mutually_exclusive_group()
    for name in ("flat", "two_level"):
        option = f"--{name.replace('_', '-')}"
        only.add_argument(option, dest="exchange", action="store_const", const=name, help="only this exchange")
    time.add_argument("--skew", type=float, metavar="S", help="rows of the heaviest rank over the mean (default: 1)")
    time.add_argument(
        "--experts-per-token", type=float, metavar="K", help="of a gate, as measured (default: the gate's k)"
    )
    time.add_argument(
        "--tokens-per-rank", type=int, metavar="T", help="a batch that grows with the ranks (default: train.batch_size)"
    )
    time.add_argument("--sweep", action="store_const", const=True, help="1, 2, 4, ... N nodes in one table")
    time.add_argument("--png", type=Path, metavar="FILE", help="draw the table, too")
    time.add_argument(
        "--measure",
        type=Path,
        metavar="FILE.yaml",
        help="measure this machine instead, on the ranks of a launcher, or on two of its own",
    )


def check(options: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together, or are out of range."""
    given = [name for name in _NEED_NODES if getattr(options, name) is not None]
    if options.nodes is None:
        if given:
            name = given[0].replace("_", "-")
            raise UserError(
                f"--{name} is about the time of a step and needs --nodes; add for example --nodes 2 --gpus 8"
            )
        return
    if options.ranks is not None or options.memory_gib is not None:
        name = "--ranks" if options.ranks is not None else "--memory-gib"
        raise UserError(f"{name} is about memory alone; leave out {name}, or --nodes={options.nodes}")
    for name in ("nodes", "gpus", "tokens_per_rank"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least 1")


def plan(options: argparse.Namespace) -> int:
    """Print the table or JSON of the sizes that were asked for."""
    from dist_moe.planning.scale.machine import read_machine
    from dist_moe.planning.scale.planned import Assumed, plan_sizes, plan_traffic, sizes_up_to
    from dist_moe.planning.scale.report import draw_sizes, size_table, traffic_table
    from dist_moe.planning.scale.step_time import EXCHANGES
    from dist_moe.recipes.recipe import load_config

    machine = read_machine(options.machine or "h100")
    config = load_config(options.config, options.overrides)
    if not config.model.one_layer:
        _check_without_time(options, config.model.name)
    task = config.data.open(progress=True)
    skew = 1.0 if options.skew is None else options.skew
    assumed = Assumed(options.experts_per_token, skew, options.tokens_per_rank)
    exchanges = EXCHANGES if options.exchange is None else (options.exchange,)
    nodes = sizes_up_to(options.nodes) if options.sweep else [options.nodes]
    if not config.model.one_layer:
        steps = plan_traffic(config, task, nodes, options.gpus or 1, assumed, exchanges)
        plain = [step.plain() for step in steps]
        print(json_text(plain).rstrip() if options.json else traffic_table(config.model.name, steps))
        return 0
    sizes = plan_sizes(config, task, machine, nodes, options.gpus or 1, assumed, exchanges)
    print(json_text([size.plain() for size in sizes]).rstrip() if options.json else size_table(machine, sizes))
    if options.png is not None:
        draw_sizes(machine, sizes, options.png)
    return 0


def _check_without_time(options: argparse.Namespace, model: str) -> None:
    """Raise UserError for options that only the time of a step depends on, with a model whose time is not predicted."""
    for name in ("machine", "skew", "png"):
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name}={getattr(options, name)}: the time of a step is not predicted for model.name={model}; "
                f"leave out --{name} to see its rows, bytes and memory"
            )


def measure(options: argparse.Namespace) -> int:
    """Write the constants of this machine; without a launcher, on two ranks that are started here."""
    from dist_moe.engine.launch.emulation import run_ranks
    from dist_moe.engine.launch.environment import LaunchEnvironment, disable_malloc_trim
    from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
    from dist_moe.planning.scale.measure import measure_machine, processors_here

    environment = LaunchEnvironment.read()
    if not options.measure.parent.is_dir():
        raise UserError(f"--measure={options.measure}: there is no directory {options.measure.parent}; make it first")
    if not environment.launched:
        return run_ranks(2, options.arguments)
    disable_malloc_trim()
    with process_groups(environment, ParallelConfig()) as groups:
        machine = measure_machine(groups, processors_here())
    if environment.is_rank_zero:
        machine.write(options.measure)
        print(options.measure.read_text(encoding="utf-8"), end="")
    return 0
