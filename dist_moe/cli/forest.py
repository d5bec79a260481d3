"""dist-moe forest: the experts of a Branch-Train-Merge run, one by one and together."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_moe.cli.commands import Commands, add_changed_data
from dist_moe.cli.export import DTYPES
from dist_moe.config.files import json_text

_BEGIN = (
    "what the expert begins from: average (of the experts, by how well they predict the domain; default), nearest "
    "(the one that predicts it best), seed, or trained weights, taken as they are: PATH of a run, checkpoint or file"
)
_MERGE = "a way of merging as in recipe.merge: a name, or YAML such as '{name: ensemble, top_k: 2}'"


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    forest = commands.add_parser(
        "forest",
        help="list, add, replace, drop, evaluate, export the experts of a Branch-Train-Merge run; generate from them",
        description="Work on the experts that a run of recipe.name=branch_train_merge has trained, "
        "see docs/branch_train_merge.md. What is done to one expert changes no bit of another.",
    )
    actions = forest.add_subparsers(required=True, metavar="ACTION")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=text, description=text)
        parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
        return parser

    listing = add("list", "list the experts")
    listing.add_argument("--json", action="store_true", help="print JSON instead of a table")
    listing.set_defaults(run=_list)
    for name, text, replaces in (
        ("add", "train an expert for a further domain, or take a trained one", False),
        ("replace", "put another expert in the place of one", True),
    ):
        parser = add(name, text)
        parser.add_argument("name", metavar="NAME", help="a domain of the data, or a branch of the run")
        parser.add_argument("--from", dest="begin", default="average", metavar="WHAT", help=_BEGIN)
        add_changed_data(parser)
        parser.set_defaults(run=_add, replaces=replaces)
    drop = add("drop", "remove an expert")
    drop.add_argument("name", metavar="NAME", help="an expert")
    drop.set_defaults(run=_drop)
    evaluate = add("evaluate", "evaluate every domain by every expert and every way of using them together")
    evaluate.add_argument("--with", dest="merges", nargs="+", metavar="MERGE", help=f"{_MERGE} (default: the run's)")
    evaluate.add_argument("--domains", nargs="+", metavar="DOMAIN", help="evaluate these domains only")
    evaluate.add_argument("--experts", nargs="+", metavar="NAME", help="use these experts only")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_changed_data(evaluate)
    evaluate.set_defaults(run=_evaluate)
    generate = add("generate", "go on with a text")
    generate.add_argument("text", metavar="TEXT", help="what is written on")
    generate.add_argument("--with", dest="merge", default="ensemble", metavar="MERGE", help=f"{_MERGE} (ensemble)")
    generate.add_argument("--domain", metavar="DOMAIN", help="the text's domain, whose cached prior is used")
    generate.add_argument("--tokens", type=int, default=60, metavar="N", help="tokens to write (60)")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="T", help="of the draw (0.8)")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (0)")
    generate.set_defaults(run=_generate)
    export = add("export", "write experts that are used together for transformers")
    export.add_argument("directory", type=Path, metavar="DIR", help="a new directory")
    export.add_argument("--with", dest="merge", default="ensemble", metavar="MERGE", help=f"{_MERGE} (ensemble)")
    export.add_argument("--domain", metavar="DOMAIN", help="the domain whose cached prior is used")
    export.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the parameters (default: %(default)s)")
    add_changed_data(export)
    export.set_defaults(run=_export)


def _list(options: argparse.Namespace) -> int:
    from dist_moe.recipes.branch_train_merge import Forest

    members = Forest.found(options.run_dir).members.values()
    if options.json:
        print(json_text({"members": [member.model_dump(mode="json") for member in members]}).rstrip())
        return 0
    rows = [("name", "role", "tokens", "begun from", "file")]
    rows += [(m.name, m.role, f"{m.tokens:,}", m.begun_from, m.file) for m in members]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _add(options: argparse.Namespace) -> int:
    from dist_moe.engine.launch.environment import LaunchEnvironment
    from dist_moe.recipes.branch_train_merge.tend import BEGINNINGS, add_expert

    begin = options.begin if options.begin in BEGINNINGS else Path(options.begin)
    code = add_expert(
        options.run_dir, options.name, begin, replaces=options.replaces, allow_changed_data=options.allow_changed_data
    )
    if code == 0 and LaunchEnvironment.read().is_rank_zero:
        print(f"{options.name} is in the forest; now: dist-moe forest evaluate {options.run_dir}")
    return code


def _drop(options: argparse.Namespace) -> int:
    from dist_moe.recipes.branch_train_merge.tend import drop_expert

    drop_expert(options.run_dir, options.name)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from dist_moe.engine.launch.environment import LaunchEnvironment
    from dist_moe.recipes.branch_train_merge import Forest
    from dist_moe.recipes.branch_train_merge.evaluate import table_text, write_report
    from dist_moe.recipes.branch_train_merge.tend import evaluate_forest_of, merge_of

    merges = None if options.merges is None else [merge_of(text) for text in options.merges]
    report = evaluate_forest_of(
        options.run_dir,
        merges,
        domains=options.domains,
        experts=options.experts,
        allow_changed_data=options.allow_changed_data,
    )
    if LaunchEnvironment.read().is_rank_zero:
        write_report(Forest(options.run_dir), report)
        print(json_text(report).rstrip() if options.json else table_text(report))
    return 0


def _generate(options: argparse.Namespace) -> int:
    from dist_moe.engine.launch.environment import LaunchEnvironment
    from dist_moe.recipes.branch_train_merge.tend import generate, merge_of

    text = generate(
        options.run_dir,
        options.text,
        merge_of(options.merge),
        domain=options.domain,
        tokens=options.tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    if LaunchEnvironment.read().is_rank_zero:
        print(text)
    return 0


def _export(options: argparse.Namespace) -> int:
    import torch

    from dist_moe.engine.launch.environment import LaunchEnvironment
    from dist_moe.recipes.branch_train_merge.export import export_forest
    from dist_moe.recipes.branch_train_merge.tend import merge_of

    written = export_forest(
        options.run_dir,
        options.directory,
        merge_of(options.merge),
        domain=options.domain,
        dtype=getattr(torch, DTYPES[options.dtype]),
        allow_changed_data=options.allow_changed_data,
    )
    if LaunchEnvironment.read().is_rank_zero:
        for each in written:
            print(f"{each.architecture} of {each.parameters:,} parameters in {each.directory}")
    return 0
