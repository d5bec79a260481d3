"""dist-moe import: a run that starts from exported weights, or from a Hugging Face directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_moe.cli.commands import CONFIG_HELP, Commands, add_config
from dist_moe.errors import UserError

EXPERTS_HELP = "of a dense layer: copies of its network, or the network split into as many parts (default: copies)"
NOISE_HELP = "added to copies, in standard deviations of the matrix that is copied (default: 0)"


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add_parser(
        "import",
        help="make a run that starts from the weights of 'dist-moe export', or from a Hugging Face directory",
        description="Make a run directory whose step 0 has the weights and buffers of FILE, in fp32, and no optimizer "
        "state; 'dist-moe train --resume RUN_DIR' trains it from the first step on. From a Hugging Face directory come "
        "the weights and sizes of a decoder; CONFIG says the rest, and where it has experts a dense one is up-cycled.",
    )
    parser.add_argument("source", type=Path, metavar="FILE.safetensors|DIR")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="where the run is to be")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of its configuration to change")
    add_config(parser, "--config", metavar="CONFIG", help=f"of the run, with a Hugging Face directory: {CONFIG_HELP}")
    parser.add_argument("--experts", choices=("copies", "split"), default="copies", help=EXPERTS_HELP)
    parser.add_argument("--noise", type=float, default=0.0, help=NOISE_HELP)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.source.is_dir() or options.config is not None:
        return _run_hugging_face(options)
    from dist_moe.recipes.supervised.runs import import_weights

    checkpoint, exported = import_weights(options.source, options.run_dir, options.overrides)
    print(
        f"{checkpoint}: {exported.dtype} weights of step {exported.step} as fp32 masters, without optimizer state: "
        f"moments begin at zero and the schedule at its start; now: dist-moe train --resume {options.run_dir}"
    )
    return 0


def _run_hugging_face(options: argparse.Namespace) -> int:
    from dist_moe.config.validation import validate_section
    from dist_moe.models.conversion import DecoderConversionConfig
    from dist_moe.recipes.hugging_face.import_ import import_hugging_face

    if options.config is None:
        raise UserError(f"{options.source} is a directory; say --config CONFIG for the rest of the run")
    conversion = validate_section(DecoderConversionConfig, [f"method={options.experts}", f"noise={options.noise}"])
    checkpoint, config = import_hugging_face(
        options.source, options.run_dir, options.config, conversion, options.overrides
    )
    layers = config.model.num_moe_layers
    made = f"{config.model.num_experts} experts in each of {layers} layer(s)" if layers else "no experts"
    print(
        f"{checkpoint}: weights of {options.source}, {made}, as fp32 masters without optimizer state; "
        f"now: dist-moe train --resume {options.run_dir}"
    )
    return 0
