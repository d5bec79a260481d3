"""The configuration of a supervised run: YAML, overrides, and every check that needs no process group."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator

from dist_moe.config.listing import fields_of
from dist_moe.config.overrides import Content, assign, parse_override, read_yaml
from dist_moe.config.settings import Settings
from dist_moe.data.labelled_text import LabelledTextConfig, QuestionsConfig
from dist_moe.data.movielens import MovieLensConfig
from dist_moe.data.text import TextConfig
from dist_moe.data.two_images import TwoImagesConfig
from dist_moe.engine.deepspeed.checks import check_deepspeed_section
from dist_moe.engine.deepspeed.gradient_alignment import check_alignment
from dist_moe.engine.launch.process_groups import ParallelConfig
from dist_moe.engine.loop import TrainConfig
from dist_moe.errors import UserError
from dist_moe.gates import gate_settings
from dist_moe.models import (
    BertAnswererConfig,
    BertClassifierConfig,
    BertConfig,
    MoEModelConfig,
    RecommenderConfig,
    TransformerConfig,
    TwoImageClassifierConfig,
)
from dist_moe.recipes.callbacks.swap_search import SwapScheduleConfig
from dist_moe.recipes.distillation.sections import DHKDSection, DistillationSection, MoEBERTSection
from dist_moe.recipes.supervised.start.bert_config import TextStartConfig
from dist_moe.recipes.supervised.start.decoder_config import DecoderStartConfig
from dist_moe.search.placement_policy import PlacementScheduleConfig

DataConfig = Annotated[
    MovieLensConfig | TwoImagesConfig | TextConfig | LabelledTextConfig | QuestionsConfig, Field(discriminator="name")
]
ModelConfig = Annotated[
    RecommenderConfig | TwoImageClassifierConfig | TransformerConfig | BertClassifierConfig | BertAnswererConfig,
    Field(discriminator="name"),
]
StartConfig = Annotated[TextStartConfig | DecoderStartConfig, Field(discriminator="name")]
TaskWeight = Annotated[float, Field(ge=0)]

S = TypeVar("S", bound=Settings)

_MODEL_FOR: dict[type[Settings], type[MoEModelConfig]] = {
    MovieLensConfig: RecommenderConfig,
    TwoImagesConfig: TwoImageClassifierConfig,
    TextConfig: TransformerConfig,
    LabelledTextConfig: BertClassifierConfig,
    QuestionsConfig: BertAnswererConfig,
}


class RunConfig(Settings):
    """Supervised training of a model on a data set."""

    imports: tuple[str, ...] = Field(
        (), description="Python modules to import first, for example one that registers a gate of your own"
    )
    seed: int = Field(0, ge=0, description="seed of initialisation, data order and dropout")
    data: DataConfig = Field(default_factory=lambda: MovieLensConfig(), description="the data set")
    model: ModelConfig = Field(
        default_factory=lambda: RecommenderConfig(), description="the model; by default the one that fits the data"
    )
    task_weights: tuple[TaskWeight, ...] = Field(
        (0.5, 0.5),
        description="one weight per task, all alike if not given. recommender: cross-entropy of 'watched', squared "
        "error of the rating; two images: cross-entropy of the top left, of the bottom right one; transformer: "
        "cross-entropy of the next token; bert_classifier: cross-entropy of the class, or squared error of the number; "
        "bert_answerer: mean of the cross-entropies of an answer's two ends",
    )
    swap_search: SwapScheduleConfig | None = Field(
        None,
        description="explicit local search by swaps, at chosen steps of the training (null: none); not while a "
        "permutation is being learnt, which would overwrite what it finds",
    )
    placement: PlacementScheduleConfig | None = Field(
        None,
        description="moving experts between the ranks of a group while training, so that the heaviest rank gets "
        "lighter (null: experts stay where they are); the model computes the same either way",
    )
    start: StartConfig | None = Field(
        None, description="what a BERT or a transformer starts from (null: all-MiniLM-L6-v2; random weights)"
    )
    distillation: DistillationSection | None = Field(
        None, description="the teacher whom a BERT follows beside the labels (null: none)"
    )
    train: TrainConfig = Field(default_factory=lambda: TrainConfig(), description="length and rhythm")
    parallel: ParallelConfig = Field(default_factory=lambda: ParallelConfig(), description="the layout")
    deepspeed: dict[str, Any] = Field(
        default_factory=lambda: {
            "optimizer": {"type": "AdamW", "params": {"lr": 5e-4, "eps": 1e-7, "weight_decay": 0.0}},
            "zero_optimization": {"stage": 1},
        },
        description="DeepSpeed's own JSON configuration, passed through (optimizer, zero_optimization, ...)",
    )

    @field_validator("deepspeed")
    @classmethod
    def _null_is_left_out(cls, section: dict[str, Any]) -> dict[str, Any]:
        """So that an override can take away what a file has, such as its scheduler."""
        return {key: value for key, value in section.items() if value is not None}

    @property
    def gate_label(self) -> str:
        """The gate's name, with the paper's "+" where a local search goes with it."""
        return self.model.gate.name + ("+" if self.model.permutation or self.swap_search else "")

    def check(self, world_size: int) -> None:
        """Raise UserError for what does not fit together on ``world_size`` ranks."""
        fitting = _MODEL_FOR[type(self.data)].model_fields["name"].default
        if self.model.name != fitting:
            raise UserError(f"model.name={self.model.name} does not fit data.name={self.data.name}; use {fitting}")
        tasks = self.model.num_tasks
        if len(self.task_weights) != tasks:
            raise UserError(
                f"task_weights={list(self.task_weights)}: model.name={self.model.name} has {tasks} task(s); "
                f"give {tasks} weights"
            )
        if not any(self.task_weights):
            raise UserError(f"task_weights={list(self.task_weights)}: one of them must be above 0")
        for fault in self.model.faults():
            raise UserError(f"model.{fault}")
        if self.start is not None and self.model.name not in _names(type(self.start)):
            fitting = " or ".join(_names(type(self.start)))
            raise UserError(f"start: for model.name={fitting}, not {self.model.name}; leave it out")
        self._check_distillation()
        for fault in self.model.gate.faults(self.model.num_experts):
            raise UserError(f"model.gate.{fault}")
        for field, remedy in [] if self.model.num_moe_layers else self._what_needs_experts():
            raise UserError(f"{field} needs experts, and model.moe_every=0 leaves none; set it to {remedy}")
        self.parallel.check(world_size, self.model.num_experts)
        if self.parallel.overlap_chunks > 1 and self.model.activation_checkpointing:
            raise UserError(
                f"parallel.overlap_chunks={self.parallel.overlap_chunks} does not go with "
                "model.activation_checkpointing=true; choose one of them"
            )
        if self.placement is not None:
            self.placement.check(self.parallel.expert_parallel_size)
        check_deepspeed_section(self.deepspeed, self.train.batch_size, world_size)

    def _check_distillation(self) -> None:
        if self.distillation is not None and not isinstance(self.model, BertConfig):
            fitting = " or ".join(_names(TextStartConfig))
            raise UserError(f"distillation: for model.name={fitting}, not {self.model.name}; leave it out")
        head = self.model.auxiliary_head if isinstance(self.model, BertClassifierConfig) else None
        if not isinstance(self.distillation, DHKDSection):
            if head is not None:
                raise UserError(
                    f"model.auxiliary_head={head}: nothing trains it without distillation.name=dhkd; set it to null"
                )
            return
        if head is None:
            raise UserError(
                "distillation.name=dhkd: a second head learns the teacher's logits, and there is none; set "
                "model.auxiliary_head=mlp (or linear) of a bert_classifier"
            )
        if self.distillation.align_gradients:
            check_alignment(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    def _what_needs_experts(self) -> Iterator[tuple[str, str]]:
        """What of this configuration is for models with MoE layers, and its value for others."""
        sections = {"model.permutation": self.model.permutation, "swap_search": self.swap_search}
        for field, section in (sections | {"placement": self.placement}).items():
            if section is not None:
                yield field, "null"
        if self.parallel.expert_parallel_size > 1:
            yield f"parallel.expert_parallel_size={self.parallel.expert_parallel_size}", "1"

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return int(self.deepspeed.get("gradient_accumulation_steps", 1))

    def fitted(self, world_size: int) -> RunConfig:
        """For ``world_size`` ranks: smaller, where parallel.elastic allows it."""
        return self.model_copy(update={"parallel": self.parallel.fitted(world_size)})

    def plain(self) -> dict[str, Any]:
        """As YAML and JSON can hold it."""
        return self.model_dump(mode="json")


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``path``, apply ``key.subkey=value`` overrides (values are YAML), and validate.

    Raises UserError that names the file or the field, the value and what is allowed.
    """
    content = read_yaml(path)
    override(content, dict(parse_override(text) for text in overrides))
    return validate_config(content)


def override(content: Content, assignments: Mapping[str, Any]) -> None:
    """Set fields by their dotted names. A gate switched by its name alone keeps what fields it shares."""
    model = content.get("model")
    if isinstance(model, dict) and isinstance(model.get("gate"), str):
        content["model"] = model | {"gate": {"name": model["gate"]}}
    if "model.gate.name" in assignments:
        _import_modules(assignments.get("imports", content.get("imports")))
        _drop_fields_of_another_gate(content, assignments["model.gate.name"])
    for key, value in assignments.items():
        assign(content, key, value)


def validate_config(content: Content) -> RunConfig:
    """Raise UserError with one line per field that is unknown, of a wrong type or out of range."""
    _import_modules(content.get("imports"))
    return _validated(RunConfig, _with_names(content))


def validate_section(section: type[S], overrides: Sequence[str]) -> S:
    """A single section from ``key=value`` overrides of its defaults; raises UserError likewise."""
    return _validated(section, dict(parse_override(text) for text in overrides))


def _validated(config: type[S], content: Content) -> S:
    try:
        return config.model_validate(content)
    except ValidationError as error:
        lines = [_explain(fault, config) for fault in error.errors()]
        raise UserError("the configuration is not valid:\n  " + "\n  ".join(lines)) from error


def _import_modules(names: Any) -> None:
    """Import the modules under ``imports``, also from the working directory."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return  # absent, or a mistake that validation explains
    if names and "" not in sys.path:
        sys.path.insert(0, "")
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever the user's own module may do wrong
            kind = type(error).__name__
            raise UserError(
                f"imports: the module {name!r} cannot be imported: {kind}: {error}; {_import_remedy(name, error)}"
            ) from error


def _import_remedy(name: str, error: BaseException) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f"{name}.".startswith(f"{missing}."):
        return (
            f"it is searched for in the working directory {Path.cwd()} and on PYTHONPATH: start from the directory "
            f"that holds {missing}, or put that directory on PYTHONPATH"
        )
    return f"install {missing}" if missing is not None else "mend the module, or take it out of imports"


def _with_names(content: Content) -> Content:
    """``content`` with data.name, model.name and task_weights filled in where they are left out."""
    data, model = ({} if content.get(key) is None else content[key] for key in ("data", "model"))
    name = None
    if isinstance(data, dict):
        data = {"name": "movielens-1m"} | data
        name = data["name"]
    fitting = next((model for config, model in _MODEL_FOR.items() if name in _names(config)), RecommenderConfig)
    if isinstance(model, dict):
        model = {"name": fitting.model_fields["name"].default} | model
    content = {"task_weights": [1 / fitting.num_tasks] * fitting.num_tasks} | content
    named: Content = {"data": data, "model": model}
    start: Any = content.get("start")
    if isinstance(start, dict):
        known = (*_names(TextStartConfig), *_names(DecoderStartConfig))
        name = model["name"] if isinstance(model, dict) else None
        named["start"] = {"name": name if name in known else known[0]} | start
    distillation: Any = content.get("distillation")
    if isinstance(distillation, dict):
        named["distillation"] = {"name": _names(MoEBERTSection)[0]} | distillation
    return content | named


def _drop_fields_of_another_gate(content: Content, name: str) -> None:
    """Switching the gate by name alone keeps only those of the file's fields that the new gate has."""
    gate = (content.get("model") or {}).get("gate")
    settings = gate_settings().get(name)
    if isinstance(gate, dict) and gate.get("name") != name and settings is not None:
        content["model"]["gate"] = {key: value for key, value in gate.items() if key in settings.model_fields}


def _explain(fault: Any, config: type[Settings]) -> str:
    field = ".".join(part for part in map(str, fault["loc"]) if part not in _TAGS)
    if fault["type"] == "missing":
        return f"{field}: required, but not given"
    if fault["type"] == "union_tag_invalid":
        return f"{field}.name={fault['ctx']['tag']!r}: there is no such one; allowed: {fault['ctx']['expected_tags']}"
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, [known.name for known in fields_of(config)], n=1)
        hint = f"; did you mean {near[0]}?" if near else "; see 'dist-moe config --fields'"
        if near == [field]:  # of another member of a union
            hint = f" with this {field.rpartition('.')[0]}.name; see 'dist-moe config --fields'"
        return f"{field}={fault['input']!r}: there is no such field{hint}"
    message = fault["msg"].removeprefix("Value error, ").replace("valid tuple", "list, for example '[a, b]'")
    if message.startswith("gate.name="):
        return f"{field.removesuffix('gate')}{message}"
    return f"{field}={fault['input']!r}: {message[0].lower() + message[1:]}"


def _names(config: type[BaseModel]) -> tuple[str, ...]:
    """What the ``name`` of a section can be."""
    return get_args(config.model_fields["name"].annotation)


_NAMED: tuple[type[BaseModel], ...] = (*_MODEL_FOR, *_MODEL_FOR.values(), MoEBERTSection, DHKDSection)
_TAGS = frozenset(name for config in _NAMED for name in _names(config))
"""The names by which pydantic tells the members of a union apart in a fault's location."""
