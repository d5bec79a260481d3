"""The configuration of a supervised run: YAML, overrides, and every check that needs no process group."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from dist_moe.data.movielens import MovieLensConfig
from dist_moe.engine.deepspeed_checks import check_deepspeed_section
from dist_moe.engine.loop import TrainConfig
from dist_moe.engine.process_groups import ParallelConfig
from dist_moe.errors import UserError
from dist_moe.models import RecommenderConfig
from dist_moe.recipes.overrides import Content, assign, parse_override, read_yaml
from dist_moe.settings import Settings


class RunConfig(Settings):
    """Supervised training of the two-task recommender."""

    seed: int = Field(0, ge=0, description="seed of initialisation, data order and dropout")
    data: MovieLensConfig = Field(default_factory=lambda: MovieLensConfig(), description="the data set")
    model: RecommenderConfig = Field(default_factory=lambda: RecommenderConfig(), description="the model")
    watched_weight: float = Field(0.5, ge=0, le=1, description="w of the loss w * BCE(watched) + (1 - w) * MSE(rating)")
    train: TrainConfig = Field(default_factory=lambda: TrainConfig(), description="length and rhythm")
    parallel: ParallelConfig = Field(default_factory=lambda: ParallelConfig(), description="the layout")
    deepspeed: dict[str, Any] = Field(
        default_factory=lambda: {
            "optimizer": {"type": "AdamW", "params": {"lr": 5e-4, "eps": 1e-7, "weight_decay": 0.0}},
            "zero_optimization": {"stage": 1},
        },
        description="DeepSpeed's own JSON configuration, passed through (optimizer, zero_optimization, ...)",
    )

    def check(self, world_size: int) -> None:
        """Raise UserError for what does not fit together on ``world_size`` ranks."""
        if self.model.gate.k > self.model.num_experts:
            raise UserError(
                f"model.gate.k={self.model.gate.k} exceeds model.num_experts={self.model.num_experts}; "
                f"allowed: 1..{self.model.num_experts}"
            )
        self.parallel.check(world_size, self.model.num_experts)
        check_deepspeed_section(self.deepspeed, self.train.batch_size, world_size)

    def plain(self) -> dict[str, Any]:
        """As YAML and JSON can hold it."""
        return self.model_dump(mode="json")


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``path``, apply ``key.subkey=value`` overrides (values are YAML), and validate.

    Raises UserError that names the file or the field, the value and what is allowed.
    """
    content = read_yaml(path)
    assignments = [parse_override(override) for override in overrides]
    for key, value in assignments:
        if key == "model.gate.name":
            _drop_fields_of_another_gate(content, value)
    for key, value in assignments:
        assign(content, key, value)
    return validate_config(content)


def validate_config(content: Content) -> RunConfig:
    """Raise UserError with one line per field that is unknown, of a wrong type or out of range."""
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        lines = [_explain(fault) for fault in error.errors()]
        raise UserError("the configuration is not valid:\n  " + "\n  ".join(lines)) from error


def _drop_fields_of_another_gate(content: Content, name: str) -> None:
    """Switching the gate by name alone keeps only those of the file's fields that the new gate has."""
    gate = (content.get("model") or {}).get("gate")
    config = _gate_configs().get(name)
    if isinstance(gate, dict) and gate.get("name") != name and config is not None:
        content["model"]["gate"] = {key: value for key, value in gate.items() if key in config.model_fields}


def _explain(fault: Any) -> str:
    location = [str(part) for part in fault["loc"]]
    field = ".".join(part for part in location if part not in _gate_configs())
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, list(field_names(RunConfig)), n=1)
        hint = f"; did you mean {near[0]}?" if near else "; see 'dist-moe config --schema' for all fields"
        return f"{field}={fault['input']!r}: there is no such field{hint}"
    return f"{field}={fault['input']!r}: {fault['msg'][0].lower() + fault['msg'][1:]}"


def _gate_configs() -> dict[str, type[BaseModel]]:
    gates = RecommenderConfig.model_fields["gate"].annotation
    return {config.model_fields["name"].default: config for config in getattr(gates, "__args__", ())}


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of ``model`` and of the models within it."""
    for name, field in model.model_fields.items():
        yield prefix + name
        kinds = getattr(field.annotation, "__args__", (field.annotation,))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from field_names(kind, f"{prefix}{name}.")
