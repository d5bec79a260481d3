"""The stages that make a run's experts smaller (MC-SMoE): factor, prune, drop. Before and after each, a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_moe.engine.checkpoint import ModelWeights
from dist_moe.errors import UserError
from dist_moe.recipes.merge_compress.compress import Compressed, num_parameters, supervised_config
from dist_moe.recipes.merge_compress.factor import (
    Matrices,
    dropped_weights,
    factored_weights,
    kept_rows,
    num_padding,
)
from dist_moe.recipes.merge_compress.prune import LowRankPruningConfig
from dist_moe.recipes.merge_compress.settings import RecoverConfig
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.size import planned_model
from dist_moe.tasks import Task


def check_low_rank(
    compress: LowRankPruningConfig, recover: RecoverConfig, config: SupervisedConfig, task: Task, total_steps: int
) -> None:
    """Raise UserError where the experts of ``config``'s model cannot be factored, or not be pruned while it trains."""
    if config.model.low_rank is not None:
        raise UserError("model.low_rank: the source's experts are factored already; set recipe.compress to null")
    planned_model(_with(config, {"rank": compress.rank}), task)
    if recover.trained == "router":
        raise UserError("recipe.recover.trained=router: experts must train while they are pruned; use all_but_router")
    if config.train.patience is not None:
        raise UserError(
            f"train.patience={config.train.patience}: the best weights may be those before rows were pruned; set it to "
            "null"
        )
    try:
        compress.between(total_steps)
    except UserError as error:
        raise UserError(f"recipe.compress: {error}") from error


def factored(weights: ModelWeights, config: SupervisedConfig, task: Task, rank: int) -> Compressed:
    """Return the model of ``config`` with its experts' matrices as U V + S, which computes the same."""
    after = factored_weights(weights, _matrices(config, task), rank)
    report = {"parameters_before": num_parameters(weights), "parameters_after": num_parameters(after)}
    return Compressed(after, _with(config, {"rank": rank}), report)


def dropped(weights: ModelWeights, config: SupervisedConfig, task: Task) -> Compressed:
    """Return the factored model of ``config`` without the rows of S that were pruned."""
    layers = _matrices(config, task)
    rows, after = kept_rows(weights, layers), dropped_weights(weights, layers)
    assert config.model.low_rank is not None
    new_config = _with(config, {"rank": config.model.low_rank.rank, "rows": rows})
    report = {
        "parameters_before": num_parameters(weights),
        "parameters_after": num_parameters(after),
        "padding_after": num_padding(after, layers),
        "expert_flops_before": _flops(config, task),
        "expert_flops_after": _flops(new_config, task),
        "rows": dict(zip(layers, rows, strict=True)),
    }
    return Compressed(after, new_config, report)


def low_rank_text(report: Mapping[str, Any]) -> str:
    """Return the report in words."""
    before, after = report["parameters_before"], report["parameters_after"]
    lines = [f"{before:,} -> {after:,} parameters ({100 * after / before:.1f} %)"]
    if "rows" in report:
        lines[0] += f", of which {report['padding_after']:,} are padding"
        share = report["expert_flops_after"] / report["expert_flops_before"]
        lines.append(f"FLOPs of an expert and row: {100 * share:.1f} % of those with all rows")
        lines += [f"{layer}: rows {rows}" for layer, rows in report["rows"].items()]
    return "\n".join(lines)


def _matrices(config: SupervisedConfig, task: Task) -> Matrices:
    return {name: layer.experts.matrices for name, layer in planned_model(config, task).moe_layers.items()}


def _flops(config: SupervisedConfig, task: Task) -> float:
    """Return the FLOPs of one expert and row in each layer, together."""
    return sum(layer.experts.flops_per_row for layer in planned_model(config, task).moe_layers.values())


def _with(config: SupervisedConfig, low_rank: Mapping[str, Any]) -> SupervisedConfig:
    return supervised_config(config, config.model.model_dump(mode="json") | {"low_rank": dict(low_rank)})
