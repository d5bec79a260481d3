"""The identity of a run beside its configuration: digests of its data, and of the weights from which it stems.

A run writes them into ``identity.json`` and every checkpoint when it begins. Whoever goes on with it, or evaluates,
searches or exports its weights on data compares: figures of other data, of another split or of ids that mean other
tokens look like any others. What was let pass by ``--allow-changed-data`` is recorded beside them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from dist_moe.config.files import read_json, write_json
from dist_moe.config.plain_yaml import yaml_text
from dist_moe.config.settings import Settings
from dist_moe.engine.callbacks import Callback
from dist_moe.engine.checkpoint.format import IDENTITY
from dist_moe.engine.checkpoint.loading import read_trainer_state
from dist_moe.engine.launch.environment import typed_command
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.training import Trainer
from dist_moe.errors import UserError
from dist_moe.recipes.recipe import RecipeConfig, RunStart

OPTION = "--allow-changed-data"

UNKNOWN = "{} has no digests of its data: whether they are the same is not known"
"""Said of a run that was written without."""

_IN_WORDS = {
    "train": "the prepared data of part train",
    "val": "the prepared data of part val",
    "test": "the prepared data of part test",
    "sizes": "the vocabulary or sizes that the model is built for",
    "preparation": "the code that prepares the data",
    "tokenizer": "the tokenizer",
    "encoder": "the encoder",
    "split": "the texts and their split",
    "start": "the start weights",
    "teacher": "the teacher",
    "source": "the source",
}


class Change(Settings):
    """A difference that was let pass: after which ``step``, what had ``changed`` by name, the digests ``before``."""

    step: int
    changed: tuple[str, ...]
    before: dict[str, str | None]


class Identity(Settings):
    """Digests by name. ``data``: those of the task. ``weights``: of what the run starts from, and of its teacher.
    ``changes``: what was let pass so far."""

    data: dict[str, str] = Field(default_factory=dict)
    weights: dict[str, str] = Field(default_factory=dict)
    changes: tuple[Change, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Return the content as JSON can hold it."""
        return self.model_dump(mode="json")

    def differences(self, other: Identity) -> list[str]:
        """Return the names under which two identities differ; where one of them is not known, nothing does.

        Data differ where one lacks a name, too; weights may be gone by now, and are compared where both are known.
        """
        both = self.weights.keys() & other.weights.keys()
        names = self.data.keys() | other.data.keys() if self.data and other.data else ()
        return [
            *(name for name in names if self.data.get(name) != other.data.get(name)),
            *(name for name in both if self.weights[name] != other.weights[name]),
        ]

    def write(self, run: RunDirectory) -> None:
        """Write the file of a run. Raises OSError."""
        write_json(run.identity, self.plain())


NOTHING = Identity()
"""The identity of which nothing is known, and from which nothing differs."""


class Described(Callback):
    """Writes down what is trained: its identity in every checkpoint, and with the configuration in the run's directory.

    There with the first records or the first validation, so that a start that fails before leaves no run behind.
    ``of_stage``: the fit is a stage's, and what is written into its directory is written into that of the whole run,
    too.
    """

    name = IDENTITY

    def __init__(self, start: RunStart, identity: Identity, *, of_stage: bool = False) -> None:
        self._start, self._identity, self._of_stage, self._is_done = start, identity, of_stage, False

    def state_dict(self) -> dict[str, Any]:
        """Return the identity as JSON can hold it."""
        return self._identity.plain()

    def on_records(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        """Write if that has not been done."""
        self._describe(trainer)

    def on_validation(self, trainer: Trainer, step: int, metrics: Mapping[str, Any]) -> None:
        """Write if that has not been done: a checkpoint of the best loss may follow."""
        self._describe(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Write if that has not been done: there was no step left."""
        self._describe(trainer)

    def _describe(self, trainer: Trainer) -> None:
        """Write the files, and show the trackers configuration, command and hyper-parameters."""
        if self._is_done:
            return
        self.write(trainer.run)
        config, monitor, step = self._start.config, trainer.monitor, trainer.step
        monitor.text("configuration", f"```yaml\n{yaml_text(config.plain())}\n```", step)
        monitor.text("command", f"`{shlex.join(typed_command())}`", step)
        monitor.hyperparameters(hyperparameters_of(config))

    def write(self, run: RunDirectory | None) -> None:
        """Write identity, configuration, and what is known of the machine into ``run``, on rank 0. Raises UserError."""
        if self._is_done or run is None or not self._start.environment.is_rank_zero:
            return
        self._is_done = True
        for one in (RunDirectory(run.root.parent.parent), run) if self._of_stage else (run,):
            self._identity.write(one)
            one.describe(self._start.config.plain(), self._start.environment)  # last: its presence makes it a run


def hyperparameters_of(config: RecipeConfig) -> dict[str, bool | float | str]:
    """Return by their paths the fields of a configuration that were chosen: names, and what is not the default."""
    chosen = dict(_leaves("", config.model_dump(mode="json", exclude_defaults=True)))
    every = _leaves("", config.plain())
    return {path: value for path, value in every if path in chosen or path.rpartition(".")[2] == "name"}


def _leaves(path: str, content: Any) -> Iterator[tuple[str, bool | float | str]]:
    """Yield the values in mappings, at any depth, by their paths; lists as text."""
    if isinstance(content, Mapping):
        for key, inner in content.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), inner)
    elif content is not None:
        yield path, content if isinstance(content, (bool, int, float, str)) else str(content)


def recorded_identity(run: RunDirectory, checkpoint: Path | None) -> Identity:
    """Return the identity that ``checkpoint`` of a run carries, else the one in the run's file.

    It is empty for a directory that holds no run, and for a run that was written without. Raises UserError for a file
    that cannot be read.
    """
    if checkpoint is not None and (content := read_trainer_state(checkpoint).identity):
        return identity_in(content, checkpoint)
    if not (run.config.is_file() and run.identity.is_file()):
        return NOTHING
    try:
        content = read_json(run.identity)
    except UserError as error:
        raise UserError(f"{error}; {_PUT_BACK}") from error
    return identity_in(content, run.identity)


def identity_in(content: Any, path: Path) -> Identity:
    """Return the identity that :meth:`Identity.plain` gave. Raises UserError, naming ``path``, if it is none."""
    try:
        return Identity.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path} says nothing readable of its data: {error.errors()[0]['msg']}; {_PUT_BACK}") from error


_PUT_BACK = "put back what was written, or train anew"


def check_same(subject: Path, recorded: Identity, present: Identity, *, allowed: bool = False) -> list[str]:
    """Return the names under which ``present`` differs from what was ``recorded`` of ``subject``, in order.

    Raises UserError that names them unless ``allowed``.
    """
    order = list(_IN_WORDS | recorded.data | present.data | present.weights)
    names = sorted(recorded.differences(present), key=order.index)
    if names and not allowed:
        raise UserError(
            f"{subject}: {_in_words(names)} changed since it was trained; put back what was there, or go on by "
            f"{OPTION}, which is recorded"
        )
    return names


def check_stem(field: str, run: Path, recorded: Identity, present: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise UserError where ``run``, from which another stems, is known to have other digests of ``names`` than these.

    ``field``: of the configuration, that names it. ``present``: digests of the task of the run that stems from it.
    """
    found = [name for name in names if name in recorded.data and recorded.data[name] != present.get(name)]
    if found:
        raise UserError(
            f"{field}={run} was trained with other data than this run has; what differs: {_in_words(found)}; name "
            "another, or train it anew"
        )


def let_pass(names: Sequence[str]) -> str:
    """Return the sentence about changes that the option lets pass."""
    return f"{_in_words(names)} changed since the run was trained; going on by {OPTION}"


def _in_words(names: Sequence[str]) -> str:
    return ", ".join(_IN_WORDS.get(name, name) for name in names)


def identify(start: RunStart, present: Identity, checkpoint: Path | None) -> Identity:
    """Return the identity of a run that begins, or goes on from ``checkpoint``, with what was let pass before.

    The warnings of ``start`` get a sentence where something is let pass or is not known. Raises UserError where it
    would become another run.
    """
    recorded = recorded_identity(start.run, checkpoint)
    state = None if checkpoint is None else read_trainer_state(checkpoint)
    if start.resumes and not recorded.data and not (state and state.imported_from):
        start.warnings.append(f"warning: {UNKNOWN.format(start.run.root)}")
    names = check_same(start.run.root, recorded, present, allowed=start.allow_changed_data)
    changes = recorded.changes
    if names:
        before = {name: (recorded.data | recorded.weights).get(name) for name in names}
        changes += (Change(step=state.step if state else 0, changed=tuple(names), before=before),)
        start.warnings.append(f"warning: {let_pass(names)}")
    return Identity(data=present.data, weights=recorded.weights | present.weights, changes=changes)
