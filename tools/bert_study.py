"""COMET-BERT against MoEBERT: one teacher and one converted start per task and seed, students that differ in the gate.

    python tools/bert_study.py --report results/comet_bert

fine-tunes a dense MiniLM on every task, converts its feed-forward networks as the configuration says, distils every
student below, each with several seeds, and writes DIR/table.md and DIR/figure.png: mean and standard deviation over
seeds of the test figures. Then it compares the orders in which MoEBERT's conversion may prefer neurons, before any
training and after it, on ``--orders`` tasks. Runs that are complete are not trained again; the command can be stopped
and given again. Of students it keeps the figures, not the weights, which would be 0.3 GB each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dist_moe.data.labelled_text import TASKS
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.sweeps.paired import paired_difference
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

STUDIED = (
    "sentiment-movies",
    "sentiment-products",
    "sentiment-editorials",
    "sentiment-tweets",
    "trec",
    "20-newsgroups",
    "sms-spam",
)
DENSE = ("model.moe_every=0", "model.permutation=null")
TEACHER = (*DENSE, "start.run=null", "recipe.name=supervised")
HASH, BALANCED_HASH, TOP_1, COMET = "hash, random (MoEBERT)", "hash, balanced (MoEBERT)", "Top-1", "COMET"
SINKHORN, SWAPS = "COMET+, Sinkhorn", "COMET+, swaps"
STUDENTS: dict[str, tuple[str, ...]] = {
    # What a token meets of a dense student is as wide as an expert.
    "dense student": (*DENSE, "model.hidden=384"),
    HASH: ("model.gate={{name: hash, seed: {seed}}}",),
    BALANCED_HASH: ("model.gate={{name: hash, assignment: balanced}}",),
    TOP_1: ("model.gate={{name: top_k, k: 1, scores: softmax_before, balance_weight: 0.01}}",),
    COMET: (),
    # The gate is COMET's; how long they search is counted in epochs, which differ from task to task.
    SINKHORN: ("model.permutation={{epochs: {search_epochs}, schedule: paper}}",),
    SWAPS: (
        "swap_search={{every_epochs: {search_epochs}, until_epoch: {search_epochs}, examples: 64, batch_size: 64, "
        "max_verified: 64, verified_per_round: 6}}",
    ),
}
SEARCH_STEPS = 20
"""Training steps of the permutation search, and those after which swaps are searched, once."""
ORDERS = ("importance", "random", "inverse")
UNTRAINED = (
    "recipe.name=supervised",
    "train.max_steps=1",
    "deepspeed.scheduler=null",
    "deepspeed.optimizer.params.lr=0",
)


@dataclass(frozen=True)
class Study:
    """The runs of ``tasks`` x ``seeds``; ``common`` overrides hold for all of them, ``of_teachers`` for teachers.

    ``ordered``: the tasks on which orders of neurons are compared.
    """

    config: Path
    root: Path
    tasks: tuple[str, ...]
    ordered: tuple[str, ...]
    seeds: int
    common: tuple[str, ...]
    of_teachers: tuple[str, ...]

    def train(self, at_once: int) -> None:
        for seed in range(self.seeds):
            train_all((self.teacher(task, seed) for task in self.tasks), at_once)
            students = (self.student(task, seed, name) for task in self.tasks for name in STUDENTS)
            train_all(students, at_once, keep_weights=False)
        orders = (run for seed in range(self.seeds) for task in self.ordered for run in self._of_orders(task, seed))
        train_all(orders, at_once, keep_weights=False)

    def teacher(self, task: str, seed: int) -> StudyRun:
        return self._run(task, seed, "teacher", (*TEACHER, *self.of_teachers))

    def student(self, task: str, seed: int, name: str) -> StudyRun:
        return self._run(task, seed, name, (*self._taught(task, seed), *self._of_student(task, seed, name)))

    def converted(self, task: str, seed: int, order: str) -> StudyRun:
        """A hash student in which ``order`` chose the neurons, not trained."""
        overrides = (*self._ordered(task, seed, order), *UNTRAINED)
        return self._run(task, seed, f"{order} neurons untrained", overrides)

    def distilled(self, task: str, seed: int, order: str) -> StudyRun:
        """Return the command that trains the student, distilled."""
        if order == ORDERS[0]:
            return self.student(task, seed, HASH)
        return self._run(task, seed, f"{order} neurons", self._ordered(task, seed, order))

    def figure(self, run: StudyRun, task: str) -> float:
        """The task's main figure on the test part, in percent."""
        return 100 * float(run.summary["test"][TASKS[task].metrics[0]])

    def _of_orders(self, task: str, seed: int) -> Iterator[StudyRun]:
        yield from (self.converted(task, seed, order) for order in ORDERS)
        yield from (self.distilled(task, seed, order) for order in ORDERS[1:])

    def _taught(self, task: str, seed: int) -> tuple[str, ...]:
        teacher = self.teacher(task, seed).directory
        return (f"start.run={teacher}", "recipe.name=moebert", f"recipe.teacher={teacher}")

    def _ordered(self, task: str, seed: int, order: str) -> tuple[str, ...]:
        conversion = (f"start.conversion.order={order}", f"start.conversion.seed={seed}")
        return (*self._taught(task, seed), *self._of_student(task, seed, HASH), *conversion)

    def _of_student(self, task: str, seed: int, name: str) -> tuple[str, ...]:
        epochs = SEARCH_STEPS / self._steps_per_epoch(task, seed) if name in (SINKHORN, SWAPS) else None
        return tuple(override.format(seed=seed, search_epochs=epochs) for override in STUDENTS[name])

    def _steps_per_epoch(self, task: str, seed: int) -> int:
        """Read a number as the teacher's first step tells it."""
        with RunDirectory(self.teacher(task, seed).directory).metrics.open(encoding="utf-8") as records:
            return round(1 / json.loads(next(records))["epoch"])

    def _run(self, task: str, seed: int, name: str, overrides: tuple[str, ...]) -> StudyRun:
        named = (f"data.name={task}", f"seed={seed}", *self.common, *overrides)
        return StudyRun(self.root / directory_name(task, name, f"seed{seed}"), self.config, named)


def main() -> None:
    options = parse()
    study = Study(
        options.config,
        options.runs,
        tuple(options.tasks),
        tuple(options.orders),
        options.seeds,
        tuple(options.overrides),
        tuple(options.teacher),
    )
    study.train(options.at_once)
    write_report(options.report, page(study), partial(draw, study))


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, "bert_study", "results/comet_bert")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, for all runs alike")
    parser.add_argument("--config", type=Path, default=Path("configs/comet_bert.yaml"))
    parser.add_argument("--teacher", nargs="*", default=[], metavar="key=value", help="for teachers alone")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(STUDIED), metavar="NAME")
    parser.add_argument("--orders", nargs="*", choices=TASKS, metavar="NAME", help="of --tasks; all")
    options = parser.parse_args()
    if options.orders is None:
        options.orders = options.tasks
    if unknown := set(options.orders) - set(options.tasks):
        parser.error(f"--orders {' '.join(sorted(unknown))}: not among --tasks {' '.join(options.tasks)}")
    return options


def page(study: Study) -> str:
    lines = [
        "# COMET-BERT against MoEBERT",
        "",
        f"`{command_given()}`: {study.seeds} seed(s) each, test part, in percent; "
        f"mean ± standard deviation over seeds. {machine()}.",
        "",
        *students_table(study),
        "",
        *verdicts(study),
        "",
        "![the same as a picture](figure.png)",
        "",
        *(orders_section(study) if study.ordered else ()),
    ]
    return "\n".join(lines)


def students_table(study: Study) -> Iterator[str]:
    yield (
        "| model | "
        + " | ".join(f"{task} ({TASKS[task].metrics[0]})" for task in study.tasks)
        + " | experts per token |"
    )
    yield "| --- |" + " --- |" * (len(study.tasks) + 1)
    for name in ("teacher", *STUDENTS):
        cells = [spread(figures(study, task, name), 1) for task in study.tasks]
        yield f"| {name} | " + " | ".join([*cells, experts_per_token(study, name)]) + " |"


def figures(study: Study, task: str, name: str) -> list[float]:
    return [study.figure(run_of(study, task, seed, name), task) for seed in range(study.seeds)]


def run_of(study: Study, task: str, seed: int, name: str) -> StudyRun:
    return study.teacher(task, seed) if name == "teacher" else study.student(task, seed, name)


def experts_per_token(study: Study, name: str) -> str:
    """Return the metrics of the test part; the mean over all tasks and seeds."""
    runs = [run_of(study, task, seed, name) for task in study.tasks for seed in range(study.seeds)]
    return f"{statistics.mean(run.summary['test']['active_experts'] for run in runs):.2f}"


def verdicts(study: Study) -> Iterator[str]:
    """Return by how much each COMET is ahead of MoEBERT on each task, seed by seed, beside what the paper says."""
    yield "The paper (GLUE, BERT-base, 100 trials of hyper-parameters): COMET-BERT is better on 5 of 7."
    if study.seeds < 2:
        return
    yield ""
    yield "Paired differences of equal seeds, mean and 95 % interval (Student's); * where it does not contain 0:"
    yield ""
    yield "| difference | " + " | ".join(study.tasks) + " |"
    yield "| --- |" + " --- |" * len(study.tasks)
    for ours in (COMET, SINKHORN, SWAPS):
        for theirs in (HASH, BALANCED_HASH):
            cells = [difference(study, task, ours, theirs) for task in study.tasks]
            yield f"| {ours}, less {theirs} | " + " | ".join(cells) + " |"


def difference(study: Study, task: str, ours: str, theirs: str) -> str:
    found = paired_difference(*(np.array(figures(study, task, name)) for name in (ours, theirs)))
    star = "" if found.verdict == "within" else " *"
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f}){star}"


def orders_section(study: Study) -> Iterator[str]:
    yield from ("## Which neurons the experts take", "")
    yield (
        "Hash students whose conversion prefers the most important neurons, random ones, or the least important; "
        "before any training and after distillation."
    )
    yield from ("", *orders_table(study), "")


def orders_table(study: Study) -> Iterator[str]:
    yield "| order | " + " | ".join(f"{task}: before, after" for task in study.ordered) + " |"
    yield "| --- |" + " --- |" * len(study.ordered)
    for order in ORDERS:
        yield f"| {order} | " + " | ".join(before_and_after(study, task, order) for task in study.ordered) + " |"


def before_and_after(study: Study, task: str, order: str) -> str:
    stages = (study.converted, study.distilled)
    numbers = [[study.figure(stage(task, seed, order), task) for seed in range(study.seeds)] for stage in stages]
    return ", ".join(spread(of_stage, 1) for of_stage in numbers)


def draw(study: Study, path: Path) -> None:
    """A group of marks per task, one for each model; bars of a standard deviation."""
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(ylabel="test figure, in percent")
    names = ("teacher", *STUDENTS)
    for number, name in enumerate(names):
        of_tasks = [figures(study, task, name) for task in study.tasks]
        places = [i + (number - len(names) / 2) / (1.4 * len(names)) for i in range(len(study.tasks))]
        means = [statistics.mean(f) for f in of_tasks]
        bars = [statistics.stdev(f) if len(f) > 1 else 0.0 for f in of_tasks]
        axes.errorbar(places, means, yerr=bars, marker="o", markersize=4, linestyle="none", capsize=2, label=name)
    axes.set_xticks(range(len(study.tasks)), [f"{task}\n{TASKS[task].metrics[0]}" for task in study.tasks], fontsize=8)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    canvas.print_figure(path, dpi=150)


if __name__ == "__main__":
    main()
