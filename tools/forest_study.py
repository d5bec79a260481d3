"""Branch-Train-Merge beside what it must beat, at equal tokens: specialists, random shares, averages, mixtures.

    python tools/forest_study.py --report results/branch_train_merge

trains the forests below from one configuration, each with several seeds, and writes DIR/table.md and DIR/figure.png:
bits per byte of the test part over the domains that were trained on, and over those that were held out, with paired
differences to the dense run of the same tokens and seed, and Student's interval at 95 %. Runs that are complete are not
trained again; the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dist_moe.config.files import read_json
from dist_moe.recipes.branch_train_merge.evaluate import HELD_OUT, REPORT, TRAINED_ON
from dist_moe.recipes.branch_train_merge.forest import FOLDER
from dist_moe.recipes.recipe import load_config
from tools.studies import (
    StudyRun,
    beside,
    command_given,
    directory_name,
    machine,
    study_parser,
    train_all,
    write_report,
)

EIGHT = "[news, hobbies, lore, belles_lettres, government, learned, fiction, romance]"
GATES = ("{name: top_k, k: 2}", "{name: comet, k: 2, max_active: 2, gamma: 1.0}")
SHARES = (0.1, 0.5)
"""Shares of the forest's tokens on which a mixture is trained further; the rate rises for a tenth of it, then falls."""
PLAIN = (
    "ensemble, {name: ensemble, prior: cached}, {name: ensemble, prior: cached, top_k: 2}, average, "
    "{name: average, weights: cached}"
)


def _mixtures(steps: int) -> str:
    """Return the mixtures of a forest of so many steps."""
    mixtures = []
    for gate, share in product(GATES, SHARES):
        rising, whole = max(1, round(share * steps / 10)), round(share * steps)
        rate = f"warmup_max_lr: 3.0e-3, warmup_num_steps: {rising}, warmup_type: linear, total_num_steps: {whole}"
        schedule = f"{{type: WarmupDecayLR, params: {{{rate}}}}}"
        mixtures.append(f"{{name: btx, gate: {gate}, share: {share}, scheduler: {schedule}}}")
    return ", ".join(mixtures)


def _clustered(count: int) -> tuple[str, ...]:
    names = ", ".join(f"cluster-{k}" for k in range(count))
    return (
        f"data.clusters={{count: {count}, domains: {EIGHT}}}",
        f"recipe.partition={{name: provenance, domains: [{names}]}}",
        "recipe.merge=[clusters, {name: clusters, top_k: 2}, ensemble]",
    )


def _random(count: int) -> tuple[str, ...]:
    return (f"recipe.partition={{name: random, branches: {count}, domains: {EIGHT}}}", "recipe.merge=[ensemble]")


RUNS: dict[str, tuple[str, ...]] = {
    "domains": ("recipe.twin=true", f"recipe.merge=[{PLAIN}, MIXTURES]"),
    "random 8": _random(8),
    "clusters 8": _clustered(8),
    "clusters 4": _clustered(4),
    "random 4": _random(4),
    "seed 0": ("recipe.seed_share=0", f"recipe.merge=[{PLAIN}]"),
    "seed 25": ("recipe.seed_share=0.25", f"recipe.merge=[{PLAIN}]"),
    "seed 75": ("recipe.seed_share=0.75", f"recipe.merge=[{PLAIN}]"),
    "mixture": (
        "recipe.seed_share=1",
        "model.moe_every=1",
        "model.num_experts=8",
        "model.experts={hidden: 256}",
        "model.gate={name: top_k, k: 2, balance_weight: 0.01}",
        "model.permutation=null",
    ),
}
"""Overrides of the configuration; all of them see the same tokens, BTX more, for which MIXTURES stands."""


@dataclass(frozen=True)
class Arm:
    """A line of the table: a model or a way of merging of a run, by its label there."""

    name: str
    run: str
    label: str


DENSE = Arm("dense, all domains", "domains", "twin")
ARMS = (
    DENSE,
    Arm("random shares, ensemble", "random 8", "ensemble"),
    Arm("BTM ensemble, uniform prior", "domains", "ensemble"),
    Arm("BTM ensemble, cached prior", "domains", "ensemble, prior cached"),
    Arm("BTM ensemble, cached prior, top 2", "domains", "ensemble, prior cached, top_k 2"),
    Arm("BTM average, uniform", "domains", "average"),
    Arm("BTM average, cached prior", "domains", "average, weights cached"),
    Arm("c-BTM, 8 clusters", "clusters 8", "clusters"),
    Arm("c-BTM, 8 clusters, top 2", "clusters 8", "clusters, top_k 2"),
    Arm("c-BTM, 4 clusters", "clusters 4", "clusters"),
    Arm("4 random shares, ensemble", "random 4", "ensemble"),
    Arm("BTX, Top-2", "domains", "btx top_k"),
    Arm("BTX, Top-2, a half more", "domains", "btx top_k, share 0.5"),
    Arm("BTX, COMET", "domains", "btx comet, max_active 2"),
    Arm("BTX, COMET, a half more", "domains", "btx comet, max_active 2, share 0.5"),
    Arm("mixture from scratch, Top-2", "mixture", "seed"),
    *(
        Arm(f"seed share {share} %, ensemble, cached prior", f"seed {share}", "ensemble, prior cached")
        for share in (0, 25, 75)
    ),
)
EXPECTED = (
    "Expected before (the papers' order): BTM ensemble with the cached prior < dense < random shares; the uniform "
    "average worst, the one weighted by the cached prior between; clusters better than random shares."
)


Reports = Mapping[tuple[str, int], dict[str, Any]]
"""Evaluations of forests by run and seed."""


def main() -> None:
    options = parse()
    every = [(name, seed) for seed in range(options.seeds) for name in options.only]
    train_all((study_run(*each, options) for each in every), options.at_once)
    reports = {each: read_json(study_run(*each, options).directory / FOLDER / REPORT) for each in every}
    write_report(options.report, page(reports, options), partial(draw, reports, options))


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, "forest_study", "results/branch_train_merge")
    parser.add_argument("--config", type=Path, default=Path("configs/btm_small.yaml"))
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help="of the runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, for all runs alike")
    return parser.parse_args()


def study_run(name: str, seed: int, options: argparse.Namespace) -> ForestRun:
    steps = load_config(options.config, options.overrides).train.max_steps
    own = (override.replace("MIXTURES", _mixtures(steps)) for override in RUNS[name])
    overrides = (*options.overrides, *own, f"seed={seed}")
    return ForestRun(options.runs / directory_name(name, f"seed{seed}"), options.config, overrides)


class ForestRun(StudyRun):
    """A forest, which has an evaluation where another run has a summary."""

    @property
    def result(self) -> Path:
        """The file whose presence means that the run is complete."""
        return self.directory / FOLDER / REPORT


def bits(arm: Arm, seed: int, domains: str, reports: Reports) -> float:
    """Return the bits per byte of an arm."""
    return float(reports[arm.run, seed]["bits_per_byte"][arm.label][domains])


def page(reports: Reports, options: argparse.Namespace) -> str:
    """Return the table, a line for each arm whose run there is."""
    lines = [
        "# Experts trained apart, used together",
        "",
        f"`{command_given()}`: {options.seeds} seeds, test part, bits per byte; mean ± standard deviation over seeds. "
        f"In brackets: the mean difference to the line '{DENSE.name}', seed by seed, and its 95 % interval (Student), "
        "* where it does not contain 0. Experts: whole models computed per token. MFLOPs: of the matrix products of a "
        "token's forward pass, experts per token as measured, of the first seed. All lines have seen the same "
        f"training tokens, BTX a tenth more unless a half is said. {machine()}.",
        "",
        EXPECTED,
        "",
        f"| | {TRAINED_ON} | {HELD_OUT} | experts | MFLOPs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm in arms_of(options):
        cells = [quality_cell(arm, domains, reports, options) for domains in (TRAINED_ON, HELD_OUT)]
        active, flops = (of_arm(arm, what, reports) for what in ("experts_per_token", "flops_per_token"))
        lines.append(f"| {arm.name} | {' | '.join(cells)} | {active:.1f} | {flops / 1e6:.2f} |")
    return "\n".join([*lines, "", "![bits per byte by way of using the experts](figure.png)", ""])


def arms_of(options: argparse.Namespace) -> list[Arm]:
    return [arm for arm in ARMS if arm.run in options.only]


def of_arm(arm: Arm, what: str, reports: Reports) -> float:
    """Return a number of an arm in the report on the first seed, by its name there."""
    return float(reports[arm.run, 0][what][arm.label])


def quality_cell(arm: Arm, domains: str, reports: Reports, options: argparse.Namespace) -> str:
    """Return the bits per byte of an arm beside those of the dense run, if that is another and was asked for."""
    own, dense = (
        [bits(each, seed, domains, reports) for seed in range(options.seeds)] if each.run in options.only else None
        for each in (arm, DENSE)
    )
    assert own is not None
    return beside(own, None if arm == DENSE else dense)


def draw(reports: Reports, options: argparse.Namespace, path: Path) -> None:
    """A line for each arm, a mark for each seed; domains that were trained on and held out side by side."""
    arms = arms_of(options)
    figure = Figure(figsize=(11.0, 0.36 * len(arms) + 1.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, domains in zip(figure.subplots(1, 2, sharey=True), (TRAINED_ON, HELD_OUT), strict=True):
        for place, arm in enumerate(arms):
            values = [bits(arm, seed, domains, reports) for seed in range(options.seeds)]
            axes.plot(values, [place] * len(values), "o", color="#0072B2", ms=4)
        if DENSE in arms:
            dense = [bits(DENSE, seed, domains, reports) for seed in range(options.seeds)]
            axes.axvline(float(np.mean(dense)), color="#D55E00", lw=1)
        axes.set(xlabel=f"bits per byte, {domains}", ylim=(len(arms) - 0.5, -0.5))
        axes.set_yticks(range(len(arms)), [arm.name for arm in arms], fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    canvas.print_figure(path, dpi=130)


if __name__ == "__main__":
    main()
