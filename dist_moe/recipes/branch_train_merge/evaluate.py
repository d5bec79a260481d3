"""The evaluation of a forest: every domain by every expert, by what is beside them, and by every way of merging."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_moe.config.files import replace_text, write_json
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.errors import UserError
from dist_moe.parallel import current_world, gather_columns
from dist_moe.recipes.branch_train_merge.forest import Forest
from dist_moe.recipes.branch_train_merge.merge import MergeSettings, Scores
from dist_moe.recipes.branch_train_merge.partition import task_of_domain
from dist_moe.recipes.branch_train_merge.picture import draw_weights
from dist_moe.recipes.branch_train_merge.scoring import Scorer, new_model
from dist_moe.recipes.branch_train_merge.training import SEED, TWIN, ForestPlan

REPORT, TABLE, PICTURE = "evaluation.json", "evaluation.md", "weights.png"
TRAINED_ON, HELD_OUT = "all trained on", "all held out"


@dataclass(frozen=True)
class Totals:
    """Nats and bytes of the test sequences of a domain; they add up over domains."""

    nats: float
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of UTF-8."""
        return self.nats / math.log(2) / self.bytes


def evaluate_forest(scorer: Scorer, merges: Sequence[MergeSettings], trained_on: Collection[str]) -> dict[str, Any]:
    """Return the bits per byte of every domain of ``scorer`` by every model and way of merging. Collective.

    ``trained_on``: the domains that some expert has learnt; over these, and over the others, there are totals.

    Returns:
        ``bits_per_byte``: by model or label of a merge, then by domain. ``experts_per_token``, ``flops_per_token``: by
        label, averaged over tokens; FLOPs are those of a forward pass's matrix products. ``weights``: by label of a
        merge that has them, then by domain and expert: the mean weight.
        ``experts``: their names. ``trained_on``, ``held_out``: the domains.
    """
    others = [name for name, member in scorer.forest.members.items() if member.role in (SEED, TWIN)]
    columns: dict[str, dict[str, Totals]] = {}
    active, flops = dict[str, float](), dict[str, float]()
    tokens = {domain: len(scorer.table(domain)) for domain in scorer.domains}

    def mean(by_domain: Mapping[str, float]) -> float:
        """Over the tokens of all domains."""
        return sum(value * tokens[domain] for domain, value in by_domain.items()) / sum(tokens.values())

    weights: dict[str, dict[str, dict[str, float]]] = {}
    for name in (*scorer.experts, *others):
        passes = {domain: scorer.passes([name], domain) for domain in scorer.domains}
        columns[name] = {domain: _totals(scorer, domain, logp_1NS[0]) for domain, (logp_1NS, _) in passes.items()}
        active[name], flops[name] = 1.0, mean({domain: sum(counted) for domain, (_, counted) in passes.items()})
    for merge in merges:
        scores = {domain: merge.score(scorer, domain) for domain in scorer.domains}
        columns[merge.label] = {domain: _totals(scorer, domain, found.logp_NS) for domain, found in scores.items()}
        active[merge.label] = mean({domain: found.experts_per_token for domain, found in scores.items()})
        flops[merge.label] = mean({domain: found.flops_per_token for domain, found in scores.items()})
        weights[merge.label] = {
            domain: _mean_weights(scorer, domain, found)
            for domain, found in scores.items()
            if found.weight_JN is not None
        }
    held_out = [domain for domain in scorer.domains if domain not in trained_on]
    trained = [domain for domain in scorer.domains if domain in trained_on]
    return {
        "experts": list(scorer.experts),
        "trained_on": trained,
        "held_out": held_out,
        "bits_per_byte": {label: _with_sums(by_domain, trained, held_out) for label, by_domain in columns.items()},
        "experts_per_token": active,
        "flops_per_token": flops,
        "weights": {label: by_domain for label, by_domain in weights.items() if by_domain},
    }


def evaluate_run(
    plan: ForestPlan,
    groups: ProcessGroups,
    merges: Sequence[MergeSettings],
    *,
    domains: Sequence[str] | None = None,
    experts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the report on the forest of a run, see :func:`evaluate_forest`. Collective.

    ``domains``, ``experts``: those that are looked at; None: all. Raises UserError for names that there are not.
    """
    forest, known = Forest(plan.start.run.root), plan.task.data.domains
    for called, given, there in (("domain", domains, known), ("expert", experts, forest.experts)):
        for name in given or ():
            if name not in there:
                raise UserError(f"there is no {called} {name}; there are {', '.join(there)}")
    tasks = {name: task_of_domain(plan.task, name) for name in domains or known}
    scorer = Scorer(new_model(plan, groups), plan.union, tasks, forest, groups, plan.prior, experts)
    trained_on = {*plan.partition.trained_on, *forest.experts}  # those of further domains were added later
    return evaluate_forest(scorer, merges if scorer.experts else (), trained_on)


def _gathered(scorer: Scorer, domain: str, mine_CN: Tensor) -> Tensor:
    """Return (C, N) columns of all sequences of a domain, in their order: alike at any number of ranks."""
    count = len(scorer.table(domain))
    found = gather_columns(mine_CN.to(scorer.groups.device), -(-count // current_world().size))
    return found[:, :count].cpu()


def _totals(scorer: Scorer, domain: str, logp_NS: Tensor) -> Totals:
    nats_1N = _gathered(scorer, domain, -logp_NS.double().sum(dim=1)[None])
    return Totals(float(nats_1N.sum()), scorer.bytes(domain))


def _mean_weights(scorer: Scorer, domain: str, found: Scores) -> dict[str, float]:
    assert found.weight_JN is not None
    mean_J = _gathered(scorer, domain, found.weight_JN).mean(dim=1)
    return dict(zip(scorer.experts, mean_J.tolist(), strict=True))


def _with_sums(by_domain: Mapping[str, Totals], trained: Sequence[str], held_out: Sequence[str]) -> dict[str, float]:
    values = {domain: totals.bits_per_byte for domain, totals in by_domain.items()}
    for label, names in ((TRAINED_ON, trained), (HELD_OUT, held_out)):
        if names:
            both = [by_domain[name] for name in names]
            values[label] = Totals(sum(t.nats for t in both), sum(t.bytes for t in both)).bits_per_byte
    return values


def table_text(report: Mapping[str, Any]) -> str:
    """Return the report as a Markdown table: a line for each model and way of merging, the columns the domains.

    The best of a column is in bold; the last columns have the whole models computed per token, and their FLOPs.
    """
    columns = list(next(iter(report["bits_per_byte"].values())))
    columns.sort(key=lambda name: name in (TRAINED_ON, HELD_OUT))
    best = {name: min(row[name] for row in report["bits_per_byte"].values()) for name in columns}
    lines = [
        f"| bits per byte | {' | '.join(columns)} | models per token | MFLOPs |",
        "|---|" + "---:|" * (len(columns) + 2),
    ]
    for label, row in report["bits_per_byte"].items():
        called = f"expert {label}" if label in report["experts"] else label
        cells = [f"**{row[name]:.4f}**" if row[name] == best[name] else f"{row[name]:.4f}" for name in columns]
        models, flops = report["experts_per_token"][label], report["flops_per_token"][label]
        lines.append(f"| {called} | {' | '.join(cells)} | {models:g} | {flops / 1e6:.2f} |")
    if report["held_out"]:
        lines.append(f"\nHeld out, trained on by no expert: {', '.join(report['held_out'])}.")
    return "\n".join(lines)


def write_report(forest: Forest, report: Mapping[str, Any]) -> Path:
    """Write the report into the forest's directory as JSON and Markdown; return the latter. Raises UserError.

    With it comes a picture of the weights that the first of the ways of merging with weights gives the experts.
    """
    path = forest.root / TABLE
    try:
        write_json(forest.root / REPORT, report)
        replace_text(path, table_text(report) + "\n")
        for label, weights in list(report["weights"].items())[:1]:
            draw_weights(forest.root / PICTURE, weights, f"{label}: who answers which text")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; make room, then 'dist-moe forest evaluate'") from error
    return path
