"""The clock of branches: two experts trained apart on two cores, against one dense run on two ranks.

    python tools/branch_clock_study.py --report results/branch_clock.md

trains, several times over, a forest of two domains on two ranks, and after it its dense twin on the same two. A branch
is a rank of its own and sends nothing; the twin's ranks sum their gradients at every step. Models and batches of a rank
are of one size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dist_moe.recipes.branch_train_merge.training import TWIN, stage_of
from dist_moe.report.runs import read_run
from tools.studies import command_given, dist_moe, machine

DOMAINS = ("learned", "belles_lettres")
SKIPPED = 3
"""Steps at the beginning of a stage that do not count."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--config", type=Path, default=Path("configs/btm_small.yaml"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="of the whole budget, half of them the seed's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    options = parser.parse_args()
    speeds = [examples_per_second(options) for _ in range(options.rounds)]
    page = table(speeds)
    print(page)
    if options.report is not None:
        options.report.write_text(page, encoding="utf-8")


def examples_per_second(options: argparse.Namespace) -> tuple[float, float]:
    """Return the examples per second of both branches together, and of the twin: medians over steps."""
    budget = (f"train.max_steps={options.steps}", "recipe.merge=[ensemble]", "recipe.twin=true", "train.log_every=1")
    domains = f"recipe.partition={{name: provenance, domains: [{', '.join(DOMAINS)}]}}"
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        dist_moe("train", "--emulate", 2, options.config, domains, *budget, *options.overrides, "--run-dir", run)
        curves = {stage.root.name: stage.curves for stage in read_run(run).stages}
    of_branches, of_twin = (
        [statistics.median(curves[name]["examples_per_second"].value_N[SKIPPED:]) for name in names]
        for names in (map(stage_of, DOMAINS), [TWIN])
    )
    return sum(of_branches), sum(of_twin)


def table(speeds: list[tuple[float, float]]) -> str:
    ratios = sorted(branches / twin for branches, twin in speeds)
    lines = [
        "# The clock of branches",
        "",
        f"`{command_given()}`, seed 0: examples per second of two branches on two ranks, over those of the dense run "
        "on the same two, which sums its gradients at every step (gloo, within this machine); medians over steps, by "
        f"turns. {machine()}.",
        "",
        "| round | branches / dense |",
        "| --- | --- |",
        *(f"| {number} | {branches / twin:.2f} |" for number, (branches, twin) in enumerate(speeds, 1)),
        "",
        f"Median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
