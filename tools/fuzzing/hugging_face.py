"""Odd Hugging Face directories; what is accepted must be, to the bit, what the files say by a naive reading."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_moe.gates import CometConfig, GateContext, HashRoutingConfig, TopKConfig
from dist_moe.models import BertClassifierConfig, RunShape, TransformerConfig
from dist_moe.models.bert import read_hugging_face, write_hugging_face
from dist_moe.models.hugging_face.decoder import read_decoder, write_decoder
from dist_moe.models.hugging_face.files import INDEX, WEIGHTS
from dist_moe.parallel import SingleWorld
from dist_moe.tasks.labelled_text.encoder import find_encoder
from tests.helpers.text_runs import write_encoder
from tools.fuzzing.case import Area, Case, Must
from tools.fuzzing.mutate import copied, odd_bytes, odd_file, odd_json

Tensors = dict[str, Tensor]

SIZES: dict[str, Any] = {"layers": 2, "dim": 8, "heads": 4, "kv_heads": 2, "dense_hidden": 6, "moe_every": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"moe_every": 0, "tied_embeddings": False},
    "mixtral": {"moe_every": 1, "gate": TopKConfig(k=2, bias=False), "num_experts": 3, "experts": {"hidden": 5}},
    "dist_moe": {"gate": CometConfig(k=2, gamma=1.0), "num_experts": 4, "experts": {"hidden": 5}},
    "dist_moe, hash": {"gate": HashRoutingConfig(), "num_experts": 4, "experts": {"hidden": 5}},
}
HARMLESS = {"a constant more", "several files"}
"""Changes after which a directory is still right."""

OURS = ("auto_map", "imports", "architectures", "model_type", "gate_context", "dtype", "torch_dtype")
CONSTANTS = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "model.embeddings.position_ids",
)


class HuggingFaceArea(Area):
    """Directories of decoders and of a BERT encoder, with one thing or two changed."""

    name = "hugging_face"

    def prepare(self) -> None:
        """Write each directory once."""
        for name, fields in DECODERS.items():
            model = TransformerConfig.model_validate({**SIZES, **fields}).build(11, _run(11))
            write_decoder(model, self.base / name, architecture=name.partition(",")[0])  # type: ignore[arg-type]
        write_encoder(self.base / "bert")

    def case(self, drawn: random.Random, user: Path, ours: Path) -> Case:
        """Change a directory."""
        name = drawn.choice([*DECODERS, "bert"])
        copied(self.base / name, user)
        kind = drawn.choices(["none", "kind", "bytes", "config", "tensors", "twice"], [1, 2, 3, 8, 8, 3])[0]
        must: Must = "accept" if kind == "none" else None
        path = drawn.choice(sorted(path for path in user.iterdir() if path.suffix != ".py"))
        if kind in ("none", "kind"):
            what = odd_file(path, drawn) if kind == "kind" else kind
        elif kind == "bytes":
            what = odd_bytes(path, drawn)
        elif kind == "config":
            what = self._config(user, drawn)
        else:
            what = _change(user, drawn)
            if what in HARMLESS and not (name == "bert" and what == "several files"):
                must = "accept"
            if kind == "twice":
                what, must = f"{what}; {self._config(user, drawn)}", None
        read = _read_bert if name == "bert" else _read_decoder
        return Case(f"{name}: {what}", lambda: read(user), lambda found: _difference(user, ours, found), must)

    @staticmethod
    def _config(user: Path, drawn: random.Random) -> str:
        content, what = odd_json(json.loads((user / "config.json").read_text(encoding="utf-8")), drawn)
        (user / "config.json").write_text(json.dumps(content), encoding="utf-8")
        return f"config.json: {what}"


def _run(vocab: int) -> RunShape:
    return RunShape(SingleWorld(), 10, GateContext(torch.arange(vocab) + 1, 100))


def _read_decoder(user: Path) -> Any:
    checkpoint = read_decoder(user)
    with torch.device("meta"):
        checkpoint.into(checkpoint.config.build(checkpoint.vocab_size, _run(checkpoint.vocab_size)))
    model = checkpoint.config.build(checkpoint.vocab_size, _run(checkpoint.vocab_size))
    checkpoint.into(model)
    return lambda directory: write_decoder(model, directory, like=checkpoint)


def _read_bert(user: Path) -> Any:
    find_encoder(user, None, progress=False)
    checkpoint = read_hugging_face(user)
    model = BertClassifierConfig(moe_every=0).build(checkpoint.shape, 2, RunShape(SingleWorld(), 1))
    checkpoint.into(model)
    return lambda directory: write_hugging_face(model, directory, like=checkpoint)


def _difference(user: Path, ours: Path, write: Callable[[Path], object]) -> str | None:
    """Write what was read as another directory, and compare both by a reader of their own."""
    write(ours / "again")
    files = sorted(user.glob("*.safetensors")) if not (user / WEIGHTS).is_file() else [user / WEIGHTS]
    naive = {name: values for file in files for name, values in naive_tensors(file).items()}
    again = naive_tensors(ours / "again" / WEIGHTS)
    constants = [name for name in naive if name.endswith(("inv_freq", "position_ids"))]
    for name in naive.keys() - constants:
        theirs = name.replace("gamma", "weight").replace("beta", "bias")
        if theirs not in again:
            return f"{name} is lost"
        if not np.array_equal(naive[name], again[theirs]):
            return f"{name} is another"
        if naive[name].dtype.kind == "f" and not np.isfinite(naive[name]).all():
            return f"{name} is not finite, and was taken"
    configs = (json.loads((place / "config.json").read_text(encoding="utf-8-sig")) for place in (user, ours / "again"))
    # What only names our classes is written anew.
    there, here = (json.dumps({k: v for k, v in c.items() if k not in OURS}, sort_keys=True) for c in configs)
    return None if there == here else f"config.json is another: {there} {here}"


def naive_tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file by name, bf16 as fp32, read by its description alone."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "BOOL": "?", "BF16": "<u2"}
    tensors = {}
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            values = np.frombuffer(content[8 + length + begin : 8 + length + end], kinds[entry["dtype"]])
            if entry["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def _change(user: Path, drawn: random.Random) -> str:
    path = user / WEIGHTS
    tensors = load_file(path)
    name = drawn.choice(sorted(tensors))
    other = drawn.choice(sorted(tensors))
    ways: dict[str, Callable[[], Tensors]] = {
        "missing": lambda: {n: t for n, t in tensors.items() if n != name},
        "another name": lambda: {f"{n}x" if n == name else n: t for n, t in tensors.items()},
        "one more": lambda: tensors | {"x": tensors[name].clone()},
        "a constant more": lambda: tensors | {drawn.choice(CONSTANTS): torch.rand(4)},
        "another's": lambda: tensors | {name: tensors[other].clone()},
        "transposed": lambda: tensors | {name: tensors[name].T.contiguous()},
        "flat": lambda: tensors | {name: tensors[name].flatten().clone()},
        "one row less": lambda: tensors | {name: tensors[name][:-1].clone() if tensors[name].dim() else tensors[name]},
        "empty": lambda: tensors | {name: torch.zeros(0)},
        "a scalar": lambda: tensors | {name: torch.tensor(1.0)},
        "another type": lambda: tensors | {name: tensors[name].to(drawn.choice(_TYPES))},
        "not finite": lambda: tensors | {name: _spoilt(tensors[name], drawn.choice([torch.nan, torch.inf]))},
        "integers out of range": lambda: {n: t - 5 if t.dtype == torch.int64 else t for n, t in tensors.items()},
        "nothing": dict,
    }
    if drawn.random() < 0.25:
        return _sharded(user, tensors, drawn)
    what = drawn.choice(list(ways))
    save_file(ways[what](), path, {"format": "pt"})
    return what if what in HARMLESS else f"{name}: {what}"


_TYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn)


def _spoilt(tensor: Tensor, value: float) -> Tensor:
    spoilt = tensor.clone().float()
    spoilt.view(-1)[:1] = value
    return spoilt


def _sharded(user: Path, tensors: Tensors, drawn: random.Random) -> str:
    """Write two files and their index, or one that is odd."""
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    (user / WEIGHTS).unlink()
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, user / file, {"format": "pt"})
    content: Any = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    what = "several files"
    chance = drawn.random()
    if chance < 0.3:
        content, odd = odd_json(content, drawn)
        what = f"index: {odd}"
    elif chance < 0.5:
        what = f"of several files {odd_file(user / drawn.choice(list(halves)), drawn)}"
    elif chance < 0.6:
        outside = drawn.choice(["../outside.safetensors", "/etc/passwd", "/dev/zero", ".", "", "a/b.safetensors"])
        content["weight_map"][names[0]] = outside
        what = f"index names {outside}"
    elif chance < 0.7:
        save_file({name: tensors[name] + 1 for name in names[:3]}, user / "model-1.safetensors", {"format": "pt"})
        what = "a tensor in two files"
    (user / INDEX).write_text(json.dumps(content), encoding="utf-8")
    return what
