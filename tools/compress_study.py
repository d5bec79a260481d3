"""Merged, pruned and compressed mixtures beside each other: quality, parameters, FLOPs and time, seed by seed.

    python tools/compress_study.py --report results/compress

trains each base model with several seeds, makes runs with fewer experts of it by every method below at every share of
the experts, without and with recovery of equal budget, and writes DIR/table.md and DIR/figure.png. Differences to
M-SMoE are of the same seed, with Student's interval at 95 %. FLOPs are those of the matrix products, as torch counts
them while test examples pass (all but attention's of queries and keys); times are of the same passes, measured by turns
with the base model. Runs that are complete are not made again; the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from dist_moe.config.files import parse_json, read_json, write_json
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.models import MoEModel
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.supervised.runs import find_weights, trained_model
from dist_moe.tasks import Task
from tools.studies import (
    StudyRun,
    beside,
    command_given,
    directory_name,
    dist_moe,
    machine,
    spread,
    study_parser,
    train_all,
    write_report,
)

_LM = (
    *("model.gate={name: top_k, k: 2, balance_weight: 0.01}", "model.permutation=null"),
    *("model.layers=2", "model.moe_every=1", "data.sequence_length=128"),
    *("train.batch_size=16", "train.epochs=0.55", "train.validate_every=200"),  # 400 steps
)
_TASK = "data.name=trec"


def _recovery(steps: int, lr: float) -> tuple[str, ...]:
    """Return overrides of a recovery of a twentieth, or a quarter, of the training's steps."""
    warmed = {"total_num_steps": steps, "warmup_num_steps": steps // 8, "warmup_max_lr": lr, "warmup_type": "linear"}
    schedule = {"type": "WarmupDecayLR", "params": warmed}
    return (f"train.max_steps={steps}", f"deepspeed.optimizer.params.lr={lr}", f"deepspeed.scheduler={schedule}")


@dataclass(frozen=True)
class Base:
    """A model to compress. ``metric``: of its test, ``scale`` times as large in the table; ``sign``: 1 if less is
    better, -1 if more is. ``recovery``: overrides of the training that follows. ``dense``: overrides of a dense
    run that comes before, from which it is converted and by which it is taught."""

    config: str
    overrides: tuple[str, ...]
    experts: int
    metric: str
    sign: int
    recovery: tuple[str, ...]
    scale: float = 1.0
    dense: tuple[str, ...] = ()


BASES = {
    "language model, 8 experts": Base(
        "configs/lm_small.yaml", (*_LM, "model.num_experts=8"), 8, "bits_per_byte", 1, _recovery(20, 1e-3)
    ),
    "language model, 32 experts": Base(
        "configs/lm_small.yaml", (*_LM, "model.num_experts=32"), 32, "bits_per_byte", 1, _recovery(20, 1e-3)
    ),
    "BERT, 8 experts": Base(
        "configs/comet_bert.yaml",
        (_TASK, "model.num_experts=8", "model.gate={name: top_k, k: 2, balance_weight: 0.01}"),
        8,
        "accuracy",
        -1,
        _recovery(25, 5e-5),
        scale=100.0,
        dense=(_TASK, "model.moe_every=0", "model.permutation=null", "start.run=null", "recipe.name=supervised"),
    ),
}
FIRST = "M-SMoE (router logits)"
LOW_RANK = "MC-SMoE"
METHODS: dict[str, tuple[str, ...]] = {
    "random groups": ("method=random",),
    "uniform mean, not aligned": ("method=uniform", "align=none"),
    "uniform mean, aligned": ("method=uniform",),
    "usage pruning": ("method=prune_usage",),
    "REAP": ("method=reap",),
    FIRST: ("method=m_smoe",),
    "M-SMoE (expert outputs)": ("method=m_smoe", "similarity=outputs"),
    "HC-SMoE": ("method=hc_smoe",),
    LOW_RANK: ("method=m_smoe",),
}
FACTORED = ("recover=null", "compress.rank=16", "compress.remaining=0.1")
"""Stages of MC-SMoE: rows are pruned while the student follows; no other training, so that the budget is the same."""
SHARES = (0.5, 0.25)


@dataclass(frozen=True)
class Cell:
    """One run with fewer experts; ``share`` 1 is the base model itself."""

    base: str
    share: float
    method: str
    recovered: bool


@dataclass(frozen=True)
class Row:
    """Numbers of one cell and seed. ``mega_flops``: per token of a forward pass; ``time``: over that of its base; with
    the number of parameters None where the row of the table has those of the run that did not recover."""

    quality: float
    parameters: int | None = None
    mega_flops: float | None = None
    time: float | None = None


def main() -> None:
    options = parse()
    seeds = range(options.seeds)
    for wanted in ("dense", "base"):
        runs = (run for seed in seeds for name in options.bases if (run := trained(wanted, name, seed, options)))
        train_all(runs, options.at_once)
    cells = list(all_cells(options))
    todo = [(cell, seed) for seed in seeds for cell in cells]
    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(lambda each: make(*each, options), todo))
    rows = {(cell, seed): row_of(cell, seed, options) for cell, seed in todo}  # times: nothing else runs meanwhile
    write_report(options.report, page(cells, rows, options), partial(draw, cells, rows, options))


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, "compress_study", "results/compress")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), metavar="NAME")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), metavar="X", help="of the experts")
    parser.add_argument(
        "--recovered", nargs="*", type=float, metavar="X", help="shares at which they recover, too (default: all)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    options = parser.parse_args()
    options.recovered = options.shares if options.recovered is None else options.recovered
    return options


def trained(wanted: str, name: str, seed: int, options: argparse.Namespace) -> StudyRun | None:
    """Return the base model's run, or that of the dense model before it, None if there is none."""
    base, directory = BASES[name], options.runs / directory_name(name, wanted, f"seed{seed}")
    if wanted == "dense":
        overrides = (*base.dense, f"seed={seed}")
        return StudyRun(directory, Path(base.config), overrides) if base.dense else None
    overrides = (*base.overrides, f"seed={seed}")
    if dense := trained("dense", name, seed, options):
        overrides = (*overrides, f"start.run={dense.directory}", f"recipe.teacher={dense.directory}")
    return StudyRun(directory, Path(base.config), overrides)


def all_cells(options: argparse.Namespace) -> Iterator[Cell]:
    for name in options.bases:
        yield from (Cell(name, 1.0, "as trained", recovered) for recovered in (False, True))
        for share in options.shares:
            for recovered in (False, True) if share in options.recovered else (False,):
                made = (method for method in options.methods if recovered or method != LOW_RANK)
                yield from (Cell(name, share, method, recovered) for method in made)


def run_directory(cell: Cell, seed: int, options: argparse.Namespace) -> Path:
    if cell.share == 1.0 and not cell.recovered:
        run = trained("base", cell.base, seed, options)
        assert run is not None
        return run.directory
    recovered = "recovered" if cell.recovered else "merged"
    name = directory_name(cell.base, cell.method, f"{cell.share:.0%}", recovered, f"seed{seed}")
    directory: Path = options.runs / name
    return directory


def make(cell: Cell, seed: int, options: argparse.Namespace) -> None:
    """Compress, and evaluate, unless that has been done."""
    directory = run_directory(cell, seed, options)
    result = directory / "study.json"
    if result.is_file():
        return
    base = BASES[cell.base]
    source = run_directory(Cell(cell.base, 1.0, "as trained", False), seed, options)
    if cell.share < 1.0:
        words = ["--experts", round(cell.share * base.experts), f"seed={seed}", *METHODS[cell.method]]
        if cell.recovered:
            words += ["--recover", *(FACTORED if cell.method == LOW_RANK else ()), *base.recovery]
        dist_moe("compress", source, directory, *words)
    elif cell.recovered:  # trained as long as the others are, following itself
        recipe = {"name": "merge_compress", "source": str(source.resolve())}
        write_json(directory.with_suffix(".yaml"), {"recipe": recipe})
        dist_moe("train", directory.with_suffix(".yaml"), *base.recovery, "--run-dir", directory, "--auto-resume")
    found = RunDirectory(directory / "stages" / "recover").result  # which tells what was evaluated at its end
    told = read_json(found) if found.is_file() else parse_json(dist_moe("evaluate", directory, "--json"))
    write_json(result, {"quality": base.scale * told["test"][base.metric]})
    print(f"{directory}: {told['test'][base.metric]:.4f}", flush=True)


def row_of(cell: Cell, seed: int, options: argparse.Namespace) -> Row:
    """Return the numbers of a cell; its model is measured beside that of its base."""
    directory = run_directory(cell, seed, options)
    quality, measured = read_json(directory / "study.json"), directory / "measured.json"
    if cell.recovered and cell.method != LOW_RANK:
        return Row(**quality)
    if not measured.is_file():
        source = run_directory(Cell(cell.base, 1.0, "as trained", False), seed, options)
        task = task_of(source)
        model, base = (trained_model(path, task, SingleWorld()) for path in (directory, source))
        numbers = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "mega_flops": mega_flops(task, model),
            "time": time_ratio(task, model, base),
        }
        write_json(measured, numbers)
    return Row(**quality, **read_json(measured))


@cache
def task_of(source: Path) -> Task:
    """Return the data that a base model was trained on, which its cells share."""
    return find_weights(source).config.data.open(progress=False)


@torch.no_grad()
def mega_flops(task: Task, model: MoEModel) -> float:
    """Return the FLOPs of a token's forward pass over test examples, in millions."""
    inputs, tokens = some_examples(task)
    with FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    return counter.get_total_flops() / tokens / 1e6


@torch.no_grad()
def time_ratio(task: Task, model: MoEModel, base: MoEModel, rounds: int = 3) -> float:
    """Return the median, over pairs of passes that follow each other, of a pass's time over the base model's."""
    inputs, _ = some_examples(task)
    ratios = []
    for turn in range(2 * rounds):
        first, second = (seconds(each, inputs) for each in ((model, base) if turn % 2 else (base, model)))
        ratios.append(first / second if turn % 2 else second / first)
    return statistics.median(ratios)


def seconds(model: MoEModel, inputs: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    model.eval()(*inputs)
    return time.perf_counter() - start


def some_examples(task: Task, examples: int = 8) -> tuple[tuple[Any, ...], int]:
    """Return inputs of the first test examples, and how many positions they have."""
    rows_B = np.arange(min(examples, len(task.test)))
    batch = task.test.batch(rows_B, rows_B)
    return batch.inputs, batch.inputs[0].numel()


Rows = dict[tuple[Cell, int], Row]


def page(cells: Sequence[Cell], rows: Rows, options: argparse.Namespace) -> str:
    """Return the tables, one for each base model and share."""
    lines = [
        "# Fewer experts: merged, pruned, recovered",
        "",
        f"`{command_given()}`: {options.seeds} seeds, test part; mean ± standard deviation over seeds. In brackets: "
        f"the mean difference to {FIRST} of the same kind, seed by seed, and its 95 % interval (Student's); * where it "
        "does not contain 0, which among so many is expected to happen by chance at times. MFLOPs of a token's forward "
        "pass, as counted, and its time over the base model's, by turns, are of the run that did not recover if there "
        "is one. "
        f"{machine()}.",
    ]
    for name in options.bases:
        base = BASES[name]
        of_base, on = (
            [rows[Cell(name, 1.0, "as trained", recovered), seed] for seed in range(options.seeds)]
            for recovered in (False, True)
        )
        unit = f"{base.metric}{', percent' if base.scale == 100 else ''}"
        lines += [
            "",
            f"## {name} ({unit}; {'less' if base.sign > 0 else 'more'} is better)",
            "",
            f"As trained: {spread([row.quality for row in of_base], 4)}; trained on, as long as the others recover: "
            f"{spread([row.quality for row in on], 4)}. {of_base[0].parameters:,} parameters, "
            f"{statistics.mean(row.mega_flops for row in of_base):.2f} MFLOPs.",
        ]
        for share in options.shares:
            lines += ["", *share_table(name, share, cells, rows, options)]
    return "\n".join([*lines, "", "![quality by method](figure.png)", ""])


def share_table(
    name: str, share: float, cells: Sequence[Cell], rows: Rows, options: argparse.Namespace
) -> Iterator[str]:
    yield f"| {share:.0%} of the experts | not recovered | recovered | parameters | MFLOPs | time |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for method in options.methods:
        pair = [cell for cell in cells if (cell.base, cell.share, cell.method) == (name, share, method)]
        if not pair:
            continue
        found = {cell.recovered: quality_cell(cell, rows, options) for cell in pair}
        qualities = [found.get(recovered, "") for recovered in (False, True)]  # MC-SMoE is made while it recovers
        of_first = [rows[pair[0], seed] for seed in range(options.seeds)]
        sizes = f"{statistics.mean(row.parameters for row in of_first):,.0f}"
        flops = f"{statistics.mean(row.mega_flops for row in of_first):.2f}"
        times = f"{statistics.mean(row.time for row in of_first):.2f}"
        yield f"| {method} | " + " | ".join([*qualities, sizes, flops, times]) + " |"


def quality_cell(cell: Cell, rows: Rows, options: argparse.Namespace) -> str:
    """Return the qualities of a cell beside those of M-SMoE of the same kind, if that is another."""
    first = Cell(cell.base, cell.share, FIRST, cell.recovered)
    own, others = ([rows[c, s].quality for s in range(options.seeds) if (c, s) in rows] for c in (cell, first))
    return beside(own, others if others and cell != first else None)


def draw(cells: Sequence[Cell], rows: Rows, options: argparse.Namespace, path: Path) -> None:
    """A panel per base model and share: not recovered and recovered, a mark per seed; the base model as a line."""
    figure = Figure(figsize=(5.2 * len(options.bases), 3.4 * len(options.shares)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(len(options.shares), len(options.bases), squeeze=False, sharey=True)
    for row, share in enumerate(options.shares):
        for column, name in enumerate(options.bases):
            axes = grid[row][column]
            whole = Cell(name, 1.0, "as trained", False)
            axes.axvline(statistics.mean(rows[whole, s].quality for s in range(options.seeds)), color="0.4", lw=1)
            for recovered, colour, label in ((False, "#D55E00", "not recovered"), (True, "#0072B2", "recovered")):
                points = [
                    (rows[Cell(name, share, method, recovered), seed].quality, place + (0.12 if recovered else -0.12))
                    for place, method in enumerate(options.methods)
                    for seed in range(options.seeds)
                    if (Cell(name, share, method, recovered), seed) in rows
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), "o", color=colour, ms=4, label=label)
            axes.set(title=f"{name}, {share:.0%}", xlabel=BASES[name].metric, ylim=(len(options.methods) - 0.5, -0.5))
            axes.set_yticks(range(len(options.methods)), options.methods)
            axes.grid(axis="x", alpha=0.3)
    grid[0][0].legend(frameon=False, fontsize=8)
    canvas.print_figure(path, dpi=130)


if __name__ == "__main__":
    main()
