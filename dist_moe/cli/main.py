"""dist-moe: the command line. A mistake of the user's prints one message and exits with code 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence, Sized
from pathlib import Path

from dist_moe.errors import UserError

DATA_SETS = ("movielens-1m", "movielens-latest-small", "multi-fashion-mnist", "multi-mnist")

_TRAIN_EPILOG = """\
overrides: any field of the configuration, by its dotted name; values are YAML.
  seed=1  train.max_steps=200  train.batch_size=1024  model.dropout=0
  model.gate.name=top_k  model.gate.k=2  model.permutation.epochs=0.2  model.permutation=null
  parallel.expert_parallel_size=2  deepspeed.zero_optimization.stage=2
  deepspeed.optimizer.params.lr=0.001  deepspeed.gradient_clipping=1.0
  'dist-moe config --schema' lists all fields with their ranges; what is below deepspeed is
  DeepSpeed's own configuration.

one process:       dist-moe train configs/movielens_comet_plus.yaml
torchrun:          torchrun --nproc-per-node 2 -m dist_moe train CONFIG parallel.expert_parallel_size=2
deepspeed:         deepspeed --num_gpus 2 --module dist_moe train CONFIG parallel.expert_parallel_size=2
TorchX:            torchx run -s local_cwd --wait --log launch/components.py:train \\
                       --config CONFIG --ranks 2 parallel.expert_parallel_size=2

The same configuration and seed give the same result in all four ways. On SIGTERM or Ctrl-C the run
writes a checkpoint and ends with code 128 + signal; 'dist-moe train --resume RUN_DIR' goes on as if
nothing had happened. Exit code 2: something in what you gave is wrong, and the message says what.
"""


def console_script() -> None:
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, return the exit code."""
    options = _parse(arguments)
    try:
        return int(options.run(options))
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"dist-moe: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after options, which argparse alone does not allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    stray = [argument for argument in rest if argument.startswith("-") or "overrides" not in options]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-moe", description="Distributed training of sparse mixtures of experts.")
    # The deepspeed launcher puts this before the arguments of its own accord.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    _add_search(commands)
    _add_config(commands)
    _add_data(commands)
    _add_sweep(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a model, or go on with a run",
        description="Train from a YAML configuration, or go on with a run that was stopped.",
        epilog=_TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", nargs="?", type=Path, help="YAML file, see configs/")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="fields to set differently")
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="where to write (default: runs/CONFIG)")
    train.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with this run instead")
    train.add_argument("--data-root", type=Path, metavar="DIR", help="the data's original files (data.root)")
    train.set_defaults(run=_train)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser("evaluate", help="test figures of a run, from its best or newest checkpoint")
    evaluate.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    evaluate.set_defaults(run=_evaluate)


def _add_search(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    search = commands.add_parser(
        "search",
        help="local search by swaps over the experts of a finished run",
        description="Exchange experts between slots while that lowers the loss on validation examples, and write "
        "the result as a run of its own. Works at any number of ranks, for any gate.",
    )
    search.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    search.add_argument("overrides", nargs="*", metavar="key=value", help="examples, max_swaps, ... (SwapSearchConfig)")
    search.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: RUN_DIR-search)")
    search.set_defaults(run=_search)


def _add_config(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    config = commands.add_parser("config", help="check and show a configuration, or its schema")
    config.add_argument("config", nargs="?", type=Path, help="YAML file to check and show in full")
    config.add_argument("overrides", nargs="*", metavar="key=value")
    config.add_argument("--schema", action="store_true", help="print the JSON schema of all fields")
    config.set_defaults(run=_config)


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    data = commands.add_parser("data", help="fetch and prepare data sets")
    verbs = data.add_subparsers(required=True, metavar="VERB")
    fetch = verbs.add_parser("fetch", help="fetch and prepare a data set, once")
    fetch.add_argument("name", choices=DATA_SETS, metavar="NAME", help=" | ".join(DATA_SETS))
    fetch.add_argument("--data-root", type=Path, metavar="DIR", help="directory of the original files")
    fetch.set_defaults(run=_fetch)


def _add_sweep(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="train many trials with drawn hyper-parameters, and report",
        description="Begin a sweep or go on with it; when all trials are done, write its report.",
    )
    sweep.add_argument("file", type=Path, metavar="SWEEP", help="YAML file, see configs/sweeps/")
    sweep.add_argument("--workers", type=int, default=1, metavar="N", help="processes that train (default: 1)")
    sweep.add_argument("--sweep-dir", type=Path, metavar="DIR", help="where to write (default: runs/sweeps/SWEEP)")
    sweep.add_argument("--retry-failed", action="store_true", help="try trials again that an error ended")
    sweep.add_argument("--report-only", action="store_true", help="train nothing, write the report anew")
    sweep.add_argument("--runner", metavar="MODULE:FUNCTION", help="what trains the trials, if not this package")
    sweep.set_defaults(run=_sweep)


def _train(options: argparse.Namespace) -> int:
    from dist_moe.recipes.plan import plan_new_run, plan_resumed_run
    from dist_moe.recipes.supervised import train

    overrides = list(options.overrides)
    if options.data_root is not None:
        overrides.append(f"data.root={json.dumps(str(options.data_root))}")
    if options.resume is not None:
        if options.run_dir is not None:
            raise UserError("--resume names the run directory already; leave --run-dir out")
        if options.config is not None:
            overrides.insert(0, str(options.config))
        return train(plan_resumed_run(options.resume, overrides))
    if options.config is None:
        raise UserError("name a configuration (see configs/), or a run with --resume")
    run_dir = options.run_dir or Path("runs") / options.config.stem
    return train(plan_new_run(options.config, overrides, run_dir))


def _evaluate(options: argparse.Namespace) -> int:
    from dist_moe.engine.launch_environment import LaunchEnvironment
    from dist_moe.recipes.report import figures_table, predictor_rows
    from dist_moe.recipes.supervised import evaluate_run

    result = evaluate_run(options.run_dir)
    if LaunchEnvironment.read().is_first:
        table = figures_table(result["test"], predictor_rows(result["baselines"]))
        print(json.dumps(result, indent=2) if options.json else f"{result['checkpoint']}\n{table}")
    return 0


def _search(options: argparse.Namespace) -> int:
    from dist_moe.engine.launch_environment import LaunchEnvironment
    from dist_moe.recipes.config import validate_section
    from dist_moe.recipes.report import figures_table
    from dist_moe.recipes.search_run import search_run
    from dist_moe.search import SwapSearchConfig

    config = validate_section(SwapSearchConfig, options.overrides)
    run_dir = options.run_dir.resolve()
    output = options.output or run_dir.with_name(f"{run_dir.name}-search")
    report = search_run(run_dir, output, config)
    if LaunchEnvironment.read().is_first:
        first, last = report["losses"][0], report["losses"][-1]
        ending = "no swap helps any more" if report["local_optimum"] else "the budget is spent"
        print(
            f"loss on {report['search']['examples']:,} validation examples {first:.6g} -> {last:.6g} by "
            f"{len(report['swaps'])} swap(s): {report['screened']} screened, {report['verified']} verified; {ending}"
        )
        print(figures_table(report["test_after"], {"before the search": report["test_before"]}))
        print(f"written to {output}")
    return 0


def _config(options: argparse.Namespace) -> int:
    import yaml

    from dist_moe.recipes.config import RunConfig, load_config

    if options.schema:
        print(json.dumps(RunConfig.model_json_schema(), indent=2))
        return 0
    if options.config is None:
        raise UserError("name a configuration to check, or ask for --schema")
    config = load_config(options.config, options.overrides)
    config.check(config.parallel.expert_parallel_size)
    print(yaml.safe_dump(config.plain(), sort_keys=False), end="")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from dist_moe.data.movielens import MovieLensConfig, prepare
    from dist_moe.data.two_images import TwoImagesConfig, prepare_two_images

    parts: tuple[Sized, ...]
    if options.name.startswith("movielens"):
        table = prepare(MovieLensConfig(name=options.name, root=options.data_root))
        sizes = f"{table.num_users:,} users, {table.num_items:,} items, "
        parts = (table.train, table.val, table.test)
    else:
        pictures = prepare_two_images(TwoImagesConfig(name=options.name, root=options.data_root))
        sizes = f"{len(pictures.train.images):,} images to train on, "
        parts = (pictures.train, pictures.val, pictures.test)
    train, val, test = map(len, parts)
    print(f"{options.name}: {sizes}pairs to train on {train:,}, to validate {val:,}, to test {test:,}")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from dist_moe.recipes.sweep import DEFAULT_RUNNER
    from dist_moe.recipes.sweep.command import report_sweep, run_sweep

    if options.report_only:
        return report_sweep(options.file, options.sweep_dir)
    runner = options.runner or DEFAULT_RUNNER
    return run_sweep(options.file, options.workers, options.sweep_dir, options.retry_failed, runner)
