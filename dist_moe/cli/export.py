"""dist-moe export: the weights of a run in one safetensors file."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_moe.cli.commands import Commands

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    export = commands.add_parser(
        "export",
        help="write the weights of a run into one safetensors file",
        description="Write weights and buffers into one safetensors file, experts stacked by global id, with the "
        "configuration in its metadata. 'dist-moe evaluate FILE' and 'dist-moe import FILE RUN_DIR' read it.",
    )
    export.add_argument("source", type=Path, metavar="RUN_DIR|CHECKPOINT", help="a run's best or newest, or this one")
    export.add_argument("file", type=Path, metavar="FILE.safetensors")
    export.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the parameters (default: %(default)s)")
    export.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    import torch

    from dist_moe.recipes.weights import export_weights

    exported = export_weights(options.source, options.file, getattr(torch, DTYPES[options.dtype]))
    kinds = list(exported.kinds.values())
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds)))
    print(f"weights of step {exported.step} in {exported.path}: tensors {counts}; sha256 {exported.digest[:12]}")
    return 0
