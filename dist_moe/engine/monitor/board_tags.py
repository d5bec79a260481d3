"""The names of a run's numbers in TensorBoard, their meanings, and which of them stand in one chart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TAGS: Mapping[str, tuple[str, str]] = {
    "loss": ("loss/task", "weighted loss of the targets, mean over the step's examples"),
    "total_loss": ("loss/total", "the loss of the targets and the auxiliary losses"),
    "active_experts": ("experts/per_token_mean", "experts per token, mean over tokens, gates and layers"),
    "active_experts_p10": ("experts/per_token_p10", "experts per token: a tenth of the tokens has at most so many"),
    "active_experts_p50": ("experts/per_token_p50", "experts per token: half of the tokens has at most so many"),
    "active_experts_p90": (
        "experts/per_token_p90",
        "experts per token: nine tenths of the tokens have at most so many",
    ),
    "active_experts_max": ("experts/per_token_max", "experts per token: the most that any token has"),
    "effective_experts": ("experts/effective_mean", "effective experts, exp(entropy of the load), mean over layers"),
    "effective_experts_least": ("experts/effective_least", "effective experts of the layer that has the fewest"),
    "dead_experts": ("experts/dead", "experts without any row in the step, over all layers"),
    "load_cv": ("experts/load_cv", "standard deviation of the experts' rows over their mean, of the most uneven layer"),
    "load_max_over_mean": (
        "experts/load_max_over_mean",
        "rows of the busiest expert over the mean, of the worst layer",
    ),
    "rows_computed": ("experts/rows_computed", "rows computed by experts in the step, over all ranks and layers"),
    "wire_bytes": ("traffic/all_to_all_bytes", "bytes that left their rank in the step, forward and backward"),
    "wire_rows": ("traffic/all_to_all_rows", "rows that left their rank in the step, forward and backward"),
    "wire_bytes_across_nodes": ("traffic/bytes_across_nodes", "bytes that left their node in the step"),
    "wire_rows_across_nodes": ("traffic/rows_across_nodes", "rows that left their node in the step"),
    "step_seconds": ("time/step", "seconds of the whole step, on rank 0"),
    "data_seconds": ("time/data", "seconds until the step's examples were there, on rank 0"),
    "gate_seconds": ("time/gate", "seconds in gates of all layers, forward and backward, mean over ranks"),
    "dispatch_seconds": ("time/dispatch", "seconds in dispatch of all layers, with the waiting for other ranks"),
    "experts_seconds": ("time/experts", "seconds in the experts of all layers, forward and backward"),
    "combine_seconds": ("time/combine", "seconds in combine of all layers, with the waiting for other ranks"),
    "examples_per_second": ("speed/examples_per_second", "examples per second, over all ranks"),
    "tokens_per_second": ("speed/tokens_per_second", "tokens per second, over all ranks"),
    "tokens": ("speed/tokens_per_step", "tokens of a step, over all ranks"),
    "mfu": ("speed/mfu", "model FLOPs per second over what the devices can do at most (0..1)"),
    "peak_memory_gib": ("speed/peak_memory_gib", "GiB in use at most so far, on the fullest rank (GPU, or process)"),
    "lr": ("optimizer/lr", "learning rate of the step"),
    "grad_norm": ("optimizer/grad_norm", "norm of the gradient over dense and expert parameters, before clipping"),
    "skipped": ("optimizer/skipped", "1 where the step was skipped as its gradient was not finite"),
    "rows_changed": (
        "permutation/rows_changed",
        "slots, over all tables, that lead elsewhere than when training began",
    ),
}
"""Tag and meaning, with its unit, of the numbers of a record that every run has."""

LAYOUT: Mapping[str, Mapping[str, list[Any]]] = {
    "Learning": {
        "loss": ["Multiline", ["loss/task", "loss/total", "validation/loss", "test/loss"]],
        "gradient norm": ["Multiline", ["optimizer/grad_norm"]],
    },
    "Experts": {
        "experts per token: p10, mean, p90": [
            "Margin",
            ["experts/per_token_mean", "experts/per_token_p10", "experts/per_token_p90"],
        ],
        "effective and dead experts": [
            "Multiline",
            ["experts/effective_mean", "experts/effective_least", "experts/dead"],
        ],
        "unevenness of the load": ["Multiline", ["experts/load_cv", "experts/load_max_over_mean"]],
    },
    "Cost": {
        "seconds of a step by component": ["Multiline", ["time/.*"]],
        "bytes exchanged": ["Multiline", ["traffic/all_to_all_bytes", "traffic/bytes_across_nodes"]],
        "tokens and examples per second": ["Multiline", ["speed/tokens_per_second", "speed/examples_per_second"]],
    },
}
"""Charts of the custom scalars tab, by category, as ``torch.utils.tensorboard`` takes them."""


def tag_of(name: str) -> str:
    """Return the tag of a number of a record: that in TAGS, its own if it names a group, else one of a loss."""
    if name in TAGS:
        return TAGS[name][0]
    return name if "/" in name else f"loss/{name}"


MEANINGS: Mapping[str, str] = dict(TAGS.values())
"""The meaning of each tag."""


def split_metrics(metrics: Mapping[str, Any], most: int = 4) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Return the numbers of an evaluation that are shown as curves, and those that are shown as pictures, by name.

    Pictures get whatever would make the number of curves grow with the model or the data: mappings, at any depth, and
    metrics of more than ``most`` parts of the data, known by their names (``loss``, and ``loss_english``, ...).
    """
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
    pictures = {name: dict(value) for name, value in metrics.items() if isinstance(value, Mapping)}
    for whole in list(numbers):
        parts = [name for name in numbers if name.startswith(f"{whole}_")]
        if len(parts) > most:
            pictures[f"{whole}_by_part"] = {name.removeprefix(f"{whole}_"): numbers.pop(name) for name in parts}
    return numbers, pictures
