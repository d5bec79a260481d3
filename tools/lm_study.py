"""Language models with different gates on equal tokens: bits per byte against the FLOPs that a token really takes.

    python tools/lm_study.py --config configs/lm_small.yaml --report results/lm_small

trains the configuration's model with every gate below and its dense twin of equal active size, each with several
seeds, in runs of their own, and writes DIR/table.md and DIR/figure.png: mean and standard deviation over seeds of the
test figures. FLOPs of a forward pass are those of matrix products, by the experts per token that were measured on the
test part; of training, by those recorded at every step. Runs that are complete are not trained again; the command can
be stopped and given again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dist_moe.config.files import parse_json
from dist_moe.data.text import TextConfig
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.models.transformer import Transformer
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.recipe import load_config
from dist_moe.tasks import build_model
from tools.studies import (
    StudyRun,
    command_given,
    directory_name,
    dist_moe,
    machine,
    spread,
    study_parser,
    train_all,
    write_report,
)

_NO_SEARCH = "model.permutation=null"
SWAPS = (
    "swap_search={every_epochs: 0.2, until_epoch: 1.0, examples: 64, batch_size: 32, max_verified: 64, "
    "verified_per_round: 8}"
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "dense twin": ("model.moe_every=0", _NO_SEARCH),
    "Top-k": ("model.gate={name: top_k, k: 2}", _NO_SEARCH),
    "Top-k + balance loss": ("model.gate={name: top_k, k: 2, balance_weight: 0.01}", _NO_SEARCH),
    "Hash": ("model.gate={name: hash, assignment: balanced}", _NO_SEARCH),
    "COMET": (_NO_SEARCH,),
    "COMET+": (),
    "COMET+, swaps": (_NO_SEARCH, SWAPS),
    "AdaMoE": ("model.gate={name: ada_moe, k: 4, null_slots: 8, balance_weight: 0.01}", _NO_SEARCH),
    "SMoE-Dropout": ("model.gate={name: smoe_dropout, k_min: 2}", _NO_SEARCH),
}
SELF_SLIMMABLE = "SMoE-Dropout"
BITS = "bits_per_byte"


@dataclass(frozen=True)
class Row:
    """One run, evaluated once. ``mega_flops``: of a token's forward pass; ``trained``: FLOPs of all training."""

    name: str
    bits: float
    experts_per_token: float
    mega_flops: float
    trained: float
    parameters: int


def main() -> None:
    options = parse()
    runs = [(name, seed) for seed in range(options.seeds) for name in options.variants]
    train_all((study_run(*run, options) for run in runs), options.at_once)
    rows = [row for run in runs for row in rows_of(*run, options)]
    write_report(options.report, page(rows, options), partial(draw, rows))


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, "lm_study", "results/lm_small")
    parser.add_argument("--config", type=Path, default=Path("configs/lm_small.yaml"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, for all runs alike")
    return parser.parse_args()


def study_run(name: str, seed: int, options: argparse.Namespace) -> StudyRun:
    overrides = (*options.overrides, *VARIANTS[name], f"seed={seed}")
    return StudyRun(options.runs / directory_name(name, f"seed{seed}"), options.config, overrides)


def rows_of(name: str, seed: int, options: argparse.Namespace) -> Iterator[Row]:
    """The run at the end of its training, and what else its weights are good for."""
    run = study_run(name, seed, options)
    model, sequence_length = built(run.directory)
    records = [
        parse_json(line) for line in RunDirectory(run.directory).metrics.read_text(encoding="utf-8").splitlines()
    ]
    steps = [record for record in records if "validation" not in record]
    tokens = load_config(RunDirectory(run.directory).config).train.batch_size * sequence_length
    trained = sum(tokens * model.training_flops_per_token(sequence_length, active(step)) for step in steps)

    def row(label: str, test: dict[str, Any]) -> Row:
        per_token = active(test)
        flops = model.size.flops_per_token(sequence_length, per_token)
        return Row(label, test[BITS], per_token, flops / 1e6, trained, model.size.num_params())

    yield row(name, run.summary["test"])
    for k in powers_of_two(model.config.num_experts) if name == SELF_SLIMMABLE else ():
        told = parse_json(dist_moe("evaluate", run.directory, f"model.gate.evaluation_k={k}", "--json"))
        yield row(f"{name}, evaluated at k = {k}", told["test"])


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``."""
    return [2**i for i in range(most.bit_length())]


def active(figures: dict[str, Any]) -> float:
    """Experts per token, on average over MoE layers; 0 for a model without any."""
    return float(figures.get("active_experts") or 0.0)


def built(directory: Path) -> tuple[Transformer, int]:
    """A model of the run's sizes, and the length of its sequences."""
    config = load_config(RunDirectory(directory).config, ["parallel.expert_parallel_size=1"])
    task = config.data.open(progress=False)
    model = build_model(config, task, SingleWorld())
    assert isinstance(model, Transformer)
    assert isinstance(config.data, TextConfig)
    return model, config.data.sequence_length


def page(rows: Sequence[Row], options: argparse.Namespace) -> str:
    lines = [
        "# Language models with different gates on equal tokens",
        "",
        f"`{command_given()}`: {options.seeds} seed(s) each, test part; mean ± standard deviation over seeds. MFLOPs: "
        "matrix products of a token's forward pass, with the experts per token as measured; of training, without "
        f"searches, relative to the first row's. {machine()}.",
        "",
        "| model | bits per byte | experts per token | MFLOPs per token | FLOPs of training | parameters |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base = statistics.mean(r.trained for r in rows if r.name == rows[0].name)
    for name in dict.fromkeys(row.name for row in rows):
        of_name = [row for row in rows if row.name == name]
        cells = [
            spread([r.bits for r in of_name], 4),
            spread([r.experts_per_token for r in of_name], 2),
            f"{statistics.mean(r.mega_flops for r in of_name):.2f}",
            f"{statistics.mean(r.trained for r in of_name) / base:.2f}",
            f"{of_name[0].parameters:,}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "![bits per byte against FLOPs](figure.png)", ""])


def draw(rows: Sequence[Row], path: Path) -> None:
    """A mark per model, bars of a standard deviation."""
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="MFLOPs of a token's forward pass, as measured", ylabel="bits per byte (test)")
    for name in dict.fromkeys(row.name for row in rows):
        of_name = [row for row in rows if row.name == name]
        bits = [row.bits for row in of_name]
        deviation = statistics.stdev(bits) if len(bits) > 1 else 0.0
        flops = statistics.mean(row.mega_flops for row in of_name)
        axes.errorbar(flops, statistics.mean(bits), yerr=deviation, marker="o", linestyle="none", capsize=3, label=name)
    least, most = axes.get_xlim()
    axes.set_xlim(0.95 * least, 1.05 * most)  # else models of equal FLOPs are drawn far apart
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    canvas.print_figure(path, dpi=150)


if __name__ == "__main__":
    main()
