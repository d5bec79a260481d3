"""dist-moe compress: a run, or a Hugging Face directory, with fewer experts."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_moe.cli.commands import CONFIG_HELP, Commands, add_changed_data, add_config
from dist_moe.errors import UserError

_FLAGS = ("experts", "method", "grouping")


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    compress = commands.add_parser(
        "compress",
        help="make a model with fewer experts of a run or of a Hugging Face directory, by merging or pruning",
        description="Compare the experts of a finished run on some of its examples, merge those that are alike (or "
        "remove those that do least), and write the result as a run of its own, from which 'dist-moe train --resume' "
        "goes on. Works at any number of ranks. Or do so with a Hugging Face decoder, one layer in memory at a time. "
        "docs/compress.md says what the options mean.",
    )
    compress.add_argument(
        "source", type=Path, metavar="RUN|DIR", help="a run directory, a checkpoint in one, or a Hugging Face directory"
    )
    compress.add_argument("output", type=Path, metavar="OUT", help="where the result is to be")
    compress.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="similarity=outputs ...; of DIR also data.root=TEXT",
    )
    compress.add_argument("--experts", required=True, metavar="N", help="experts that a layer keeps, on average")
    compress.add_argument("--method", help="m_smoe (default), hc_smoe, uniform, random, prune_usage or reap")
    compress.add_argument("--grouping", help="global or uniform")
    compress.add_argument(
        "--as",
        dest="form",
        choices=("run", "dist_moe", "stock"),
        help="of DIR: write a run of ours (with --config), a directory of our own architecture, or one of DIR's "
        "(default: stock after pruning, else dist_moe)",
    )
    add_config(
        compress, "--config", metavar="CONFIG", help=f"of DIR: the data, and all of a run but its model: {CONFIG_HELP}"
    )
    add_changed_data(compress)
    compress.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from dist_moe.config.validation import validate_section
    from dist_moe.engine.launch.environment import LaunchEnvironment
    from dist_moe.recipes.merge_compress import (
        CompressConfig,
        Compression,
        compress_directory,
        compress_run,
        report_text,
    )

    source, is_directory = options.source.resolve(), (options.source / "config.json").is_file()
    of_text = [text for text in options.overrides if "." in text.partition("=")[0]]
    flags = [f"{name}={getattr(options, name)}" for name in _FLAGS if getattr(options, name) is not None]
    own = [text for text in options.overrides if text not in of_text]
    if is_directory:
        config = validate_section(CompressConfig, [*own, *flags])
        job = Compression(source, options.output, options.form, options.config, of_text)
        report = compress_directory(job, config)
    else:
        if options.form not in (None, "run") or options.config is not None:
            raise UserError(
                f"--as and --config go with a Hugging Face directory, and {options.source} is none; of a run, the "
                "result is a run: 'dist-moe export OUT --hf' writes it as a directory"
            )
        config = validate_section(CompressConfig, [*options.overrides, *flags])
        report = compress_run(source, options.output, config, allow_changed_data=options.allow_changed_data)
    if LaunchEnvironment.read().is_rank_zero:
        print(report_text(report))
        now = "" if report.get("form") in ("dist_moe", "stock") else f"; now: dist-moe evaluate {options.output}"
        print(f"written to {options.output}{now}")
    return 0
