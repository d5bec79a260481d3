"""Recipes: methods of training by name, each with its own configuration, stages and result.

A recipe is a settings class for the section ``recipe`` of a configuration, with

    configuration   the class of the whole configuration file, which holds only what the recipe uses
    plan()          everything that can be checked, fetched and decided before any process group exists
    train()         the training itself, on all ranks

To add one: derive from :class:`RecipeSettings` and register it, here or in a module under ``imports``. See
docs/extending/recipe.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from pydantic import Field, SerializeAsAny

from dist_moe.config.overrides import parse_overrides
from dist_moe.config.plain_yaml import Content, read_yaml
from dist_moe.config.registry import Registry
from dist_moe.config.settings import Settings
from dist_moe.config.validation import import_modules, override, validate
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig
from dist_moe.engine.monitor.monitor import DEFAULT_TRACKERS
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.monitor.trackers import TrackerConfig, check_trackers
from dist_moe.errors import UserError
from dist_moe.screen import say

if TYPE_CHECKING:
    pass


class RecipeSettings(Settings, ABC):
    """The section ``recipe``: which method, and its own fields.

    ``places``: fields that say where files are, which may differ when a run is resumed.
    """

    configuration: ClassVar[type[RecipeConfig]]
    places: ClassVar[tuple[str, ...]] = ()

    name: str

    def check_config(self, config: Any) -> None:
        """Raise UserError for what of the whole configuration does not go with the recipe."""

    @property
    def teachers(self) -> tuple[Path, ...]:
        """Finished runs whose models every rank holds beside the one that it trains."""
        return ()

    @abstractmethod
    def plan(self, start: RunStart) -> Plan:
        """Check, fetch and decide all that needs no process group. Raises UserError. On every rank."""

    def result_of(self, root: Path) -> Path:
        """Return the run directory that holds the recipe's result, for a run in ``root``; a stage's, for some."""
        return root

    @abstractmethod
    def train(self, plan: Any) -> int:
        """Train as planned. Collective over all ranks. Returns 0, or 128 + signal if it was asked to stop."""


RECIPES = Registry("recipe", RecipeSettings, default="supervised")


class RecipeConfig(Settings):
    """The fields that the configuration of every recipe has."""

    imports: tuple[str, ...] = Field(
        (), description="Python modules to import first, for example one that registers a gate of your own"
    )
    recipe: Annotated[SerializeAsAny[RecipeSettings], RECIPES] = Field(
        default_factory=lambda: validate_recipe("supervised"), description="the method by which is trained"
    )
    seed: int = Field(0, ge=0, description="seed of initialisation, data order and dropout")
    parallel: ParallelConfig = Field(default_factory=lambda: ParallelConfig(), description="the layout")
    trackers: tuple[TrackerConfig, ...] = Field(
        DEFAULT_TRACKERS,
        description="what takes down the numbers of a run: jsonl (metrics.jsonl), tensorboard, wandb, mlflow",
    )

    def check(self, world_size: int) -> None:
        """Raise UserError for what does not fit together on ``world_size`` ranks."""

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with the one before, by field."""
        recipe = self.recipe.model_dump(mode="json", exclude={"name", *self.recipe.places})
        fields = {f"recipe.{name}": value for name, value in recipe.items()}
        return {"seed": self.seed, "recipe.name": self.recipe.name} | fields

    def fitted(self, world_size: int) -> Any:
        """Return the configuration for ``world_size`` ranks: smaller, where parallel.elastic allows it."""
        return self.model_copy(update={"parallel": self.parallel.fitted(world_size)})

    def plain(self) -> dict[str, Any]:
        """Return the content as YAML and JSON can hold it."""
        return self.model_dump(mode="json")


def validate_recipe(name: str) -> RecipeSettings:
    """Return the recipe ``name`` with its default fields."""
    settings = RECIPES.get(name)
    assert settings is not None, "the package registers its own recipes"
    return settings.model_validate({"name": name})


@dataclass(frozen=True)
class RunStart:
    """A run that is to begin or to go on. ``resumes``: whether ``run`` holds what it goes on from.
    ``warnings``: sentences for the user, to which a recipe's plan may add. ``allow_changed_data``: whether it may go on
    with other data, tokenizer or start weights, see :mod:`dist_moe.recipes.identity`."""

    config: Any
    run: RunDirectory
    environment: LaunchEnvironment
    resumes: bool = False
    warnings: list[str] = field(default_factory=list)
    allow_changed_data: bool = False

    def say(self, text: str) -> None:
        """Print a sentence for the user, on rank 0."""
        if self.environment.is_rank_zero:
            say(text)


class Plan(Protocol):
    """All that a recipe has checked and decided of a run before any process group exists."""

    @property
    def start(self) -> RunStart:
        """The run that is planned."""


def train(plan: Plan) -> int:
    """Train a run as planned by its recipe. Collective over all ranks. Returns the exit code."""
    result: int = plan.start.config.recipe.train(plan)
    return result


def load_config(path: Path, overrides: Sequence[str] = ()) -> Any:
    """Read ``path``, apply ``key.subkey=value`` overrides (values are YAML), and validate by the recipe's class.

    Raises UserError that names the file or the field, the value and what is allowed.
    """
    content = read_yaml(path)
    set_fields(content, overrides)
    return validate_config(content)


def set_fields(content: Content, overrides: Sequence[str]) -> None:
    """Set ``key.subkey=value`` overrides in ``content``; what a module of the user's registers is known meanwhile."""
    assignments = parse_overrides(overrides)
    import_modules(assignments.get("imports", content.get("imports")))
    name = assignments.get("recipe.name", assignments.get("recipe", content.get("recipe")))
    override(configuration_of(name), content, assignments)


def validate_config(content: Content) -> Any:
    """Return the configuration in ``content``, of its recipe's class.

    Raises UserError with one line per field that is unknown, of a wrong type or out of range.
    """
    import_modules(content.get("imports"))
    return validate(configuration_of(content.get("recipe")), content)


def configuration_of(recipe: Any) -> type[RecipeConfig]:
    """Return the class of a configuration whose section ``recipe`` is ``recipe``, of the default one if unknown."""
    name = recipe.get("name", RECIPES.default) if isinstance(recipe, dict) else recipe
    settings = RECIPES.get(name) or RECIPES.get(RECIPES.default)
    assert settings is not None, "the package registers its own recipes"
    return settings.configuration


def plan_new_run(config_path: Path, overrides: Sequence[str], run_dir: Path) -> Any:
    """Plan a new run. Raises UserError for a wrong configuration or layout, a used run directory, missing data."""
    return plan_run_of(load_config(config_path, overrides), run_dir)


def plan_run_of(
    config: RecipeConfig, run_dir: Path, option: str = "--run-dir", *, allow_changed_data: bool = False
) -> Any:
    """Plan a new run of a configuration. ``option``: of the command, for ``run_dir``. Raises UserError as above."""
    environment, fitted = _checked(config)
    run = RunDirectory(run_dir)
    if environment.is_rank_zero:
        run.check_unused(option)
    return _plan(RunStart(fitted, run, environment, allow_changed_data=allow_changed_data))


def plan_resumed_run(run_dir: Path, overrides: Sequence[str], *, allow_changed_data: bool = False) -> Any:
    """Plan the run in ``run_dir`` going on from where it is, or again if it died before it had a first checkpoint.

    Raises UserError if it is none, would be another, or if its checkpoints are gone.
    """
    run = RunDirectory(run_dir)
    run.check_exists()
    environment, config = _read(run.config, overrides)
    every = getattr(getattr(load_config(run.config), "train", None), "checkpoint_every", 1)
    # A second checkpoint is written after the first: a run that has come so far has had one, and lost it.
    is_young = not run.summary.exists() and run.last_step < 2 * every
    start = _going_on(config, run, environment, may_begin=is_young)
    return _plan(replace(start, allow_changed_data=allow_changed_data))


def plan_restartable_run(
    config_path: Path, overrides: Sequence[str], run_dir: Path, *, allow_changed_data: bool = False
) -> Any:
    """Plan a new run, or the one in ``run_dir`` going on from where it is: the same command serves for both.

    A run that has nothing to go on from yet begins again. Raises UserError as the two others do, and if ``run_dir``
    holds another run.
    """
    environment, config = _read(config_path, overrides)
    run = RunDirectory(run_dir)
    if run.config.exists() or run.has_progress:
        start = _going_on(config, run, environment, may_begin=True)
        return _plan(replace(start, allow_changed_data=allow_changed_data))
    if environment.is_rank_zero:
        run.check_unused()
    return _plan(RunStart(config, run, environment))


def _going_on(config: Any, run: RunDirectory, environment: LaunchEnvironment, *, may_begin: bool) -> RunStart:
    """Return the start of a run that is there already. ``may_begin``: again, where there is nothing to go on from."""
    run.check_exists()
    _check_same_run(load_config(run.config), config)
    start = RunStart(config, run, environment, resumes=run.has_progress or not may_begin)
    if not start.resumes:
        start.warnings.append(f"{run.root} has no checkpoint yet: the run begins again")
    return start


def _plan(start: RunStart) -> Plan:
    plan: Plan = start.config.recipe.plan(start)
    return plan


def _read(path: Path, overrides: Sequence[str]) -> tuple[LaunchEnvironment, Any]:
    return _checked(load_config(path, overrides))


def _checked(config: RecipeConfig) -> tuple[LaunchEnvironment, Any]:
    environment = LaunchEnvironment.read()
    fitted = config.fitted(environment.world_size)
    fitted.check(environment.world_size)
    check_trackers(fitted.trackers)
    return environment, fitted


def _check_same_run(recorded: RecipeConfig, config: RecipeConfig) -> None:
    """Raise UserError for a change after which the run's record would speak of another run."""
    before, after = recorded.identity(), config.identity()
    for name in before | after:
        there, here = before.get(name), after.get(name)
        if there != here:
            raise UserError(
                f"{name}={here!r}: the run was trained with {there!r}, and --resume goes on with the "
                f"same run. It may change train (but for batch_size), parallel, placement, deepspeed, swap_search, "
                f"assignment_search, model.activation_checkpointing and where things are (data.root, data.cache, "
                f"data.encoder, start.run, recipe.teacher, recipe.source); for anything else start a new run"
            )
