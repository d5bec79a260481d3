"""How well can experts be placed? Log-normal popularity of a given max-violation, before and after the search.

    python tools/placement_study.py --report results/placement.md

draws the popularity of E experts from a log-normal distribution whose sigma, found by bisection, gives
max-violation (load of the hottest expert over the mean, minus 1) 0.2, 1 or 4; places them on R ranks in the
order of their ids, then by ``dist_moe.search.choose_placement``; and writes a Markdown table: load of the
heaviest rank over the mean before and after, what no placement can beat, experts that moved and the bytes of
their state. Medians, and the worst, over the seeds. Pure arithmetic: the figures are the same on any machine.
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


def study(experts: int, ranks: int, violation: float, seeds: int) -> list[PlacementChoice]:
    identity = Placement.identity(experts, ranks)
    return [choose_placement(log_normal_load(experts, violation, seed), identity) for seed in range(seeds)]


def row(experts: int, ranks: int, violation: float, choices: list[PlacementChoice]) -> str:
    before, after, simple, bound = (
        [getattr(choice, name) for choice in choices] for name in ("before", "after", "simple_bound", "bound")
    )
    over = [a / b for a, b in zip(after, bound, strict=True)]
    moved = [len(choice.moved) for choice in choices]
    return (
        f"| {violation} | {experts} | {ranks} | {median(before):.3f} ({max(before):.3f}) | {median(after):.3f} "
        f"({max(after):.3f}) | {median(simple):.3f} | {median(bound):.3f} | {median(over):.4f} ({max(over):.4f}) "
        f"| {median(moved):g} | {median(moved) * STATE_BYTES / 1e6:.1f} |"
    )


def table(seeds: int) -> str:
    head = (
        "| max-violation | experts | ranks | max/mean before (worst) | after (worst) | max(1, s_max R) | bound | "
        "after / bound (worst) | experts moved | MB moved |"
    )
    cells = [(violation, experts, ranks) for violation in VIOLATIONS for experts in EXPERTS for ranks in RANKS]
    rows = [
        row(experts, ranks, violation, study(experts, ranks, violation, seeds)) for violation, experts, ranks in cells
    ]
    return "\n".join([head, "|" + " --- |" * 10, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("results/placement.md"))
    parser.add_argument("--seeds", type=int, default=20, help="popularities drawn per row, seeds 0, 1, ...")
    options = parser.parse_args()
    options.report.write_text(page(options.seeds))
    print(options.report.read_text())


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
placement is proven the best. Bytes: fp32 masters and Adam's two moments of the experts that change their rank, of
the paper's recommender ({WIDTH} x {HIDDEN} weights and a bias each), {STATE_BYTES / 1e6:.2f} MB an expert.
"""


if __name__ == "__main__":
    main()
