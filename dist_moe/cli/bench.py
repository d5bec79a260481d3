"""dist-moe bench: the layer beside its peers. The benchmark itself lives in tools/bench of the repository."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import dist_moe
from dist_moe.cli.commands import Commands
from dist_moe.errors import UserError


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    bench = commands.add_parser(
        "bench",
        help="time the layer beside those of other systems, and beside bare matrix products",
        description="Forward and backward of one MoE layer: ours, DeepSpeed's, FairScale's, transformers'. All get the "
        "same weights and tokens, their results are checked to be equal, and they take turns. What has been measured "
        "is not measured again. Needs a checkout of the repository; takes about 20 minutes.",
    )
    scope = bench.add_mutually_exclusive_group()
    scope.add_argument("--quick", action="store_const", const="quick", dest="scope", help="small layers, two minutes")
    scope.add_argument("--full", action="store_const", const="full", dest="scope", help="every workload, many hours")
    scope.add_argument(
        "--check", action="store_true", help="a minute: fail if the layer is slower than results/bench_ratios.json"
    )
    scope.add_argument("--commit-ratios", action="store_true", help="write what --check compares with")
    bench.add_argument("--only", nargs="+", default=[], metavar="PART", help="jobs with that in their name")
    bench.add_argument("--candidates", nargs="+", default=[], metavar="PART", help="candidates with that in their name")
    bench.add_argument("--output", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    bench.add_argument("--seconds", type=float, default=20.0, help="to spend on timing a workload (default 20)")
    bench.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time of one thread, for a machine that has other work (default wall)",
    )
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("--again", action="store_true", help="measure again what DIR holds already")
    bench.set_defaults(run=_run, scope="default")


def _run(options: argparse.Namespace) -> int:
    checkout = Path(dist_moe.__file__).resolve().parents[1]
    if not (checkout / "tools" / "bench" / "main.py").exists():
        raise UserError(
            f"dist-moe bench: benchmarks live in the repository, and {checkout} is no checkout of it; clone it and "
            f"run the command there"
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from tools.bench import main as bench

    chosen = bench.Options(
        scope=options.scope or "default",
        only=tuple(options.only),
        candidates=tuple(options.candidates),
        output=options.output,
        seconds=options.seconds,
        seed=options.seed,
        again=options.again,
        clock=options.clock,
        command=shlex.join(["dist-moe", *options.arguments]),
    )
    if options.check:
        return bench.check(chosen)
    return bench.commit_ratios(chosen) if options.commit_ratios else bench.run(chosen)
