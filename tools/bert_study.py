"""COMET-BERT against MoEBERT: one teacher and one converted start per task and seed, students that differ in the gate.

    python tools/bert_study.py --report results/comet_bert

fine-tunes a dense MiniLM on every task, converts its feed-forward networks as the configuration says, distils every
student below, each with several seeds, and writes DIR/table.md and DIR/figure.png: mean and standard deviation over
seeds of the test figures. Then it compares the orders in which MoEBERT's conversion may prefer neurons, before any
training and after it. Runs that are complete are not trained again; the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dist_moe.data.labelled_text import TASKS
from tools.studies import StudyRun, directory_name, spread, train_all

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
TEACHER = (*DENSE, "start.run=null", "distillation=null")
HASH, BALANCED_HASH, TOP_1, COMET = "hash, random (MoEBERT)", "hash, balanced (MoEBERT)", "Top-1", "COMET"
SINKHORN, SWAPS = "COMET+, Sinkhorn", "COMET+, swaps"
STUDENTS: dict[str, tuple[str, ...]] = {
    # What a token meets of a dense student is as wide as an expert.
    "dense student": (*DENSE, "model.hidden=384"),
    HASH: ("model.gate={name: hash}",),
    BALANCED_HASH: ("model.gate={name: hash, assignment: balanced}",),
    TOP_1: ("model.gate={name: top_k, k: 1, scores: softmax_before, balance_weight: 0.01}",),
    COMET: (),
    SINKHORN: ("model.permutation={epochs: 0.1}",),
    SWAPS: (
        "swap_search={every_epochs: 0.2, until_epoch: 0.2, examples: 64, batch_size: 64, max_verified: 64, "
        "verified_per_round: 6}",
    ),
}
ORDERS = ("importance", "random", "inverse")
UNTRAINED = ("distillation=null", "train.max_steps=1", "deepspeed.scheduler=null", "deepspeed.optimizer.params.lr=0")


@dataclass(frozen=True)
class Study:
    """The runs of ``tasks`` x ``seeds``; ``common`` overrides hold for all of them, ``of_teachers`` for teachers."""

    config: Path
    root: Path
    tasks: tuple[str, ...]
    seeds: int
    common: tuple[str, ...]
    of_teachers: tuple[str, ...]

    def train(self, at_once: int) -> None:
        for seed in range(self.seeds):
            train_all((self.teacher(task, seed) for task in self.tasks), at_once)
            train_all((run for task in self.tasks for run in self._students(task, seed)), at_once)

    def teacher(self, task: str, seed: int) -> StudyRun:
        return self._run(task, seed, "teacher", (*TEACHER, *self.of_teachers))

    def student(self, task: str, seed: int, name: str) -> StudyRun:
        return self._run(task, seed, name, (*self._taught(task, seed), *STUDENTS[name]))

    def converted(self, task: str, seed: int, order: str) -> StudyRun:
        """A hash student in which ``order`` chose the neurons, not trained."""
        overrides = (*self._ordered(task, seed, order), *UNTRAINED)
        return self._run(task, seed, f"{order} neurons untrained", overrides)

    def distilled(self, task: str, seed: int, order: str) -> StudyRun:
        """The same, distilled."""
        if order == ORDERS[0]:
            return self.student(task, seed, HASH)
        return self._run(task, seed, f"{order} neurons", self._ordered(task, seed, order))

    def figure(self, run: StudyRun, task: str) -> float:
        """The task's main figure on the test part, in percent."""
        return 100 * float(run.summary["test"][TASKS[task].metrics[0]])

    def _students(self, task: str, seed: int) -> Iterator[StudyRun]:
        yield from (self.student(task, seed, name) for name in STUDENTS)
        yield from (self.converted(task, seed, order) for order in ORDERS)
        yield from (self.distilled(task, seed, order) for order in ORDERS[1:])

    def _taught(self, task: str, seed: int) -> tuple[str, ...]:
        teacher = self.teacher(task, seed).directory
        return (f"start.run={teacher}", f"distillation.teacher={teacher}")

    def _ordered(self, task: str, seed: int, order: str) -> tuple[str, ...]:
        return (*self._taught(task, seed), *STUDENTS[HASH], f"start.conversion.order={order}")

    def _run(self, task: str, seed: int, name: str, overrides: tuple[str, ...]) -> StudyRun:
        named = (f"data.name={task}", f"seed={seed}", *self.common, *overrides)
        return StudyRun(self.root / directory_name(task, name, f"seed{seed}"), self.config, named)


def main() -> None:
    options = parse()
    study = Study(
        options.config,
        options.runs,
        tuple(options.tasks),
        options.seeds,
        tuple(options.overrides),
        tuple(options.teacher),
    )
    study.train(options.at_once)
    options.report.mkdir(parents=True, exist_ok=True)
    (options.report / "table.md").write_text(page(study, options))
    draw(study, options.report / "figure.png")
    print((options.report / "table.md").read_text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, for all runs alike")
    parser.add_argument("--config", type=Path, default=Path("configs/comet_bert.yaml"))
    parser.add_argument("--teacher", nargs="*", default=[], metavar="key=value", help="for teachers alone")
    parser.add_argument("--report", type=Path, default=Path("results/comet_bert"))
    parser.add_argument("--runs", type=Path, default=Path("runs/bert_study"), help="where the runs are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(STUDIED), metavar="NAME")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="runs side by side, a thread each")
    return parser.parse_args()


def page(study: Study, options: argparse.Namespace) -> str:
    words = [
        "python tools/bert_study.py",
        *options.overrides,
        *(["--teacher", *options.teacher] * bool(options.teacher)),
    ]
    lines = [
        "# COMET-BERT against MoEBERT",
        "",
        f"`{' '.join(words)}`: {study.seeds} seeds each, test part, in percent; mean ± standard deviation over seeds. "
        f"{os.cpu_count()} cores, torch {torch.__version__.split('+')[0]}.",
        "",
        *students_table(study),
        "",
        *verdicts(study),
        "",
        "![the same as a picture](figure.png)",
        "",
        "## Which neurons the experts take",
        "",
        "Hash students whose conversion prefers the most important neurons, random ones, or the least important; "
        "before any training and after distillation.",
        "",
        *orders_table(study),
        "",
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
    """As measured on the test part; the mean over all tasks and seeds."""
    runs = [run_of(study, task, seed, name) for task in study.tasks for seed in range(study.seeds)]
    return f"{statistics.mean(run.summary['test']['active_experts'] for run in runs):.2f}"


def verdicts(study: Study) -> Iterator[str]:
    """On how many tasks each COMET is ahead of MoEBERT, beside what the paper says."""

    def mean(task: str, name: str) -> float:
        return statistics.mean(figures(study, task, name))

    yield "The paper (GLUE, BERT-base, 100 trials of hyper-parameters): COMET-BERT is better on 5 of 7. Here, by means:"
    yield ""
    for ours in (COMET, SINKHORN, SWAPS):
        for theirs in (HASH, BALANCED_HASH):
            ahead = [task for task in study.tasks if mean(task, ours) > mean(task, theirs)]
            yield f"- {ours} is ahead of {theirs} on {len(ahead)} of {len(study.tasks)}: {', '.join(ahead) or 'none'}."


def orders_table(study: Study) -> Iterator[str]:
    yield "| order | " + " | ".join(f"{task}: before, after" for task in study.tasks) + " |"
    yield "| --- |" + " --- |" * len(study.tasks)
    for order in ORDERS:
        yield f"| {order} | " + " | ".join(before_and_after(study, task, order) for task in study.tasks) + " |"


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
