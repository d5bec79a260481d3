"""A tiny BERT encoder as Hugging Face keeps one, and runs of text classifiers on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dist_moe.models import BertClassifierConfig, BertShape, RunShape
from dist_moe.models.bert import write_hugging_face
from dist_moe.parallel import SingleWorld
from tests.data.labelled_text.tiny_texts import tiny_tokenizer
from tests.helpers.commands import succeed
from tests.helpers.runs import write_yaml

POSITIONS = 64


def write_encoder(directory: Path, **sizes: Any) -> Path:
    """Random weights without a classifier, and the tokenizer that knows every letter."""
    tokenizer = tiny_tokenizer()
    shape = {"vocab": tokenizer.get_vocab_size(), "width": 12, "layers": 2, "heads": 3, "hidden": 16}
    torch.manual_seed(3)
    whole = BertShape(**(shape | {"positions": POSITIONS} | sizes))
    model = BertClassifierConfig(moe_every=0).build(whole, 2, RunShape(SingleWorld(), 1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(5)  # 0.02 is so small that a tiny model would be linear
    write_hugging_face(model, directory)
    path = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("classifier.")}
    save_file(tensors, path, metadata={"format": "pt"})
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def write_text_config(directory: Path, encoder: Path, data: dict[str, Any], **sections: Any) -> Path:
    """A YAML file of a dense classifier that is trained for a few steps; sections merged one level deep."""
    content: dict[str, Any] = {
        "data": {"cache": str(directory / "cache"), "max_length": 48, "encoder": str(encoder)} | data,
        "model": {"name": "bert_classifier", "moe_every": 0, "dropout": 0.0},
        "train": {"max_steps": 6, "epochs": 9, "batch_size": 16, "validate_every": 3},
        "deepspeed": {
            "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "eps": 1e-7}},
            "zero_optimization": {"stage": 1},
        },
    }
    return write_yaml(directory, content, sections)


def taught(teacher: Path) -> list[str]:
    """Overrides of a run that starts from ``teacher`` and follows it."""
    return [f"start.run={teacher}", "recipe.name=moebert", f"recipe.teacher={teacher}", "recipe.weight=0.5"]


def train_teachers(config: Path) -> dict[int, Path]:
    """Dense runs by number of ranks."""
    runs = {world: config.parent / f"dense-{world}" for world in (1, 2)}
    for world, run in runs.items():
        succeed(world, "train", "--run-dir", run, config)
    return runs


def train_students(config: Path, teacher: Path, student: list[str]) -> dict[int, Path]:
    """Runs of the overrides ``student`` by number of ranks, as many as expert-parallel ones."""
    runs = {world: config.parent / f"student-{world}" for world in (1, 2)}
    for world, run in runs.items():
        overrides = [*student, *taught(teacher), f"parallel.expert_parallel_size={world}"]
        succeed(world, "train", "--run-dir", run, config, *overrides)
    return runs
