"""A Hugging Face checkpoint directory as files: configuration, weights, tokenizer, module of our own classes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from dist_moe.config.files import json_text, read_json_object
from dist_moe.config.registry import UNKNOWN_NAME
from dist_moe.engine.checkpoint.safetensors_writer import TensorSpec, spec_in_file, write_pieces
from dist_moe.errors import UserError, shown

NAMES_SHOWN = 12
"""Tensors that a message names at most, of each kind."""
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

MIXTURE = "mixture"
"""Field of our own in config.json: the model's section of our configuration, as far as transformers' have no place."""

CONTEXT = "gate_context"
"""Field of our own in config.json, with ``total_steps`` of the training run, for gates with a schedule."""

IMPORTS = "imports"
"""Field of our own in config.json: modules that register gates and experts of the user's own."""


LARGEST_SIZE = 1 << 24
"""Largest width, vocabulary or the like of a config.json that is believed."""

_BUFFERS = re.compile(
    r"(?:.*\.)?(?:rotary_emb\.(?:\w*inv_freq|(?:cos|sin)_cached)|masked_bias|position_ids|token_type_ids)"
)
"""The names of constants that older versions of transformers kept beside weights, and that today's pass over."""

WEIGHTS_ARE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types of numbers that weights are read in."""

_MISFITS_SHOWN = 5


def is_constant(name: str) -> bool:
    """Return whether a tensor is no weight, but rotary frequencies for one, which transformers passes over."""
    return _BUFFERS.fullmatch(name) is not None


def check_specs(directory: Path, specs: Mapping[str, TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError naming the tensors that have not the given shapes or are no floating-point numbers.

    ``shapes``: what config.json says.
    """
    misfits = []
    for name, shape in shapes.items():
        if specs[name].dtype not in WEIGHTS_ARE:
            misfits.append(f"{name} is of {specs[name].dtype}, and weights are fp32, bf16, fp16 or fp64")
        elif specs[name].shape != shape:
            misfits.append(f"{name} has shape {specs[name].shape}, and {CONFIG} says {shape}")
    _refuse(directory, misfits)


def check_finite(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError naming the tensors with floating-point numbers that are not finite."""
    numbers = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    _refuse(directory, [f"{n} holds values that are not finite" for n, t in numbers.items() if not t.isfinite().all()])


def _refuse(directory: Path, misfits: Sequence[str]) -> None:
    if misfits:
        more = f" and {len(misfits) - _MISFITS_SHOWN} more" if len(misfits) > _MISFITS_SHOWN else ""
        raise UserError(
            f"the weights in {directory} cannot be taken: {'; '.join(misfits[:_MISFITS_SHOWN])}{more}. Remedy: write "
            "the model anew with transformers' save_pretrained, from weights that are sound"
        )


def field_errors(content: Mapping[str, Any], sizes: Iterable[str], numbers: Iterable[str] = ()) -> Iterator[str]:
    """Yield what is wrong with fields that are there: ``sizes``, whole numbers from 1, and ``numbers`` above 0."""
    for field in sizes:
        value = content.get(field, 1)
        if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
            yield f"{field}={shown(value)}; expected a whole number from 1 to {LARGEST_SIZE}"
    for field in numbers:
        value = content.get(field, 1)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            yield f"{field}={shown(value)}; expected a number above 0"


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of ``config.json``. Raises UserError."""
    return _read_object(directory / CONFIG, "a Hugging Face configuration")


@contextmanager
def followed() -> Iterator[None]:
    """Turn what pydantic says of a section within into a UserError."""
    try:
        yield
    except ValidationError as error:
        errors = []
        for each in error.errors():
            field = ".".join(map(str, each["loc"]))
            errors.append(f"{field}.{each['msg']}" if each["type"] == UNKNOWN_NAME else f"{field}: {each['msg']}")
        raise UserError(f"the Hugging Face configuration cannot be followed: {'; '.join(errors)}") from error


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of a directory by name, each read when it is asked for, and not kept. ``specs``: dtypes and shapes.

    Files are read, not mapped into memory: a model that passes through would leave all of its pages there. Raises
    UserError for files that are none, and for values that are not finite when they are read.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for path in files:
            self._open(path)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.specs  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def read(self, name: str, row: int | None = None) -> Tensor:
        """Return a tensor, or one row of it along axis 0. Raises UserError, also if its file can no longer be read."""
        (path, offset), spec = self._places[name], self.specs[name]
        if row is not None:
            spec = TensorSpec(spec.dtype, spec.shape[1:])
            offset += row * spec.num_bytes
        content = torch.empty(spec.num_bytes, dtype=torch.uint8)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                if file.readinto(content.numpy().data) != spec.num_bytes:
                    raise OSError("it has become shorter")
        except OSError as error:
            raise _unreadable(path, error) from error
        tensor = content.view(spec.dtype).view(spec.shape)
        check_finite(path.parent, {name: tensor})
        return tensor

    def without(self, names: Iterable[str]) -> StoredTensors:
        """Return the tensors but for some."""
        rest, left_out = StoredTensors(()), set(names)
        rest.specs = {name: spec for name, spec in self.specs.items() if name not in left_out}
        rest._places = self._places
        return rest

    def _open(self, path: Path) -> None:
        try:
            if path.exists() and not path.is_file():
                raise OSError("it is no file")
            with safe_open(path, framework="pt") as file:  # whose checks are thorough
                specs = {name: spec_in_file(file, name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            with path.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                header = json.loads(raw.read(length))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise _unreadable(path, error) from error
        self.specs |= specs
        self._places |= {name: (path, 8 + length + header[name]["data_offsets"][0]) for name in specs}


def open_tensors(directory: Path) -> StoredTensors:
    """Return all tensors, of ``model.safetensors`` or of the files that its index names. Raises UserError."""
    path, index = directory / WEIGHTS, directory / INDEX
    if path.is_file():
        return StoredTensors([path])
    if not index.is_file():
        endings = (".bin", ".h5", ".msgpack", ".safetensors", ".ckpt")
        beside = ", ".join(file.name for file in sorted(directory.glob("*")) if file.suffix in endings)
        raise UserError(
            f"{path} is not there (other weights: {beside or 'none'}). Remedy: load the directory with transformers "
            "and save_pretrained it elsewhere, which writes safetensors"
        )
    file_of = _read_object(index, "an index of weights").get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(file, str) for file in file_of.values()):
        raise UserError(f"{index} cannot be read as an index of weights: it has no weight_map of names of files")
    files = sorted(set(file_of.values()))
    for name in files:
        if name.startswith("/") or ".." in Path(name).parts or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {shown(name)}; expected .safetensors files of its own directory")
        found = StoredTensors([directory / name])
        if others := sorted(tensor for tensor in found if file_of.get(tensor) != name):
            raise UserError(f"{index} and its files do not agree on {', '.join(others)}")
    tensors = StoredTensors(directory / name for name in files)
    if missing := sorted(file_of.keys() - tensors.keys()):
        raise UserError(f"{index} and its files do not agree on {', '.join(missing)}")
    return tensors


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
    return UserError(f"{path} cannot be read: {reason}. Remedy: copy or download it again")


def _read_object(path: Path, what: str) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as {what}: {error}") from error


def check_names(directory: Path, found: set[str], wanted: set[str], what: str) -> None:
    """Raise UserError naming tensors that are missing or unknown. ``what``: the model that has those wanted."""
    errors = [
        f"{kind}: {', '.join(sorted(names)[:NAMES_SHOWN])}" + (", ..." if len(names) > NAMES_SHOWN else "")
        for kind, names in (("missing", wanted - found), ("unknown", found - wanted))
        if names
    ]
    if errors:
        raise UserError(
            f"{directory / WEIGHTS} has {len(found)} tensors, {what} has {len(wanted)}; {'; '.join(errors)}"
        )


@dataclass(frozen=True)
class Pieces:
    """A tensor to be written that comes piece by piece along axis 0; ``read`` gives them anew each time."""

    spec: TensorSpec
    read: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, tensor: Tensor) -> Pieces:
        """Return a tensor in one piece."""
        return cls(TensorSpec.of(tensor), lambda: (tensor,))


def write_directory(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Pieces]) -> None:
    """Write both files. Raises UserError if there are weights already, or if they cannot be written."""
    for name in (WEIGHTS, INDEX):
        if (directory / name).exists():
            raise UserError(f"{directory / name} exists already; name another directory")
    specs = {name: pieces.spec for name, pieces in tensors.items()}
    partial = directory / f".{WEIGHTS}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_pieces(partial, specs, lambda name: (piece.cpu() for piece in tensors[name].read()), {"format": "pt"})
        (directory / CONFIG).write_text(json_text(config, sort_keys=True), encoding="utf-8")
        partial.rename(directory / WEIGHTS)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{directory} cannot be written: {error}") from error


def tensors_of(model: nn.Module, dtype: torch.dtype | None, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``model.state_dict()`` with parameters in the precision ``dtype``, buffers as they are.

    None: that of the same parameter in ``like``, or else as it is.
    """
    parameters = dict(model.named_parameters())
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name in parameters.keys() & tensors.keys():
        tensors[name] = tensors[name].to(dtype or (like[name].dtype if name in like else tensors[name].dtype))
    return tensors


def dtype_fields(dtype: torch.dtype) -> dict[str, str]:
    """Return the fields of config.json; versions of transformers before 5 look for the second."""
    return dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))


def write_tokenizer(
    directory: Path,
    tokenizer: Tokenizer,
    max_length: int,
    special: Mapping[str, str | None],
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
) -> None:
    """Write a tokenizer beside a model. ``max_length``: tokens of a text. ``special``: what tokens are for:
    ``{"pad_token": "[PAD]"}`` (None: none). ``inputs``: what a model is to be given of a text.

    Raises UserError if the directory cannot be written.
    """
    about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    about["model_input_names"] = list(inputs)
    about |= {use: token for use, token in special.items() if token is not None}
    try:
        (directory / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (directory / TOKENIZER_CONFIG).write_text(json_text(about), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error}") from error


_SOURCE = '''"""{about} of the package comet-dist-moe."""

try:
    from dist_moe.models.hugging_face.{module} import (
        {classes},
    )
except ImportError as error:
    raise ImportError(
        "this model needs the package comet-dist-moe, whose import name is dist_moe (and not PyPI's dist-moe): "
        f"{{error}}"
    ) from error

__all__ = {names}
'''


@dataclass(frozen=True)
class RemoteCode:
    """The module that goes along with models of our own architectures: transformers runs it, and it finds dist_moe.

    ``module``: where the classes are, beside this file. ``classes``: ours, by transformers' Auto classes.
    """

    module: str
    about: str
    classes: dict[str, str]

    def fields(self, imports: Sequence[str]) -> dict[str, Any]:
        """Return the fields of config.json; ``imports``: modules that register gates of one's own."""
        return {
            "auto_map": {auto: f"{self.module}.{name}" for auto, name in self.classes.items()},
            IMPORTS: list(imports),
        }

    def write(self, directory: Path) -> None:
        """Write the module. Raises UserError if it cannot be written."""
        names = sorted(self.classes.values())
        source = _SOURCE.format(about=self.about, module=self.module, classes=",\n        ".join(names), names=names)
        path = directory / f"{self.module}.py"
        try:
            path.write_text(source, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}") from error


DECODER = RemoteCode(
    "modeling_dist_moe",
    "A decoder whose feed-forward layers are mixtures of experts",
    {"AutoConfig": "DistMoEConfig", "AutoModelForCausalLM": "DistMoEForCausalLM"},
)
BERT = RemoteCode(
    "modeling_dist_moe_bert",
    "A BERT whose feed-forward blocks are mixtures of experts",
    {
        "AutoConfig": "DistMoEBertConfig",
        "AutoModel": "DistMoEBertModel",
        "AutoModelForSequenceClassification": "DistMoEBertForSequenceClassification",
        "AutoModelForQuestionAnswering": "DistMoEBertForQuestionAnswering",
    },
)
