"""The configuration of a supervised run: YAML, overrides, and every check that needs no process group."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dist_moe.data.movielens import MovieLensConfig
from dist_moe.engine.deepspeed_config import check_deepspeed_section
from dist_moe.engine.loop import TrainConfig
from dist_moe.engine.process_groups import ParallelConfig
from dist_moe.errors import UserError
from dist_moe.models import RecommenderConfig


class RunConfig(BaseModel):
    """Supervised training of the two-task recommender."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    content = _read_yaml(path)
    for override in overrides:
        _apply(content, override)
    return validate_config(content)


def validate_config(content: dict[str, Any]) -> RunConfig:
    """Raise UserError with one line per field that is unknown, of a wrong type or out of range."""
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        lines = [_explain(fault) for fault in error.errors()]
        raise UserError("the configuration is not valid:\n  " + "\n  ".join(lines)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"configuration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"configuration {path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"configuration {path} must hold 'key: value' pairs, not a {type(content).__name__}")
    return content


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key=value, for example train.batch_size=256")
    try:
        value = _number_or(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {override!r} is not YAML: {error}") from error
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(content.setdefault(parent, {}), dict):
            content[parent] = {}
        content = content[parent]
    content[last] = value


def _number_or(value: Any) -> Any:
    """YAML 1.1 takes 1e-3 for a string; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(fault: Any) -> str:
    location = [str(part) for part in fault["loc"]]
    field = ".".join(part for part in location if part not in _gate_names())
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, list(field_names(RunConfig)), n=1)
        hint = f"; did you mean {near[0]}?" if near else "; see 'dist-moe config --schema' for all fields"
        return f"{field}={fault['input']!r}: there is no such field{hint}"
    return f"{field}={fault['input']!r}: {fault['msg'][0].lower() + fault['msg'][1:]}"


def _gate_names() -> set[str]:
    gate_configs = RecommenderConfig.model_fields["gate"].annotation
    return {config.model_fields["name"].default for config in getattr(gate_configs, "__args__", ())}


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of ``model`` and of the models within it."""
    for name, field in model.model_fields.items():
        yield prefix + name
        kinds = getattr(field.annotation, "__args__", (field.annotation,))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from field_names(kind, f"{prefix}{name}.")
