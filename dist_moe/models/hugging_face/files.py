"""A Hugging Face checkpoint directory as files: ``config.json`` and ``model.safetensors``, one file or several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_moe.errors import UserError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def read_config(directory: Path) -> dict[str, Any]:
    """The content of ``config.json``. Raises UserError."""
    return _read_object(directory / CONFIG, "a Hugging Face configuration")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors by name, of ``model.safetensors`` or of the files that its index names. Raises UserError."""
    path = directory / WEIGHTS
    if path.is_file():
        return _load(path)
    if (directory / INDEX).is_file():
        return _load_several(directory)
    beside = ", ".join(_weights_beside(directory)) or "none"
    raise UserError(
        f"{path} is not there (other weights: {beside}). Remedy: load the directory with transformers and "
        "save_pretrained it elsewhere, which writes safetensors"
    )


def check_names(directory: Path, found: set[str], wanted: set[str], what: str) -> None:
    """Raise UserError naming every tensor that is missing or unknown. ``what``: the model that has those wanted."""
    faults = [
        f"{kind}: {', '.join(sorted(names))}"
        for kind, names in (("missing", wanted - found), ("unknown", found - wanted))
        if names
    ]
    if faults:
        raise UserError(
            f"{directory / WEIGHTS} has {len(found)} tensors, {what} has {len(wanted)}; {'; '.join(faults)}"
        )


def write_directory(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files. Raises UserError if there are weights already, or if they cannot be written."""
    for name in (WEIGHTS, INDEX):
        if (directory / name).exists():
            raise UserError(f"{directory / name} exists already; name another directory")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(whole, directory / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(directory / CONFIG, directory / WEIGHTS)  # the library's files are for their owner's eyes only
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory} cannot be written: {error}") from error


def tensors_of(model: nn.Module, dtype: torch.dtype | None, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of ``model.state_dict()``: parameters in the precision ``dtype``, buffers as they are.

    None: that of the same parameter in ``like``, or else as it is.
    """
    parameters = dict(model.named_parameters())
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name in parameters.keys() & tensors.keys():
        tensors[name] = tensors[name].to(dtype or (like[name].dtype if name in like else tensors[name].dtype))
    return tensors


def dtype_fields(dtype: torch.dtype) -> dict[str, str]:
    """Of config.json; versions of transformers before 5 look for the second."""
    return dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _load_several(directory: Path) -> dict[str, Tensor]:
    file_of = _read_object(directory / INDEX, "an index of weights").get("weight_map")
    if not isinstance(file_of, dict):
        raise UserError(f"{directory / INDEX} cannot be read as an index of weights: it has no weight_map")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(file_of.values())):
        tensors |= _load(directory / name)
    if tensors.keys() != file_of.keys():
        raise UserError(
            f"{directory / INDEX} and its files do not agree on {', '.join(sorted(tensors.keys() ^ file_of.keys()))}"
        )
    return tensors


def _read_object(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as {what}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read as {what}: it is no JSON object")
    return content


def _weights_beside(directory: Path) -> Iterator[str]:
    endings = (".bin", ".h5", ".msgpack", ".safetensors", ".ckpt")
    return (file.name for file in sorted(directory.glob("*")) if file.suffix in endings)
