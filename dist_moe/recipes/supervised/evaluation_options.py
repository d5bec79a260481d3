"""Evaluating a trained gate with other options than it was trained with, such as another number of experts."""

from __future__ import annotations

from collections.abc import Sequence

from dist_moe.config.overrides import parse_override
from dist_moe.errors import UserError
from dist_moe.recipes.supervised.config import RunConfig, override, validate_config

_GATE = "model.gate."


def for_evaluation(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """``config`` with ``model.gate.FIELD=VALUE`` overrides of options on which no weight depends.

    They are the gate's ``evaluation_fields``. Raises UserError for any other field, and for a wrong value.
    """
    if not overrides:
        return config
    gate = config.model.gate
    assignments = dict(parse_override(text) for text in overrides)
    for key, value in assignments.items():
        if key.removeprefix(_GATE) not in gate.evaluation_fields or not key.startswith(_GATE):
            allowed = ", ".join(_GATE + field for field in gate.evaluation_fields) or "none of this gate"
            raise UserError(f"{key}={value}: the weights belong to what they were trained with; allowed: {allowed}")
    content = config.plain()
    override(content, assignments)
    changed = validate_config(content)
    for fault in changed.model.gate.validation_errors(changed.model.num_experts):
        raise UserError(f"{_GATE}{fault}")
    return changed
