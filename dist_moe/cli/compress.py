"""dist-moe compress: a run with fewer experts."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_moe.cli.commands import Commands, add_changed_data

_FLAGS = ("experts", "method", "grouping")


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    compress = commands.add_parser(
        "compress",
        help="make a run with fewer experts of a finished one, by merging or pruning",
        description="Compare the experts of a finished run on some of its examples, merge those that are alike (or "
        "remove those that do least), and write the result as a run of its own, from which 'dist-moe train --resume' "
        "goes on. Works at any number of ranks; docs/compress.md says what the options mean.",
    )
    compress.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory or a checkpoint in one")
    compress.add_argument("output", type=Path, metavar="OUT", help="where the run is to be")
    compress.add_argument("overrides", nargs="*", metavar="key=value", help="similarity=outputs align=first ...")
    compress.add_argument("--config", type=Path, metavar="FILE", help="YAML with such keys, such as groups")
    compress.add_argument("--experts", metavar="N", help="experts that a layer keeps, on average")
    compress.add_argument("--method", help="m_smoe (default), hc_smoe, uniform, random, prune_usage or reap")
    compress.add_argument("--grouping", help="global or uniform")
    add_changed_data(compress)
    compress.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from dist_moe.config.overrides import parse_overrides
    from dist_moe.config.plain_yaml import read_yaml
    from dist_moe.config.validation import validate
    from dist_moe.engine.launch.environment import LaunchEnvironment
    from dist_moe.recipes.merge_compress import CompressConfig, compress_run, report_text

    flags = [f"{name}={getattr(options, name)}" for name in _FLAGS if getattr(options, name) is not None]
    content = read_yaml(options.config) if options.config else {}
    config = validate(CompressConfig, content | parse_overrides([*options.overrides, *flags]))
    report = compress_run(
        options.run_dir.resolve(), options.output, config, allow_changed_data=options.allow_changed_data
    )
    if LaunchEnvironment.read().is_rank_zero:
        print(report_text(report))
        print(f"written to {options.output}; now: dist-moe evaluate {options.output}")
    return 0
