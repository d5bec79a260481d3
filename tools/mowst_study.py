"""Mowst against its networks alone and its controls: on published graphs, and on one whose edges are rewired.

    python tools/mowst_study.py --report results/mowst

trains every variant below on random splits of each graph, a seed each, and on the official split, and writes
DIR/table.md and DIR/figure.png: test accuracy, the difference to the strong network alone, paired by seed with its 95 %
interval, the share of nodes that need the strong network, and the measured cost of a node. Learning rate and dropout of
each variant on each graph are those of ``--draws`` common draws with the least validation loss on a seed that is not
compared. Then the first graph, with growing shares of its edges rewired. Steps are full batches. Runs that are complete
are not trained again; the command can be stopped and given again. Published figures (GCN to Mowst: Flickr 53.86 to
54.62, ogbn-arxiv 71.74 to 72.52) are of other graphs, quoted second-hand, and not verified.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dist_moe.recipes.recipe import load_config
from dist_moe.sweeps.paired import Difference, paired_difference
from tools.studies import (
    StudyRun,
    command_given,
    directory_name,
    machine,
    spread,
    study_parser,
    train_all,
    write_report,
)

SPLITS = RANDOM, OFFICIAL = "random", "official"
TUNING_SEED = 1000
RATES, DROPOUTS = (0.1, 0.01, 0.001), (0.1, 0.2, 0.3, 0.4, 0.5)
STRONG = ("gcn", "graphsage", "gin")
SESSIONS = 4
"""Turns of each network at most; what is trained in one fit may take as many steps as all of them."""
SUPERVISED, TURNS, STAR = (
    "recipe={name: supervised}",
    f"recipe={{name: mowst, compare: false, max_sessions: {SESSIONS}, session_patience: 1, tolerance: 0.005}}",
    "recipe={name: mowst_star, compare: false}",
)


@dataclass(frozen=True)
class Variant:
    """A row of the table, by its overrides. ``base``: the network alone to which it is compared."""

    model: str
    recipe: str
    base: str = "gcn"


def _network(name: str) -> str:
    return f"{{name: {name}, hidden: 64, dropout: DROPOUT}}"


def _alone(name: str) -> Variant:
    return Variant(f"model={{name: node_classifier, network: {_network(name)}}}", SUPERVISED)


def _both(strong: str, mixture: str, recipe: str, weak: str = "mlp", confidence: str = "dispersion") -> Variant:
    parts = f"weak: {_network(weak)}, strong: {_network(strong)}, confidence: {{name: {confidence}}}"
    return Variant(f"model={{name: weak_strong, {parts}, mixture: {mixture}}}", recipe, strong)


VARIANTS: dict[str, Variant] = {
    **{name: _alone(name) for name in ("mlp", *STRONG)},
    **{f"Mowst, {name}": _both(name, "losses", TURNS) for name in STRONG},
    **{f"Mowst*, {name}": _both(name, "predictions", STAR) for name in STRONG},
    "soft mixture of outputs, gcn": _both("gcn", "predictions", SUPERVISED, confidence="features"),
    "two strong, gcn": _both("gcn", "losses", TURNS, weak="gcn"),
    "random confidence, gcn": _both("gcn", "losses", TURNS, confidence="random"),
}
REWIRED_VARIANTS = ("mlp", "gcn", "Mowst, gcn", "Mowst*, gcn")


@dataclass(frozen=True)
class Place:
    """A graph, a kind of split, and the share of edges that are rewired."""

    graph: str
    split: str
    rewired: float = 0.0
    root: Path | None = None

    def data(self, seed: int) -> str:
        """Return the override of the data. The official split is one, whatever the seed; Cora's is Planetoid's kind."""
        split = "planetoid" if self.split == OFFICIAL and self.graph in ("cora", "wordnet") else self.split
        drawn = 0 if self.split == OFFICIAL else seed
        root = "" if self.root is None else f", root: {self.root}"
        return f"data={{name: {self.graph}, split: {split}, seed: {drawn}, rewired: {self.rewired}{root}}}"

    def __str__(self) -> str:
        return f"{self.graph}, {self.split}" + (f", {self.rewired:.0%} rewired" if self.rewired else "")


@cache
def training_nodes(config: Path, data: str) -> int:
    """Return the number of training nodes: the batch that is full."""
    loaded: Any = load_config(config, [data])
    count: int = loaded.data.prepare(progress=False).manifest["counts"]["train_nodes"]
    return count


@cache
def epochs(config: Path, overrides: tuple[str, ...]) -> int:
    """Return the epochs of a turn."""
    loaded: Any = load_config(config, overrides)
    count: int = loaded.train.epochs
    return count


@dataclass(frozen=True)
class Study:
    """The runs of the study, from the command line's ``options``."""

    options: argparse.Namespace

    def seeds(self, place: Place) -> range:
        """Return the seeds that are compared: fewer on the large graph."""
        return range(self.options.large_seeds if place.graph == "wordnet" else self.options.seeds)

    def run(self, place: Place, name: str, seed: int, draw: int) -> StudyRun:
        rate, dropout = draws(self.options.draws)[draw]
        variant, data = VARIANTS[name], place.data(seed)
        overrides = (data, variant.recipe, variant.model.replace("DROPOUT", str(dropout)), f"seed={seed}")
        overrides += (f"train.batch_size={training_nodes(self.options.config, data)}",)
        overrides += (f"deepspeed.optimizer.params.lr={rate}", *self.options.overrides)
        if variant.recipe != TURNS:
            overrides += (f"train.epochs={SESSIONS * epochs(self.options.config, self.options.overrides)}",)
        directory = self.options.runs / directory_name(place, name, f"seed{seed}", f"draw{draw}")
        return StudyRun(directory, self.options.config, overrides)

    def tuning(self, place: Place, name: str) -> Iterator[StudyRun]:
        # Rewired edges are met with the draws of the graph as it is.
        place = replace(place, rewired=0.0)
        yield from (self.run(place, name, TUNING_SEED, draw) for draw in range(self.options.draws))

    def chosen(self, place: Place, name: str) -> int:
        """Return the draw with the least validation loss."""
        losses = [float(run.summary["val"]["loss"]) for run in self.tuning(place, name)]
        return losses.index(min(losses))

    def train(self, cells: Sequence[tuple[Place, str]]) -> None:
        at_once = self.options.at_once
        tuning = {run.directory: run for place, name in cells for run in self.tuning(place, name)}
        train_all(tuning.values(), at_once, keep_weights=False)
        compared = (run for place, name in cells for run in self.compared(place, name))
        train_all(compared, at_once, keep_weights=False)

    def compared(self, place: Place, name: str) -> list[StudyRun]:
        draw = self.chosen(place, name)
        return [self.run(place, name, seed, draw) for seed in self.seeds(place)]

    def accuracies(self, place: Place, name: str) -> list[float]:
        """Return the test accuracies by seed, in percent."""
        return [100 * float(run.summary["test"]["accuracy"]) for run in self.compared(place, name)]


@cache
def draws(count: int) -> list[tuple[float, float]]:
    """Return ``count`` draws of (learning rate, dropout), the same for every variant."""
    return random.Random(0).sample([(rate, dropout) for rate in RATES for dropout in DROPOUTS], count)


def main() -> None:
    options = parse()
    study = Study(options)
    places = [Place(graph, split, root=options.root) for graph in options.graphs for split in options.splits]
    rewired = [replace(places[0], rewired=share) for share in options.rewired]
    cells = [(place, name) for place in places for name in options.variants]
    cells += [(place, name) for place in rewired for name in REWIRED_VARIANTS if name in options.variants]
    study.train(cells)
    draw = partial(draw_rewired, study, [places[0], *rewired]) if rewired else None
    write_report(options.report, page(study, cells), draw)


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, "mowst_study", "results/mowst", seeds=10)
    parser.add_argument("--config", type=Path, default=Path("configs/mowst_cora.yaml"))
    parser.add_argument("--graphs", nargs="+", default=["cora", "citeseer", "pubmed", "wordnet"], metavar="NAME")
    parser.add_argument("--root", type=Path, help="directory of the original files, if they are not to be fetched")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--rewired", nargs="*", type=float, default=[0.25, 0.5, 0.75], metavar="SHARE")
    parser.add_argument("--large-seeds", type=int, default=3, help="seeds on wordnet")
    parser.add_argument("--draws", type=int, default=4, help="of learning rate and dropout")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), metavar="KIND")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, for all runs alike")
    options = parser.parse_args()
    options.overrides = tuple(options.overrides)
    return options


def page(study: Study, cells: Sequence[tuple[Place, str]]) -> str:
    lines = [
        f"# Mowst on {', '.join(study.options.graphs)}",
        "",
        f"`{command_given()}`. Test accuracy in percent, mean ± standard deviation over seeds; Δ: differences to the "
        "strong network alone (of `mlp`: to `gcn`) and to `mlp`, paired by seed, with 95 % intervals. Asked: nodes "
        "that need the strong network, by the mean of 1 - C; by the threshold chosen on the validation nodes, with the "
        f"accuracy it gives. A turn and a fit end early by patience; a fit may take as many steps as {SESSIONS} turns "
        "of a network. µs: a test node by the threshold / by a pass of the strong network over the whole graph. "
        f"{machine()}.",
    ]
    for place in dict.fromkeys(place for place, _ in cells):
        lines += ["", f"## {place}", ""]
        lines += ["| | accuracy | Δ strong | Δ mlp | asked | by threshold | µs |", f"|{' --- |' * 7}"]
        lines += [line(study, place, name) for at, name in cells if at == place]
    picture = ["", "![accuracy over rewired edges](figure.png)"] if study.options.rewired else []
    return "\n".join([*lines, *picture, ""])


def line(study: Study, place: Place, name: str) -> str:
    """Return the row of a variant."""
    accuracies, summaries = study.accuracies(place, name), [run.summary for run in study.compared(place, name)]
    cells = [name, spread(accuracies, 2), *(versus(study, place, name, base) for base in (VARIANTS[name].base, "mlp"))]
    shares = [summary["test"].get("strong_share") for summary in summaries]
    cells.append("" if None in shares else f"{100 * statistics.mean(shares):.1f} %")
    found = [summary["inference"] for summary in summaries if "inference" in summary]
    if found:
        asked, right = (statistics.mean(f["threshold"][key] for f in found) for key in ("strong_share", "accuracy"))
        costs = [f["microseconds_per_test_node"] for f in found]
        whole, some = (statistics.mean(c[key] for c in costs) for key in ("strong_whole_graph", "by_threshold"))
        cells += [f"{100 * right:.2f}, {100 * asked:.1f} % asked", f"{some:.1f} / {whole:.1f}"]
    else:
        cells += ["", ""]
    return "| " + " | ".join(cells) + " |"


def versus(study: Study, place: Place, name: str, base: str) -> str:
    """Return the mean paired difference to ``base``, if that was trained, its interval, bold if that holds no 0."""
    if name == base or base not in study.options.variants or study.options.seeds < 2:
        return ""
    ours_N, theirs_N = (np.array(study.accuracies(place, each)) for each in (name, base))
    found: Difference = paired_difference(ours_N, theirs_N)
    text = f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    return text if found.verdict == "within" else f"**{text}**"


def draw_rewired(study: Study, places: Sequence[Place], path: Path) -> None:
    """Draw mean accuracies over the share of rewired edges, bars of a standard deviation."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=f"share of rewired edges of {places[0].graph}", ylabel="test accuracy (%)")
    for name in (name for name in REWIRED_VARIANTS if name in study.options.variants):
        found = [study.accuracies(place, name) for place in places]
        deviations = [statistics.stdev(of) if len(of) > 1 else 0.0 for of in found]
        shares, means = [place.rewired for place in places], [statistics.mean(of) for of in found]
        axes.errorbar(shares, means, yerr=deviations, marker="o", capsize=3, label=name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    canvas.print_figure(path, dpi=150)


if __name__ == "__main__":
    main()
