"""How well can experts be placed? Log-normal popularity of a given max-violation, before and after the search.

    python tools/placement_study.py --report results/placement.md

draws the popularity of E experts from a log-normal distribution whose sigma, found by bisection, gives
max-violation (load of the hottest expert over the mean, minus 1) 0.2, 1 or 4; places them on R ranks in the
order of their ids, then by ``dist_moe.search.choose_placement``; and writes a Markdown table: load of the
heaviest rank over the mean before and after, what no placement can beat, experts that moved and the bytes of
their state; and the same with some slack, as a training run has it by default. Medians, and the worst, over the
seeds. Pure arithmetic: the figures are the same on any machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from dist_moe.parallel import Placement
from dist_moe.search import PlacementChoice, choose_placement

VIOLATIONS = (0.2, 1.0, 4.0)
EXPERTS = (16, 64)
RANKS = (2, 4, 8)
WIDTH, HIDDEN = 256, 256  # the paper's recommender: two embeddings of 128, experts of 256 units
SLACK = 0.01
STATE_BYTES = (WIDTH * HIDDEN + HIDDEN) * 3 * 4  # fp32 master and Adam's two moments


def log_normal_load(experts: int, violation: float, seed: int) -> NDArray[np.float64]:
    """(E,) loads with mean 1 and maximum 1 + ``violation``: exp(sigma z) with z drawn once, sigma by bisection.

    Raises ValueError unless 0 <= violation < E - 1, the most that one expert can have.
    """
    if not 0 <= violation < experts - 1:
        raise ValueError(f"violation={violation} must lie in 0..{experts - 1} for {experts} experts")
    z_E = np.random.default_rng(seed).normal(size=experts)
    low, high = 0.0, 100.0
    for _ in range(100):
        sigma = (low + high) / 2
        load_E = np.exp(sigma * (z_E - z_E.max()))
        low, high = (sigma, high) if load_E.max() / load_E.mean() < 1 + violation else (low, sigma)
    return load_E / load_E.mean()


def study(experts: int, ranks: int, violation: float, seeds: int, slack: float) -> list[PlacementChoice]:
    identity = Placement.identity(experts, ranks)
    loads = (log_normal_load(experts, violation, seed) for seed in range(seeds))
    return [choose_placement(load_E, identity, slack=slack) for load_E in loads]


def row(experts: int, ranks: int, violation: float, seeds: int) -> str:
    strict, lax = (study(experts, ranks, violation, seeds, slack) for slack in (0.0, SLACK))
    before, after, simple, bound = (
        [getattr(choice, name) for choice in strict] for name in ("before", "after", "simple_bound", "bound")
    )
    over = [a / b for a, b in zip(after, bound, strict=True)]
    return (
        f"| {violation} | {experts} | {ranks} | {median(before):.3f} ({max(before):.3f}) | {median(after):.3f} "
        f"({max(after):.3f}) | {median(simple):.3f} | {median(bound):.3f} | {median(over):.4f} ({max(over):.4f}) "
        f"| {moves(strict)} | {median(choice.after for choice in lax):.3f} | {moves(lax)} |"
    )


def moves(choices: list[PlacementChoice]) -> str:
    """Experts and megabytes."""
    moved = median(len(choice.moved) for choice in choices)
    return f"{moved:g}, {moved * STATE_BYTES / 1e6:.1f} MB"


def table(seeds: int) -> str:
    head = (
        "| max-violation | experts | ranks | max/mean before (worst) | after (worst) | max(1, s_max R) | bound | "
        f"after / bound (worst) | moved | after, slack {SLACK} | moved, slack {SLACK} |"
    )
    cells = [(violation, experts, ranks) for violation in VIOLATIONS for experts in EXPERTS for ranks in RANKS]
    rows = [row(experts, ranks, violation, seeds) for violation, experts, ranks in cells]
    return "\n".join([head, "|" + " --- |" * 11, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("results/placement.md"))
    parser.add_argument("--seeds", type=int, default=20, help="popularities drawn per row, seeds 0, 1, ...")
    options = parser.parse_args()
    options.report.write_text(page(options.seeds), encoding="utf-8")
    print(options.report.read_text(encoding="utf-8"))


def page(seeds: int) -> str:
    return f"""# How well can experts be placed?

`python tools/placement_study.py --seeds {seeds}`: popularity drawn from a log-normal distribution, sigma by
bisection so that the hottest expert has (1 + max-violation) times the mean load; experts in the order of their
ids (before) and where `dist_moe.search.choose_placement` puts them (after). Medians over seeds 0 to {seeds - 1},
the worst of them in brackets. Pure arithmetic: the figures do not depend on the machine.

{table(seeds)}

max/mean: load of the heaviest rank over the mean of the ranks; the expert part of a step takes that many times as
long as with equal ranks. s_max: the share of the hottest expert. "bound": what no placement with the same number
of experts on every rank can beat (`dist_moe/search/placement.py` says why); where "after / bound" is 1, the
placement is proven the best. "slack {SLACK}": the heaviest rank may be {SLACK:.0%} of the mean heavier than need be,
for fewer moves (`placement.slack`, whose default this is). Moved: experts that change their rank, and the bytes of
their fp32 masters and Adam's two moments in the paper's recommender
({WIDTH} x {HIDDEN} weights and a bias each), {STATE_BYTES / 1e6:.2f} MB an expert.
"""


if __name__ == "__main__":
    main()
