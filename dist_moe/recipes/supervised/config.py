"""The configuration of supervised training, and every check that needs no process group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from dist_moe.config.files import is_finite
from dist_moe.config.plain_yaml import Content
from dist_moe.config.registry import names_of
from dist_moe.engine.callbacks import CallbackConfig
from dist_moe.engine.deepspeed.checks import check_deepspeed_section
from dist_moe.engine.settings import TrainConfig
from dist_moe.errors import UserError
from dist_moe.models import MODELS, ModelConfig, models_of_kind
from dist_moe.recipes.callbacks.assignment_search import AssignmentScheduleConfig
from dist_moe.recipes.callbacks.swap_search import SwapScheduleConfig
from dist_moe.recipes.callbacks.table_search import SearchSchedule
from dist_moe.recipes.recipe import RecipeConfig
from dist_moe.recipes.supervised.start import STARTS, StartConfig
from dist_moe.recipes.supervised.start.settings import start_of
from dist_moe.search.placement_policy import PlacementScheduleConfig
from dist_moe.tasks import TASKS, TaskConfig

TargetWeight = Annotated[float, Field(ge=0)]

_PLACES_OF_MODELS = ("activation_checkpointing",)
"""Fields of a model that change how it is computed, not what."""


class SupervisedConfig(RecipeConfig):
    """Supervised training of a model on a task."""

    data: TaskConfig = Field(
        default_factory=lambda: TASKS.by_name["movielens-1m"].model_validate({"name": "movielens-1m"}),
        description="the data set and what is learnt from it",
    )
    model: ModelConfig = Field(
        default_factory=lambda: MODELS.by_name["recommender"].model_validate({}),
        description="the model; by default the one that fits the data",
    )
    target_weights: tuple[TargetWeight, ...] = Field(
        (),
        description="one weight per target of the task, in their order (empty: all alike). movielens: cross-entropy of "
        "'watched', squared error of the rating; two images: cross-entropy of the top left, of the bottom right one; "
        "text: cross-entropy of the next token; labelled texts: cross-entropy of the class, or squared error of the "
        "number; questions: mean of the cross-entropies of an answer's two ends; tables: log loss of a binary target, "
        "squared error of a numeric one",
    )
    swap_search: SwapScheduleConfig | None = Field(
        None,
        description="explicit local search by swaps, at chosen steps of the training (null: none); not while a "
        "permutation is being learnt, which would overwrite what it finds",
    )
    assignment_search: AssignmentScheduleConfig | None = Field(
        None,
        description="local search by linear assignments on dL/dP, on training examples, at chosen training steps "
        "(null: none); not while a permutation is being learnt",
    )
    placement: PlacementScheduleConfig | None = Field(
        None,
        description="moving experts between the ranks of a group while training, so that the heaviest rank gets "
        "lighter (null: experts stay where they are); the model computes the same either way",
    )
    callbacks: tuple[CallbackConfig, ...] = Field(
        (),
        description="callbacks of your own that modules under imports register, in the order in which they are called",
    )
    start: StartConfig | None = Field(
        None, description="what a new run starts from (null: random weights; of a BERT, those of data.encoder)"
    )
    train: TrainConfig = Field(default_factory=lambda: TrainConfig(), description="length and rhythm")
    deepspeed: dict[str, Any] = Field(
        default_factory=lambda: {
            "optimizer": {"type": "AdamW", "params": {"lr": 5e-4, "eps": 1e-7, "weight_decay": 0.0}},
            "zero_optimization": {"stage": 1},
        },
        description="DeepSpeed's own JSON configuration, passed through (optimizer, zero_optimization, ...)",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, content: Any) -> Any:
        return cls.filled(content) if isinstance(content, dict) else content

    @classmethod
    def filled(cls, content: Content) -> Content:
        """Return what a file says with model.name and start.name, which follow from data.name and model.name."""
        data, model, start = (content.get(name) for name in ("data", "model", "start"))
        data_name = data.get("name", TASKS.default) if isinstance(data, dict) else data
        settings = TASKS.get(data_name or TASKS.default) or TASKS.by_name["movielens-1m"]
        model = {} if model is None else {"name": model} if isinstance(model, str) else model
        filled: Content = {"data": {} if data is None else data}
        if isinstance(model, dict):
            model = {"name": next(iter(models_of_kind(settings.kind)), None)} | model
        fitting = start_of(model["name"]) if isinstance(model, dict) and isinstance(model["name"], str) else None
        if start is None and fitting is not None and fitting.is_default:
            start = {}
        if isinstance(start, dict):
            start = {"name": names_of(fitting or STARTS.classes[0])[0]} | start  # check() says which models it is for
        return content | filled | {"model": model, "start": start}

    @field_validator("deepspeed")
    @classmethod
    def _null_is_left_out(cls, section: dict[str, Any]) -> dict[str, Any]:
        """Let an override take away what a file has, such as its scheduler; refuse numbers that are not finite."""
        if not is_finite(section):
            raise ValueError("a number in it is not finite")
        return {key: value for key, value in section.items() if value is not None}

    @model_validator(mode="after")
    def _weigh_alike(self) -> Self:
        if not self.target_weights:
            count = len(self.data.target_names)
            object.__setattr__(self, "target_weights", (1 / count,) * count)  # the section is frozen from here on
        return self

    @property
    def gate_label(self) -> str:
        """The gate's name, with the paper's "+" where a local search goes with it."""
        return self.model.gate.name + ("+" if self.model.permutation or self.table_searches else "")

    @property
    def table_searches(self) -> list[SearchSchedule]:
        """The explicit searches over slot -> expert tables that are asked for, in the order in which they run."""
        return [search for search in (self.assignment_search, self.swap_search) if search is not None]

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return int(self.deepspeed.get("gradient_accumulation_steps", 1))

    def check(self, world_size: int) -> None:
        """Raise UserError for what does not fit together on ``world_size`` ranks."""
        data, model = self.data, self.model
        if model.kind != data.kind:
            fitting = " or ".join(models_of_kind(data.kind))
            raise UserError(f"model.name={model.name} does not fit data.name={data.name}; use {fitting}")
        targets = data.target_names
        if len(self.target_weights) != len(targets):
            raise UserError(
                f"target_weights={list(self.target_weights)}: data.name={data.name} has {len(targets)} target(s), "
                f"{', '.join(targets)}; give {len(targets)} weights"
            )
        if not any(self.target_weights):
            raise UserError(f"target_weights={list(self.target_weights)}: one of them must be above 0")
        for fault in model.validation_errors():
            raise UserError(f"model.{fault}")
        if self.start is not None and model.name not in self.start.models:
            fitting = " or ".join(self.start.models)
            raise UserError(f"start: for model.name={fitting}, not {model.name}; leave it out")
        self.recipe.check_config(self)
        head = getattr(model, "auxiliary_head", None)
        if head is not None and self.recipe.name != "dhkd":
            raise UserError(f"model.auxiliary_head={head}: nothing trains it without recipe.name=dhkd; set it to null")
        for fault in model.gate_errors():
            raise UserError(f"model.{fault}")
        for field, remedy in [] if model.num_moe_layers else self._needing_experts():
            without = "moe_every=0 leaves" if hasattr(model, "moe_every") else f"name={model.name} has"
            raise UserError(f"{field} needs experts, and model.{without} none; set it to {remedy}")
        for search in self.table_searches if not model.has_tables else ():
            raise UserError(f"{search.part}: model.name={model.name} has no slot -> expert table; set it to null")
        for search in self.table_searches:
            search.check_gate(model.gate)
        for called, count in model.expert_counts(data.target_names).items():
            self.parallel.check(world_size, count, called)
        if self.parallel.overlap_chunks > 1 and model.activation_checkpointing:
            raise UserError(
                f"parallel.overlap_chunks={self.parallel.overlap_chunks} does not go with "
                "model.activation_checkpointing=true; choose one of them"
            )
        check_deepspeed_section(self.deepspeed, self.train.batch_size, world_size)

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with the one before, by field."""
        content = self.plain()
        data = {f"data.{name}": v for name, v in content["data"].items() if name not in self.data.places}
        model = {f"model.{name}": v for name, v in content["model"].items() if name not in _PLACES_OF_MODELS}
        rest = {"target_weights": content["target_weights"], "train.batch_size": self.train.batch_size}
        start: dict[str, Any] = {}
        if self.start is not None:
            fields = self.start.model_dump(mode="json")
            start = {f"start.{name}": v for name, v in fields.items() if name not in self.start.places}
            start |= {f"start.{name}": fields[name] and "given" for name in self.start.places if name in fields}
        return super().identity() | data | model | start | rest

    def _needing_experts(self) -> Iterator[tuple[str, str]]:
        """Yield (field, value to set) for every field that needs MoE layers, for a model without any."""
        sections = {"model.permutation": self.model.permutation, "placement": self.placement}
        for field, section in (sections | {search.part: search for search in self.table_searches}).items():
            if section is not None:
                yield field, "null"
        if self.parallel.expert_parallel_size > 1:
            yield f"parallel.expert_parallel_size={self.parallel.expert_parallel_size}", "1"
