"""dist-moe train: a new run, or one that goes on."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dist_moe.cli.commands import Commands, add_changed_data, add_config
from dist_moe.config.files import json_line
from dist_moe.errors import UserError

if TYPE_CHECKING:
    from dist_moe.recipes.recipe import Plan

_EPILOG = """\
overrides: any field of the configuration, by its dotted name; values are YAML.
  seed=1  train.max_steps=200  train.batch_size=1024  model.experts.dropout=0
  model.gate.name=top_k  model.gate.k=2  model.permutation.epochs=0.2  model.permutation=null
  parallel.expert_parallel_size=2  deepspeed.zero_optimization.stage=2
  deepspeed.optimizer.params.lr=0.001  deepspeed.gradient_clipping=1.0
  'dist-moe config --fields' lists all fields with their ranges; what is below deepspeed is
  DeepSpeed's own configuration.

one process:       dist-moe train @movielens_comet_plus
R ranks here:      dist-moe train --emulate 2 CONFIG parallel.expert_parallel_size=2
torchrun:          torchrun --nproc-per-node 2 -m dist_moe train CONFIG parallel.expert_parallel_size=2
deepspeed:         deepspeed --num_gpus 2 --module dist_moe train CONFIG parallel.expert_parallel_size=2
TorchX:            torchx run -s local_cwd --wait --log dist_moe.train --config CONFIG \\
                       --ranks 2 parallel.expert_parallel_size=2

The same configuration and seed give the same result in all these ways. On SIGTERM or Ctrl-C the run
writes a checkpoint and ends with code 128 + signal; 'dist-moe train --resume RUN_DIR' goes on as if
nothing had happened. Exit code 2: something in what you gave is wrong, and the message says what;
3: no finite loss any more; 4: a rank stalled. With --auto-resume the same command goes on with its
run whenever it is started again (torchrun --max-restarts, Slurm's --requeue): docs/faults.md.
"""


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    train = commands.add_parser(
        "train",
        help="train a model, or go on with a run",
        description="Train from a YAML configuration, or go on with a run that was stopped.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(train, nargs="?")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="fields to set differently")
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="where to write (default: runs/CONFIG)")
    train.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with this run instead")
    train.add_argument(
        "--auto-resume",
        action="store_true",
        help="go on with the run in --run-dir if it holds one: for launchers that start the same command again",
    )
    train.add_argument("--data-root", type=Path, metavar="DIR", help="the data's original files (data.root)")
    train.add_argument("--emulate", type=int, metavar="R", help="start R ranks on this machine, which share its device")
    add_changed_data(train)
    train.set_defaults(run=_run, output_is_optional=True)


def _run(options: argparse.Namespace) -> int:
    return _plan_and(_train, options) if options.emulate is None else _emulate(options)


def _train(plan: Plan) -> int:
    """Train as planned, and draw the report of a run that has ended."""
    from dist_moe.recipes.recipe import train
    from dist_moe.report import REPORT, report_of_runs

    code, run = train(plan), plan.start.run
    if code == 0 and plan.start.environment.is_rank_zero:
        try:
            report_of_runs([run.root], run.root / REPORT, atlas=False)
        except UserError as error:
            plan.start.say(f"warning: there is no report: {error}")
    return code


def _emulate(options: argparse.Namespace) -> int:
    """Plan the run as its first rank would, so that a mistake is told once, before there are any ranks."""
    from dist_moe.engine.launch.emulation import as_first_of, check_emulation, run_ranks

    check_emulation(options.emulate)
    with as_first_of(options.emulate):
        _plan_and(lambda _: 0, options)
    emulation = argparse.ArgumentParser(add_help=False)
    emulation.add_argument("--emulate")
    return run_ranks(options.emulate, emulation.parse_known_args(options.arguments)[1])


def _plan_and(train: Callable[[Plan], int], options: argparse.Namespace) -> int:
    """Plan the run and train it under the lock of its directory, so that what stands there is judged by one job."""
    from dist_moe.engine.launch.environment import LaunchEnvironment
    from dist_moe.engine.monitor.run_directory import RunDirectory
    from dist_moe.engine.monitor.run_lock import WAIT_FOR_END_S, held
    from dist_moe.recipes.recipe import plan_new_run, plan_restartable_run, plan_resumed_run

    overrides = list(options.overrides)
    if options.data_root is not None:
        overrides.append(f"data.root={json_line(str(options.data_root))}")
    if options.resume is not None:
        if options.run_dir is not None:
            raise UserError("--resume names the run directory already; leave --run-dir out")
        if options.config is not None:
            overrides.insert(0, str(options.config))
        if options.auto_resume:
            raise UserError("--resume goes on with a run already; leave --auto-resume out")
        RunDirectory(options.resume).check_exists()
        with held(options.resume, LaunchEnvironment.read(), option="--resume") as begin:
            resumed = plan_resumed_run(options.resume, overrides, allow_changed_data=options.allow_changed_data)
            begin()
            return train(resumed)
    if options.config is None:
        raise UserError("name a configuration (see dist-moe config --list), or a run with --resume")
    run_dir = options.run_dir or Path("runs") / options.config.stem
    restartable = partial(plan_restartable_run, allow_changed_data=options.allow_changed_data)
    plan = restartable if options.auto_resume else plan_new_run
    with held(run_dir, LaunchEnvironment.read(), wait_s=WAIT_FOR_END_S if options.auto_resume else 0.0) as begin:
        planned = plan(options.config, overrides, run_dir)
        begin()
        return train(planned)
