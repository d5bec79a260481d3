"""dist-moe compress: a run, or a Hugging Face directory, with fewer experts, as it is or after recovery."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
        "goes on. With --recover it is trained at once, on its task and to follow the finished run; an interrupted "
        "recovery goes on by 'dist-moe train --resume OUT'. Works at any number of ranks. Or do so with a Hugging "
        "Face decoder, one layer in memory at a time. docs/compress.md says what the options mean.",
    )
    compress.add_argument(
        "run_dir", type=Path, metavar="RUN|DIR", help="a run, a checkpoint in one, or a Hugging Face directory"
    )
    compress.add_argument("output", type=Path, metavar="OUT", help="where the result is to be")
    compress.add_argument("overrides", nargs="*", metavar="key=value", help="similarity=outputs train.epochs=1 ...")
    compress.add_argument("--options", type=Path, metavar="FILE", help="YAML with such keys of merging, such as groups")
    compress.add_argument("--experts", metavar="N", help="experts that a layer keeps, on average (or give groups=)")
    compress.add_argument("--method", help="m_smoe (default), hc_smoe, uniform, random, prune_usage or reap")
    compress.add_argument("--grouping", help="global or uniform")
    compress.add_argument(
        "--recover",
        action="store_true",
        help="train the result (recover.trained=router train.epochs=1 ...; what is not said is as for RUN)",
    )
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
    flags = {name: getattr(options, name) for name in _FLAGS if getattr(options, name) is not None}
    for text in options.overrides:
        name = text.partition("=")[0]
        if name in flags:
            raise UserError(f"--{name} {flags[name]} and {text}: give one of them")
    merge, others = _parted(options.overrides)
    merge = [*(f"{name}={value}" for name, value in flags.items()), *merge]
    if (options.run_dir / "config.json").is_file():
        return _compress_directory(options, merge, list(others))
    if options.form not in (None, "run") or options.config is not None:
        raise UserError(
            f"--as and --config go with a Hugging Face directory, and {options.run_dir} is none; of a run, the "
            "result is a run: 'dist-moe export OUT --hf' writes it as a directory; options may be in --options FILE"
        )
    if options.recover:
        return _recover(options, merge, others)
    if others:
        raise UserError(f"{next(iter(others))}: nothing is trained without --recover; give it, or leave this out")
    return _compress(options, merge)


def _parted(overrides: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return those of merging, unknown ones among them; and others, by what they are in a configuration."""
    from dist_moe.recipes.merge_compress import CompressConfig, MergeCompressConfig, MergeCompressRecipe

    merge, others = list[str](), dict[str, str]()
    for text in overrides:
        section = text.partition("=")[0].partition(".")[0]
        if section in CompressConfig.model_fields:
            merge.append(text)
        elif section in MergeCompressRecipe.model_fields.keys() - {"name", "source"}:
            others[text] = f"recipe.{text}"
        elif section in MergeCompressConfig.model_fields:
            others[text] = text
        else:
            merge.append(text)
    return merge, others


def _compress(options: argparse.Namespace, overrides: list[str]) -> int:
    from dist_moe.config.overrides import parse_overrides
    from dist_moe.config.validation import validate
    from dist_moe.engine.launch.environment import LaunchEnvironment
    from dist_moe.recipes.merge_compress import CompressConfig, compress_run, report_text

    config = validate(CompressConfig, _merge_in_file(options) | parse_overrides(overrides))
    source = options.run_dir.resolve()
    report = compress_run(source, options.output, config, allow_changed_data=options.allow_changed_data)
    if LaunchEnvironment.read().is_rank_zero:
        print(report_text(report))
        print(f"written to {options.output}; now: dist-moe evaluate {options.output}")
    return 0


def _compress_directory(options: argparse.Namespace, overrides: list[str], of_run: list[str]) -> int:
    from dist_moe.config.overrides import parse_overrides
    from dist_moe.config.validation import validate
    from dist_moe.recipes.merge_compress import CompressConfig, Compression, compress_directory, report_text

    if options.recover:
        raise UserError("--recover trains a run; compress with --as run, and train that")
    config = validate(CompressConfig, _merge_in_file(options) | parse_overrides(overrides))
    job = Compression(options.run_dir.resolve(), options.output, options.form, options.config, of_run)
    report = compress_directory(job, config)
    print(report_text(report))
    now = f"; now: dist-moe evaluate {options.output}" if report["form"] == "run" else ""
    print(f"written to {options.output}{now}")
    return 0


def _recover(options: argparse.Namespace, merge: list[str], others: Mapping[str, str]) -> int:
    """Train by the recipe, whose configuration is that of the source with these overrides."""
    from dist_moe.engine.launch.environment import LaunchEnvironment
    from dist_moe.engine.monitor.run_lock import held
    from dist_moe.recipes.recipe import plan_run_of, set_fields, train, validate_config

    for text in others:
        if text.partition("=")[0] == "merge" and (merge or options.options):
            raise UserError(
                f"{text}: it goes with no other option of merging; leave out {merge[0] if merge else '--options'}"
            )
    source = str(options.run_dir.resolve())
    content = {"recipe": {"name": "merge_compress", "source": source, "merge": _merge_in_file(options)}}
    set_fields(content, [*(f"recipe.merge.{text}" for text in merge), *others.values()])
    with held(options.output, LaunchEnvironment.read(), option="OUT") as begin:
        config = validate_config(content)
        plan = plan_run_of(config, options.output, "OUT", allow_changed_data=options.allow_changed_data)
        begin()
        return train(plan)


def _merge_in_file(options: argparse.Namespace) -> dict[str, Any]:
    from dist_moe.config.plain_yaml import read_yaml

    return read_yaml(options.options) if options.options else {}
