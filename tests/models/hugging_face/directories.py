"""Hugging Face directories, changed by hand, and the numbers of them that must be equal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

_LOAD = """
import sys, torch, transformers
assert "dist_moe" not in sys.modules
auto = getattr(transformers, sys.argv[1])
model, said = auto.from_pretrained(sys.argv[2], trust_remote_code=True, output_loading_info=True)
assert not any(said.values()), said
torch.save(model.eval()(**torch.load(sys.argv[3])).logits, sys.argv[4])
"""


def logits_elsewhere(auto: str, directory: Path, inputs: Tensors) -> Tensor:
    """Logits of the model in ``directory`` in a process that knows nothing of ours, which runs beside it."""
    at = directory.parent
    torch.save(inputs, at / "inputs")
    files = [str(path) for path in (directory, at / "inputs", at / "logits")]
    subprocess.run([sys.executable, "-c", _LOAD, auto, *files], check=True, timeout=500, cwd=at)
    logits: Tensor = torch.load(at / "logits")
    return logits


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Change the weights."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    return directory


def reconfigure(directory: Path, **fields: Any) -> Path:
    """Change fields of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def assert_same_directories(one: Path, other: Path) -> Tensors:
    """Tensors equal to the bit, in their precision, and the same fields; returns the tensors."""
    read, written = (load_file(path / "model.safetensors") for path in (one, other))
    assert read.keys() == written.keys()
    assert all(read[name].dtype == written[name].dtype and torch.equal(read[name], written[name]) for name in read)
    config, again = (json.loads((path / "config.json").read_text()) for path in (one, other))
    assert config == again
    return read
