"""Which rows of a slot -> expert table do searches move, and when? Sinkhorn (paper, hot) and assignment search.

    python tools/search_trace.py --report results/search_trace

trains the small recommender (``configs/movielens_small.yaml``) for the first steps with each gate and search, and draws
how many rows of the table differ from those before the first step, step by step. The rows of a Sinkhorn search are read
off R. A trace that is kept in ``--runs`` is not computed again. Nothing is concluded about losses: see a study with
several seeds for that.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot as plt
import torch

from dist_moe.config.files import read_json, write_json
from dist_moe.engine.callbacks import Callback
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.engine.training import Trainer, fit
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.callbacks.table_search import TableSearchCallback
from dist_moe.recipes.recipe import load_config
from dist_moe.recipes.supervised.recipe import feed_of, weighted_objective
from dist_moe.search import PermutationSearch
from dist_moe.tasks import build_model
from dist_moe.tasks.task import Task
from tools.studies import command_given, directory_name, machine, study_parser, write_report

CONFIG = Path("configs/movielens_small.yaml")
STEPS = 120
GATES = {
    "Hash": "{name: hash}",
    "Top-k": "{name: top_k, k: 2}",
    "DSelect-k": "{name: dselect_k, k: 2}",
    "COMET": "{name: comet, k: 2, gamma: 1.0, entropy_weight: 0.05}",
}
SEARCHES = {
    "Sinkhorn, paper": ("model.permutation={{schedule: paper, epochs: {epochs}}}",),
    "Sinkhorn, hot": ("model.permutation={{epochs: {epochs}}}",),
    "assignment": (
        f"assignment_search={{{{every_steps: 10, until_step: {STEPS}, examples: 1024, verified_on: 1024}}}}",
    ),
}


@dataclass
class Trace(Callback):
    """Rows changed since the start after each step. ``start``: the tables' rows before the first."""

    rows: list[int] = field(default_factory=list)
    start: torch.Tensor | None = None

    def before_step(self, trainer: Trainer, step: int) -> None:
        """Keep the first table."""
        if self.start is None:
            self.start = table_of(trainer).table.clone()

    def after_step(self, trainer: Trainer, step: int) -> None:
        """Count."""
        table = table_of(trainer)
        moved = table.rows_changed() if isinstance(table, PermutationSearch) else int((table.table != self.start).sum())
        self.rows.append(moved)


def table_of(trainer: Trainer) -> Any:
    (table,) = trainer.tables.values()
    return table


def trace(task: Task, gate: str, search: str, seed: int, steps: int) -> tuple[list[int], int, float]:
    """Return the rows changed after each step, the rows, and the entropy of a row of the last P_soft (0: none)."""
    steps_per_epoch = len(task.train) // load_config(CONFIG).train.batch_size
    overrides = [one.format(epochs=(steps + 1) / steps_per_epoch) for one in SEARCHES[search]]
    common = [f"seed={seed}", f"train.max_steps={steps}", "train.patience=null", f"model.gate={GATES[gate]}"]
    config = load_config(CONFIG, [*common, *overrides])
    environment, traced = LaunchEnvironment(), Trace()
    searching = [TableSearchCallback(one, task, config.target_weights, seed) for one in config.table_searches]
    model = build_model(config, task, SingleWorld())
    with process_groups(environment, config.parallel) as groups:
        fit(
            model,
            feed_of(config, task, environment),
            weighted_objective(config, task, groups),
            config.train,
            deepspeed=config.deepspeed,
            seed=seed,
            callbacks=[*searching, traced],
            groups=groups,
            keep_model=False,
        )
    (table,) = model.tables.values()
    entropy = table.row_entropy() if isinstance(table, PermutationSearch) else 0.0
    return traced.rows, table.table.numel(), entropy


def page(traces: dict[tuple[str, str], list[tuple[list[int], int, float]]]) -> str:
    """Return the table of all gates and searches, a figure for each seed."""
    heads = "gate", "search", "rows changed in the end", "most", "first change after step", "entropy of P"
    lines = ["# Rows of a table that searches change", "", f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for (gate, search), of_seeds in traces.items():
        ends = ", ".join(f"{rows[-1]} of {count}" for rows, count, _ in of_seeds)
        peaks = ", ".join(str(max(rows)) for rows, _, _ in of_seeds)
        firsts = ", ".join(str(next((i for i, n in enumerate(rows, 1) if n), "-")) for rows, _, _ in of_seeds)
        entropies = ", ".join("-" if search == "assignment" else f"{entropy:.2f}" for *_, entropy in of_seeds)
        lines.append(f"| {gate} | {search} | {ends} | {peaks} | {firsts} | {entropies} |")
    return "\n".join(lines)


def draw(traces: dict[tuple[str, str], list[tuple[list[int], int, float]]], file: Path) -> None:
    """Draw a panel for each gate, a line for each search and seed."""
    gates = list(dict.fromkeys(gate for gate, _ in traces))
    figure, panels = plt.subplots(1, len(gates), figsize=(3.2 * len(gates), 3), sharey=True, squeeze=False)
    for panel, gate in zip(panels[0], gates, strict=True):
        for colour, search in enumerate(SEARCHES):
            for i, (rows, _, _) in enumerate(traces[gate, search]):
                panel.step(range(1, len(rows) + 1), rows, where="post", color=f"C{colour}", label=None if i else search)
        panel.set_title(gate)
        panel.set_xlabel("step")
    panels[0][0].set_ylabel("rows changed since the start")
    panels[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Trace all and write the report."""
    parser = study_parser(__doc__, "search_trace", "results/search_trace", seeds=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each run")
    options = parser.parse_args()
    task = load_config(CONFIG).data.open(progress=True)
    traces: dict[tuple[str, str], list[Any]] = {}
    for gate in GATES:
        for search in SEARCHES:
            traces[gate, search] = []
            for seed in range(options.seeds):
                kept = options.runs / f"{directory_name(gate, search, options.steps, seed)}.json"
                if not kept.exists():
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    write_json(kept, trace(task, gate, search, seed, options.steps))
                traces[gate, search].append(read_json(kept))
            print(gate, search, traces[gate, search][0][0][-1], flush=True)
    caption = (
        f"Rows of the table that differ from those before the first step, {options.steps} steps of `{CONFIG}` under "
        f"{options.seeds} seed(s); Sinkhorn's are read off R, its stage lasts as long. Assignment search every 10 "
        f"steps, on training examples. {machine()}. `{command_given()}`"
    )
    write_report(options.report, f"{page(traces)}\n\n{caption}\n", lambda file: draw(traces, file))


if __name__ == "__main__":
    main()
