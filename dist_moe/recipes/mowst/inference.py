"""Answers for nodes, and their cost: drawn by the confidence, expected over such draws, or by a threshold on it.

Mowst lets the weak expert answer with probability C. The expected accuracy over such draws has a closed form,
mean(C [weak right] + (1 - C) [strong right]). With a threshold, chosen on the validation nodes, the choice is fixed,
and the strong network runs for some nodes alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_moe.config.files import write_json
from dist_moe.engine.checkpoint import place_weights, read_model
from dist_moe.engine.checkpoint.files import tested_checkpoint
from dist_moe.engine.launch.machine_probe import median_seconds
from dist_moe.errors import UserError
from dist_moe.models import WeakStrongNodes
from dist_moe.models.graphs import logits_of_some
from dist_moe.models.weak_strong import mixed_losses
from dist_moe.recipes.stages import Stage, StagedPlan
from dist_moe.recipes.supervised.report import metrics_table, predictor_rows
from dist_moe.tasks import build_model, evaluate, evaluate_baselines

TIMINGS = 5
"""Passes of which the median time counts, after two that do not."""


@dataclass(frozen=True)
class Answers:
    """For N nodes the confidence of the weak expert, and whether each expert is right (0 or 1); fp64."""

    confidence_N: Tensor
    weak_N: Tensor
    strong_N: Tensor

    def expected_accuracy(self) -> float:
        """Return the accuracy that draws have on average."""
        return float(mixed_losses(self.confidence_N, self.weak_N, self.strong_N).mean())

    def sampled_accuracy(self, draws: int, seed: int) -> tuple[float, float]:
        """Return mean and standard deviation of the accuracy over draws of who answers for each node."""
        generator = torch.Generator().manual_seed(seed)
        accuracies = []
        for _ in range(draws):
            weak_answers_N = torch.rand(len(self.confidence_N), generator=generator) < self.confidence_N
            accuracies.append(float(torch.where(weak_answers_N, self.weak_N, self.strong_N).mean()))
        return statistics.fmean(accuracies), statistics.stdev(accuracies) if draws > 1 else 0.0

    def threshold(self, tolerance: float = 0.0) -> tuple[float, float]:
        """Return a threshold and its accuracy: where the confidence is below, the strong expert answers.

        It is the one with which the fewest nodes ask the strong expert, of those whose accuracy is not more than
        ``tolerance`` below the best. 0: none asks; 2: all do.
        """
        order_N = self.confidence_N.argsort()
        right_N = (self.strong_N - self.weak_N)[order_N].cumsum(0)
        gain_N = torch.cat([torch.zeros(1, dtype=right_N.dtype), right_N])  # by the number of nodes that ask
        confidence_N = self.confidence_N[order_N]
        # Nodes of equal confidence ask together: a cut is possible where it changes.
        possible_N = torch.ones(len(gain_N), dtype=torch.bool)
        possible_N[1:-1] = confidence_N[1:] > confidence_N[:-1]
        gain_N = torch.where(possible_N, gain_N, -torch.inf)
        within_N = gain_N >= gain_N.max() - tolerance * len(order_N) - 1e-9
        cut = int(within_N.nonzero()[0])
        accuracy = float(self.weak_N.mean() + gain_N[cut] / len(order_N))
        if cut in (0, len(order_N)):
            return 2.0 * (cut > 0), accuracy  # no confidence is above 1
        return float((confidence_N[cut - 1] + confidence_N[cut]) / 2), accuracy


@torch.no_grad()
def answers_of(model: WeakStrongNodes, part: Any) -> Answers:
    """Return what the experts answer for the nodes of a part, on this rank alone. Needs evaluation mode."""
    node_B, label_B = torch.from_numpy(part.node_N), torch.from_numpy(part.label_N)
    device = next(model.parameters()).device
    graph = part.graph.on(device)
    output = model(graph.x_ND, graph.edge_2E, node_B.to(device))
    weak_B, strong_B = ((x.argmax(dim=1).cpu() == label_B).double() for x in (output.weak_BC, output.strong_BC))
    return Answers(output.confidence_B.double().cpu(), weak_B, strong_B)


def report(
    plan: StagedPlan, stage: Stage, best: Path, turns: Mapping[str, float], alone: Mapping[str, Any]
) -> dict[str, Any]:
    """Evaluate the weights of the stage ``best``; write the summary and the pictures and print the table on rank 0.

    ``turns``: the validation loss of each turn. ``alone``: results of the networks that were trained alone.
    """
    start, task, groups = plan.start, plan.task, stage.groups
    config = start.config
    model = build_model(config, task, groups.world).to(groups.device)
    place_weights(model, read_model(tested_checkpoint(best)))
    val, test = (evaluate(task, model, part, config.target_weights, groups) for part in (task.val, task.test))
    if not stage.environment.is_rank_zero:
        return {}
    model.eval()
    found = _inference(model, task, config.recipe, config.seed)
    baselines = evaluate_baselines(task, task.test, config.target_weights)
    summary = {
        "val": val,
        "test": test,
        "baselines": baselines,
        "data": task.manifest,
        "alone": alone,
        "turns": turns,
        "best": best.name,
        "inference": found,
    }
    try:
        write_json(start.run.summary, summary)
        task.draw(start.run.root, test)
    except OSError as error:
        raise UserError(f"{start.run.root} cannot be written to: {error}; make room and resume the run") from error
    print(metrics_table(_row(test["accuracy"], test["strong_share"]), _rows(found, alone) | predictor_rows(baselines)))
    print(f"everything about this run is in {start.run.root}")
    return found


def _row(accuracy: float, share: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "nodes that ask the strong one": share}


def _rows(found: Mapping[str, Any], alone: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    rows = {}
    for part, of in alone.items():
        rows[f"{of['network']} alone"] = _row(of["test"]["accuracy"], float(part == "strong"))
    fixed = found["threshold"]
    rows[f"asked below C = {fixed['value']:.3g}"] = _row(fixed["accuracy"], fixed["strong_share"])
    return rows


@torch.no_grad()
def _inference(model: WeakStrongNodes, task: Any, recipe: Any, seed: int) -> dict[str, Any]:
    """Return accuracies on the test nodes, and the measured cost of asking the strong network for some alone."""
    val, test = answers_of(model, task.val), answers_of(model, task.test)
    threshold, val_accuracy = val.threshold(recipe.tolerance)
    device = next(model.parameters()).device
    graph, node_B = task.graph.on(device), torch.from_numpy(task.test.node_N).to(device)
    inputs = (graph.x_ND, graph.edge_2E, node_B)
    class_B, asks_B = model.classify(*inputs, threshold)
    mean, deviation = test.sampled_accuracy(recipe.draws, seed)
    weak, strong = model.networks
    return {
        "expected_accuracy": test.expected_accuracy(),
        "sampled_accuracy": {"mean": mean, "std": deviation, "draws": recipe.draws},
        "threshold": {
            "value": threshold,
            "val_accuracy": val_accuracy,
            "accuracy": float((class_B.cpu() == torch.from_numpy(task.test.label_N)).double().mean()),
            "strong_share": float(asks_B.double().mean()),
        },
        "microseconds_per_test_node": {
            name: 1e6 * median_seconds(work, device, TIMINGS) / len(node_B)
            for name, work in {
                "weak": lambda: weak(*inputs),
                "strong_whole_graph": lambda: strong(*inputs),
                "strong_neighbourhoods": lambda: logits_of_some(strong, *inputs),
                "by_threshold": lambda: model.classify(*inputs, threshold),
            }.items()
        },
    }
