"""The format of a checkpoint: files, names of tensors, manifest, and the trainer's state.

    checkpoints/step-00000500/
        manifest.json             format, step, layout that wrote it, digests, and a digest of itself
        dense.safetensors         "NAME|master", "NAME|exp_avg", ... and "NAME|buffer"
        experts-00001.safetensors "NAME|master|EXPERT", ...: the experts of expert-parallel rank 1
        trainer.json              step, optimizer's step counter, steps of the learning-rate schedule, validations,
                                  placements, what the callbacks hold

Experts are stored one by one under their global id, masters and moments whole and in fp32, so that a checkpoint
loads at any number of ranks, expert-parallel size and ZeRO stage: with its placements where the expert-parallel
size is the same, else with experts in order. A parameter that was held still has a master and no moments. Every
random number of a step is drawn from (seed, step, rank), and the order of the data from (seed, epoch), hence
neither has a state to save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import nn

from dist_moe.config.files import digest_of, json_text, write_json
from dist_moe.experts import ExpertBank

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
DENSE_FILE = "dense.safetensors"
EXPERT_FILES = "experts-"
"""The beginning of the names of files with experts."""
TRAINER_FILE = "trainer.json"
BUFFER = "buffer"
"""The state of a buffer; those of a parameter are MASTER and the optimizer's."""
DENSE, EXPERTS = "dense", "experts"
"""The kinds of tensors of a model, beside BUFFER."""
OWN_DIGEST = "sha256"
"""The manifest's field for its own digest."""

CallbackStates = Mapping[str, dict[str, Any]]
"""The states of callbacks by their names, as JSON can hold them."""
SavedPlacements = dict[str, dict[str, Any]]
"""Layer name -> ``num_ranks`` and ``expert_of_position``; layers whose experts lie in order are absent."""


@dataclass(frozen=True)
class Key:
    """The name of a tensor in a checkpoint: ``NAME|STATE``, or ``NAME|STATE|EXPERT`` for one expert's part."""

    name: str
    state: str
    expert: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the key that ``str`` gives as ``text``."""
        name, state, *expert = text.split("|")
        return cls(name, state, int(expert[0]) if expert else None)

    def __str__(self) -> str:
        return f"{self.name}|{self.state}" + ("" if self.expert is None else f"|{self.expert}")


def expert_file(index: int) -> str:
    """Return the name of the ``index``-th file of experts."""
    return f"{EXPERT_FILES}{index:05d}.safetensors"


def expert_ids_by_parameter(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Sequence[int] | None]]:
    """Yield (name, parameter, global ids of the experts along axis 0, or None for a dense parameter)."""
    ids = {
        f"{bank_name}.{name}" if bank_name else name: bank.expert_ids
        for bank_name, bank in model.named_modules()
        if isinstance(bank, ExpertBank)
        for name, _ in bank.named_parameters()
    }
    for name, parameter in model.named_parameters():
        yield name, parameter, ids.get(name)


@dataclass(frozen=True)
class Manifest:
    """The list of a checkpoint's files.

    ``files``: sha256 by file name, of every other file of the checkpoint. ``layout``: sizes and ZeRO stage of the
    job that wrote it, which no reader needs.
    """

    step: int
    files: dict[str, str]
    layout: dict[str, int] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def text(self) -> str:
        """The content of the file MANIFEST, with a digest of all the rest."""
        content = asdict(self)
        return json_text(content | {OWN_DIGEST: hashlib.sha256(json_text(content).encode()).hexdigest()})


@dataclass(frozen=True)
class TrainingHistory:
    """The course of a training so far. ``validation_losses``: by step. ``seconds``: spent training, in all."""

    validation_losses: Mapping[int, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class TrainerState:
    """The content of a checkpoint besides tensors.

    ``scalars``: the optimizer's, see ParameterState. ``schedule_steps``: taken by the learning-rate schedule, which are
    all that it has of a state. ``validation_losses``, ``training_seconds``: of the run so far, the former by step.
    ``imported_from``: the exported file whose weights these are, where there is no optimizer state yet.
    ``placements``: where experts do not lie in order. ``callbacks``: what they hold, by their names.
    """

    step: int
    scalars: dict[str, float]
    schedule_steps: int
    validation_losses: dict[str, float] = field(default_factory=dict)
    training_seconds: float = 0.0
    imported_from: str | None = None
    placements: SavedPlacements = field(default_factory=dict)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def history(self) -> TrainingHistory:
        """The course of the training up to this checkpoint."""
        losses = {int(step): loss for step, loss in self.validation_losses.items()}
        return TrainingHistory(losses, self.training_seconds)

    def write(self, directory: Path) -> dict[str, str]:
        """Write TRAINER_FILE; return its digest by its name. Raises OSError."""
        path = directory / TRAINER_FILE
        write_json(path, asdict(self))
        return {path.name: digest_of(path)}
