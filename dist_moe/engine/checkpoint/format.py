"""The format of a checkpoint: files, names of tensors, manifest, and the trainer's state.

    checkpoints/step-00000500/
        manifest.json             format, step, layout that wrote it, sizes, digests, and a digest of itself
        dense.safetensors         "NAME|master", "NAME|exp_avg", ... and "NAME|buffer"
        experts-00001.safetensors "NAME|master|EXPERT", ...: those experts that rank 1 wrote
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
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn

from dist_moe.config.files import digest_of, json_line, json_text, read_bytes, replace_text, restored
from dist_moe.config.settings import LARGEST_STEP
from dist_moe.errors import UserError
from dist_moe.experts import ExpertBank
from dist_moe.parallel import Placement

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
IDENTITY = "identity"
"""The name among the states of callbacks under which a run says what it is: see dist_moe.recipes.identity."""
OWN_DIGEST = "sha256"
"""The manifest's field for its own digest."""

CallbackStates = Mapping[str, dict[str, Any]]
"""The states of callbacks by their names, as JSON can hold them."""

LARGEST_JSON = 128 * 2**20
"""Bytes of the largest JSON file of a checkpoint that is written, and read."""
_KEY = re.compile(r"([^|]+)\|([A-Za-z_]\w*)(?:\|(0|[1-9][0-9]{0,8}))?", re.ASCII)
_VALUE_SHOWN = 60

Integer = Annotated[int, Field(strict=True)]
Step = Annotated[Integer, Field(ge=0, le=LARGEST_STEP)]
Size = Annotated[Integer, Field(ge=0)]
Positive = Annotated[Integer, Field(ge=1)]
Float = Annotated[float, Field(strict=True)]
Finite = Annotated[Float, Field(allow_inf_nan=False)]
AtLeastZero = Annotated[Finite, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^(trainer\.json|(dense|experts-[0-9]{5,9})\.safetensors)$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
CLOSED = ConfigDict(extra="forbid")
"""For what is read from a checkpoint: no field that is unknown."""

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint. Raises UserError naming the file, and what is wrong with it."""
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise UserError(f"checkpoint file {path} has {size} bytes; one of more than {LARGEST_JSON} is not read")
        content = restored(json.loads(read_bytes(path).decode(), object_pairs_hook=_unique))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint file {path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint file {path} holds no JSON object but {_shown(content)}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return content


def _checked(kind: type[T], content: Any, path: Path) -> T:
    """Return ``content`` as a ``kind``. Raises UserError naming the file, the first wrong field and its value."""
    try:
        checked: T = _adapter(kind).validate_python(content)  # type: ignore[arg-type]  # to mypy no class is hashable
        return checked
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field_name = ".".join(map(str, first["loc"])) or "its content"
        raise UserError(
            f"checkpoint file {path}: {field_name}={_shown(first['input'])}: {first['msg'].lower()}; "
            "use another checkpoint"
        ) from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _shown(value: Any) -> str:
    text = f"{type(value).__name__} of {len(value)}" if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= _VALUE_SHOWN else text[:_VALUE_SHOWN] + "..."


@dataclass(frozen=True)
class SavedPlacement:
    """A placement as JSON holds it, see :class:`Placement`."""

    num_ranks: Positive
    expert_of_position: list[Integer]

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    @property
    def placement(self) -> Placement:
        """The placement. Raises ValueError if it is none."""
        return Placement(tuple(self.expert_of_position), self.num_ranks)


SavedPlacements = dict[str, SavedPlacement]
"""By layer name; layers whose experts lie in order are absent."""


@dataclass(frozen=True)
class Layout:
    """The sizes and ZeRO stage of the job that wrote a checkpoint."""

    world_size: Positive
    expert_parallel_size: Positive
    zero_stage: Annotated[Integer, Field(ge=0, le=3)]

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED


@dataclass(frozen=True)
class Key:
    """The name of a tensor in a checkpoint: ``NAME|STATE``, or ``NAME|STATE|EXPERT`` for one expert's part."""

    name: str
    state: str
    expert: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the key that ``str`` gives as ``text``. Raises ValueError if there is none."""
        found = _KEY.fullmatch(text)
        if found is None:
            raise ValueError(f"{_shown(text)} is not NAME|STATE or NAME|STATE|EXPERT")
        name, state, expert = found.groups()
        return cls(name, state, None if expert is None else int(expert))

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

    ``files``, ``sizes``: sha256 and bytes by file name, of every other file of the checkpoint. ``layout``: of the job
    that wrote it, which no reader needs.
    """

    step: Step
    files: dict[FileName, Digest]
    sizes: dict[FileName, Size] = field(default_factory=dict)
    layout: Layout | None = None
    format_version: int = FORMAT_VERSION

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    @classmethod
    def of(cls, content: dict[str, Any], path: Path) -> Self:
        """Return the manifest in ``content``, read from ``path``. Raises UserError naming the field that is wrong."""
        manifest = _checked(cls, content, path)
        if manifest.files.keys() != manifest.sizes.keys() or not {TRAINER_FILE} <= manifest.files.keys():
            raise UserError(
                f"checkpoint file {path}: files={sorted(manifest.files)} and sizes={sorted(manifest.sizes)} must "
                f"name the same files, {TRAINER_FILE} among them"
            )
        return manifest

    @property
    def digest(self) -> str:
        """The sha256 of all fields."""
        return hashlib.sha256(json_text(asdict(self)).encode()).hexdigest()

    @property
    def text(self) -> str:
        """The content of the file MANIFEST, with a digest of all the rest."""
        return json_text(asdict(self) | {OWN_DIGEST: self.digest})


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

    step: Step
    scalars: dict[str, Finite]
    schedule_steps: Step
    validation_losses: dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,7})$")], Float] = field(
        default_factory=dict
    )
    training_seconds: AtLeastZero = 0.0
    imported_from: str | None = None
    placements: SavedPlacements = field(default_factory=dict)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    @property
    def identity(self) -> dict[str, Any]:
        """The digests of the run's data and of what it starts from, by name; empty where none are recorded."""
        return self.callbacks.get(IDENTITY, {})

    @property
    def history(self) -> TrainingHistory:
        """The course of the training up to this checkpoint."""
        losses = {int(step): loss for step, loss in self.validation_losses.items()}
        return TrainingHistory(losses, self.training_seconds)

    def write(self, directory: Path) -> dict[str, str]:
        """Write TRAINER_FILE, on one line; return its digest by its name. Raises OSError."""
        path, text = directory / TRAINER_FILE, json_line(asdict(self)) + "\n"
        if len(text) > LARGEST_JSON:
            sizes = {name: len(json_line(state)) for name, state in self.callbacks.items()}
            raise OSError(f"{path} would have {len(text)} bytes, at most {LARGEST_JSON} may; callbacks hold {sizes}")
        replace_text(path, text)
        return {path.name: digest_of(path)}


def read_trainer_state(directory: Path) -> TrainerState:
    """Return the content of a checkpoint besides tensors. Raises UserError naming the field that is wrong."""
    path = directory / TRAINER_FILE
    state = _checked(TrainerState, read_json(path), path)
    for name, saved in state.placements.items():
        try:
            _ = saved.placement
        except ValueError as error:
            raise UserError(f"checkpoint file {path}: placements.{name} is none: {_shown(str(error))}") from error
    if state.schedule_steps > state.step:
        raise UserError(f"checkpoint file {path}: schedule_steps={state.schedule_steps}, but step={state.step}")
    late = [step for step in state.validation_losses if int(step) > state.step]
    if late:
        raise UserError(f"checkpoint file {path}: validation_losses of step {late[0]}, but step={state.step}")
    return state
