"""dist-moe export: the weights of a run in one safetensors file, or as a directory for transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_moe.cli.commands import Commands, add_changed_data
from dist_moe.errors import UserError

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    export = commands.add_parser(
        "export",
        help="write the weights of a run into one safetensors file, or for transformers",
        description="Write weights and buffers into one safetensors file, experts stacked by global id, with the "
        "configuration in its metadata. 'dist-moe evaluate FILE' and 'dist-moe import FILE RUN_DIR' read it. With "
        "--hf, write a decoder language model or a BERT, and its tokenizer, as a directory that transformers loads.",
    )
    export.add_argument("source", type=Path, metavar="RUN_DIR|CHECKPOINT", help="a run's best or newest, or this one")
    export.add_argument("file", type=Path, nargs="?", metavar="FILE.safetensors", help="to write (without --hf)")
    export.add_argument("--hf", type=Path, metavar="DIR", help="write a Hugging Face directory instead of a file")
    export.add_argument(
        "--architecture",
        metavar="NAME",
        help="of a decoder, with --hf: llama, mixtral, olmoe, qwen2_moe, qwen3_moe or dist_moe (default: the first "
        "that has a place for all that the model is)",
    )
    export.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the parameters (default: %(default)s)")
    add_changed_data(export)
    export.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    import torch

    from dist_moe.recipes.supervised.runs import export_weights

    dtype = getattr(torch, DTYPES[options.dtype])
    if (options.file is None) == (options.hf is None):
        raise UserError("name either FILE.safetensors or --hf DIR, to which the weights are to be written")
    if options.hf is not None:
        from dist_moe.recipes.hugging_face.export import export_hugging_face
        from dist_moe.recipes.merge_compress.compress import difference_text

        allow = options.allow_changed_data
        written = export_hugging_face(options.source, options.hf, dtype, options.architecture, allow_changed_data=allow)
        print(f"{written.architecture} of {written.parameters:,} parameters in {written.directory}")
        if written.folding is not None:
            print(difference_text("slot maps folded into the routers, on held-out text", written.folding))
        return 0
    if options.architecture is not None:
        raise UserError(f"--architecture={options.architecture} goes with --hf DIR; a file has none")
    exported = export_weights(options.source, options.file, dtype)
    kinds = list(exported.kinds.values())
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds)))
    print(f"weights of step {exported.step} in {exported.path}: tensors {counts}; sha256 {exported.digest[:12]}")
    return 0
