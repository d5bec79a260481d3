"""The report of a sweep, from its studies alone.

trials.csv    every finished trial: what was drawn, all its metrics, why it failed
table.md      the paper's table, and the trials, or draws, that each row needs to reach each other
table.csv     the same table
budget.csv    with several to choose from: expected test loss of the chosen trial, or draw, against number and compute
budget.png    the same as a picture
pairs.csv     with several seeds: differences of all pairs of rows, seed by seed, in every metric
pairs.png     those to the first row as a picture
"""

from __future__ import annotations

import csv
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from dist_moe.errors import UserError
from dist_moe.sweeps.directory import SweepDirectory
from dist_moe.sweeps.figure import draw_budget_curves, draw_differences
from dist_moe.sweeps.paired import Differences, chosen_trials, paired_difference, reach_with_choice
from dist_moe.sweeps.plan import SweepPlan
from dist_moe.sweeps.records import TrialRecord, by_draw
from dist_moe.sweeps.runner import OBJECTIVE
from dist_moe.sweeps.statistics import LEVEL, Floats
from dist_moe.sweeps.study import Studies
from dist_moe.sweeps.summary import Rows, RowSummary, summarise, trials_to_reach

Cells = dict[str, Any]


def write_report(plan: SweepPlan, directory: SweepDirectory, studies: Studies) -> str:
    """Write all files of the report; returns the text of table.md. Raises UserError while no trial is finished."""
    rows = {row.name: studies.records(row.name) for row in plan.rows}
    if not any(rows.values()):
        raise UserError(f"no trial of {directory.root} is finished yet, so that there is nothing to report")
    draws = {name: by_draw(records, plan.sweep.seeds) for name, records in rows.items()}
    summaries = summarise(draws, plan.sweep.best_fraction, plan.sweep.seed)
    directory.report.mkdir(exist_ok=True)
    parts = [_opening(plan, rows, studies), _main_table(plan, summaries)]
    if plan.sweep.seeds > 1:
        chosen = {name: chosen_trials(records, plan.sweep.seeds) for name, records in rows.items()}
        complete = {name: trials for name, trials in chosen.items() if trials}
        differences = _differences_to_first(plan, complete)
        reach = reach_with_choice(rows, plan.sweep.seeds, plan.sweep.draws == "common", plan.sweep.seed)
        parts += _comparison(plan, complete, differences, reach)
        _write_csv(directory.report / "pairs.csv", _pair_cells(chosen))
        draw_differences(directory.report / "pairs.png", f"{plan.path.stem}: minus {next(iter(rows))}", differences)
    if plan.sweep.trials > plan.sweep.seeds:  # else nothing is chosen
        parts.append(reach_table(_unit(plan), summaries))
        _write_csv(directory.report / "budget.csv", _budget_cells(summaries))
        draw_budget_curves(directory.report / "budget.png", plan.path.stem, _unit(plan), summaries)
    text = "\n\n".join(parts) + "\n"
    (directory.report / "table.md").write_text(text, encoding="utf-8")
    _write_csv(directory.report / "table.csv", (_table_cells(summary) for summary in summaries))
    _write_csv(directory.report / "trials.csv", _trial_cells(plan, rows))
    return text


def _opening(plan: SweepPlan, rows: Rows, studies: Studies) -> str:
    sweep = plan.sweep
    environments = Counter(record.environment for records in rows.values() for record in records if record.environment)
    path = plan.path.name if plan.path.is_absolute() else plan.path
    lines = [
        f"# Sweep {plan.path.stem}",
        f"- command: `dist-moe sweep {path}`",
        f"- seed {sweep.seed}, sampler {sweep.sampler}, pruner {sweep.pruner}, {sweep.trials} trials per row"
        + (f": {sweep.trials // sweep.seeds} draws ({sweep.draws}) x {sweep.seeds} seeds" if sweep.seeds > 1 else ""),
        f"- date: {datetime.now(UTC).date()}",
        *(f"- {count} trials on {environment}" for environment, count in environments.most_common()),
        *(
            f"- {row.name}: data changed after {change['trials']} trials: {', '.join(change['changed'])}"
            for row in plan.rows
            for change in studies.data_changes(row.name)
        ),
    ]
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _unit(plan: SweepPlan) -> str:
    """Name what a search chooses among."""
    return "draw" if plan.sweep.seeds > 1 else "trial"


def _main_table(plan: SweepPlan, summaries: list[RowSummary]) -> str:
    share, unit = f"{100 * plan.sweep.best_fraction:g} %", _unit(plan)
    others = next((list(summary.metrics)[1:] for summary in summaries if summary.metrics), [])
    head = ["row", f"{unit}s", f"compute of a {unit}", f"test loss, best {share}", "best single", *others]
    body = []
    for summary in summaries:
        remarks = [f"{count} {state}" for state, count in summary.states.items() if count and state != "complete"]
        trials = f"{summary.trials} ({', '.join(remarks)})" if remarks else str(summary.trials)
        compute = f"{summary.cost:.1f}" if math.isfinite(summary.cost) else "-"
        body.append([summary.name, trials, compute, *_metrics(summary, others)])
    return (
        (f"A draw is the mean over its {plan.sweep.seeds} seeds. " if plan.sweep.seeds > 1 else "")
        + f"Test metrics are means over the best {share} of {unit}s by validation loss, the loss\nwith its spread "
        f"over {100 * LEVEL:g} % of resamples, in which the best are chosen anew (narrower than other searches would "
        f"be: no {unit} is new);\nbest single: test loss of the {unit} with the least validation loss. Diverged and "
        f"pruned {unit}s count as the worst, failed ones do not\ncount. Compute: mean processor seconds, searches and "
        "validations among them; seconds where there is a GPU.\n\n" + _markdown([head, *body])
    )


def _metrics(summary: RowSummary, others: list[str]) -> list[str]:
    if summary.best is None:
        return ["-"] * (2 + len(others))
    loss, span = summary.metrics[OBJECTIVE], summary.spread
    shown = f"{loss:.4f} ({span[0]:.4f} to {span[1]:.4f})" if span else f"{loss:.4f}"
    single = f"{summary.best.test.get(OBJECTIVE, math.nan):.4f}"
    return [f"{shown} (of {summary.averaged})", single, *(f"{summary.metrics[name]:.4f}" for name in others)]


def _differences_to_first(plan: SweepPlan, chosen: dict[str, list[TrialRecord]]) -> Differences:
    """Return the differences of rows to the first one of the file, in the compared metrics.

    Empty if that has no complete draw. Raises UserError for a metric that the trials do not have.
    """
    metrics, first = plan.sweep.compared, plan.rows[0].name
    for name, trials in chosen.items():
        known = set.intersection(*(set(trial.test) for trial in trials))
        for metric in set(metrics) - known:
            raise UserError(
                f"sweep {plan.path}: compared={list(metrics)}: not all seeds of row {name!r} have a metric {metric}; "
                f"known: {', '.join(sorted(known))}"
            )
    return {
        name: {m: paired_difference(_tests(trials, m), _tests(chosen[first], m)) for m in metrics}
        for name, trials in chosen.items()
        if first in chosen and name != first
    }


def _comparison(
    plan: SweepPlan,
    chosen: dict[str, list[TrialRecord]],
    differences: Differences,
    reach: dict[str, float],
) -> Iterable[str]:
    """Yield the table of the chosen draws, and that of their differences to the first row's.

    ``reach``: of the intervals of the losses' differences with the choice among draws in them.
    """
    metrics, rows = plan.sweep.compared, {row.name: row for row in plan.rows}
    body = []
    for name, trials in chosen.items():
        drawn = {key: rows[name].space[key].value(stored) for key, stored in trials[0].params.items()}
        shown = [f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in drawn.items()]
        body.append([name, ", ".join(shown), *(_spread(_tests(trials, metric)) for metric in metrics)])
    yield (
        f"Of each row the draw with the least mean validation loss over {plan.sweep.seeds} seeds: test metrics, mean ± "
        "standard\ndeviation over the seeds.\n\n" + _markdown([["row", "draw", *metrics], *body])
    )
    head, lines = ["row", *metrics], []
    for name, of in differences.items():
        lines.append([name, *(f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}] {d.verdict}" for d in of.values())])
        if reach and OBJECTIVE in of:
            mean = of[OBJECTIVE].mean
            lines[-1].append(f"[{mean - reach[name]:+.4f}, {mean + reach[name]:+.4f}]" if name in reach else "-")
    text = (
        f"The same minus {plan.rows[0].name}, seed by seed, with a {100 * LEVEL:g} % interval; within: it holds 0, "
        "no difference is seen."
    )
    if reach and OBJECTIVE in metrics:
        head.append(f"{OBJECTIVE}, with the choice")
        text += (
            "\nLast: the loss's interval with the choice among draws in it, made anew in resamples of draws and seeds."
        )
    yield f"{text}\npairs.csv has all pairs of rows and all metrics.\n\n{_markdown([head, *lines])}"


def _tests(trials: list[TrialRecord], metric: str) -> Floats:
    return np.array([trial.test[metric] for trial in trials])


def _spread(values_N: Floats) -> str:
    return f"{values_N.mean():.4f} ± {values_N.std(ddof=1):.4f}"


def _pair_cells(chosen: dict[str, list[TrialRecord]]) -> Iterable[Cells]:
    for (one, trials), (other, others) in itertools.combinations(chosen.items(), 2):
        both = [trial.test.keys() for trial in (*trials, *others)]
        for metric in sorted(set.intersection(*map(set, both)) if trials and others else ()):
            difference = paired_difference(_tests(trials, metric), _tests(others, metric))
            yield {"row": one, "minus": other, "metric": metric} | asdict(difference) | {"verdict": difference.verdict}


def reach_table(unit: str, summaries: list[RowSummary]) -> str:
    """Return the table of how many trials, or draws (``unit``), each row needs to reach each other."""
    reach, of = trials_to_reach(summaries), {summary.name: summary for summary in summaries}

    def shown(one: str, other: str, trials: int | None) -> str:
        if trials is None:
            return "never"
        all_of_other = of[other].trials * of[other].cost
        share = trials * of[one].cost / all_of_other if all_of_other else math.nan
        return f"{trials} ({share:.2f})" if math.isfinite(share) else str(trials)

    body = [[one, *(shown(one, *target) for target in others.items())] for one, others in reach.items()]
    return (
        f"After how many {unit}s a row (left) can expect the test loss that another (above) can expect of all its "
        f"{unit}s, and\ntheir compute over that of all the other's; never: not within its own number of {unit}s. "
        f"Expectations are over {unit}s\ndrawn with replacement from those made (bootstrap; `expected_exact` in "
        "budget.csv is its closed form), as are the\ncurves of budget.png.\n\n"
        + _markdown([[f"{unit}s of this row to reach", *reach], *body])
    )


def _markdown(lines: list[list[str]]) -> str:
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _table_cells(summary: RowSummary) -> Cells:
    cells: Cells = {"row": summary.name, "number": summary.trials, "compute": summary.cost}
    cells |= dict(summary.states.items())
    if summary.best is not None:
        low, high = summary.spread or (math.nan, math.nan)
        cells |= {"averaged": summary.averaged, "test_loss": summary.metrics[OBJECTIVE]}
        cells |= {"test_loss_low": low, "test_loss_high": high}
        cells |= {"best_trial": summary.best.index, "best_val_loss": summary.best.loss}
        cells |= {"best_test_loss": summary.best.test.get(OBJECTIVE, math.nan)}
        cells |= {f"test_{name}": mean for name, mean in summary.metrics.items() if name != OBJECTIVE}
    return cells


def _trial_cells(plan: SweepPlan, rows: Rows) -> Iterable[Cells]:
    spaces = {row.name: row.values for row in plan.rows}
    for name, records in rows.items():
        for record in records:
            cells: Cells = {"row": name, "trial": record.index, "state": record.state}
            cells |= {"steps": record.steps, "compute": round(record.compute, 3)}
            cells |= {f"val_{metric}": value for metric, value in record.val.items()}
            cells |= {f"test_{metric}": value for metric, value in record.test.items()}
            yield cells | spaces[name](record.params, record.index) | {"error": record.error}


def _budget_cells(summaries: list[RowSummary]) -> Iterable[Cells]:
    for summary in summaries:
        if summary.curve is None or summary.exact is None:
            continue
        curve = summary.curve
        columns = zip(curve.budgets, curve.expected, curve.low, curve.high, summary.exact, strict=True)
        for budget, *losses in columns:
            names = ("expected", "low_5", "high_95", "expected_exact")
            compute = {"row": summary.name, "number": int(budget), "compute": round(budget * summary.cost, 3)}
            yield compute | dict(zip(names, map(float, losses), strict=True))


def _write_csv(path: Path, lines: Iterable[Cells]) -> None:
    """Write a column for every name that occurs; empty where a line has no such cell."""
    cells = list(lines)
    columns = list(dict.fromkeys(name for line in cells for name in line))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells)
