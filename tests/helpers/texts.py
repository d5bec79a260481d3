"""A tiny corpus of two invented domains, and runs of tiny language models on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.runs import write_yaml

DOMAINS = ("cooking", "sailing")
_SENTENCES = {
    "cooking": "stir the soup and add salt then bake bread until it is brown before you serve warm with butter",
    "sailing": "haul the sheet and trim sail then steer north until wind shifts before you drop anchor at dusk",
}
TINY_LM: dict[str, Any] = {
    "data": {"name": "text", "vocab_size": 300, "sequence_length": 16, "held_out": 0.2},
    "model": {
        "layers": 4,
        "dim": 16,
        "heads": 2,
        "kv_heads": 1,
        "moe_every": 2,
        "num_experts": 4,
        "experts": {"hidden": 12},
        "dense_hidden": 20,
        "gate": {"name": "comet", "k": 2, "gamma": 1.0, "entropy_weight": 0.05},
    },
    "train": {"epochs": 100, "max_steps": 12, "batch_size": 8, "log_every": 4, "checkpoint_every": 1000},
    "deepspeed": {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "eps": 1e-6, "weight_decay": 0.01}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
    },
}


def write_tiny_text(
    root: Path, documents: int = 10, words: int = 60, sentences: Mapping[str, str] = _SENTENCES
) -> Path:
    """So many files per domain, with the words of its sentence; one is followed by one of two, most of the time."""
    random = np.random.default_rng(0)
    for domain, sentence in sentences.items():
        directory, vocabulary = root / domain, sentence.split()
        directory.mkdir(parents=True)
        for number in range(documents):
            place, text = int(random.integers(len(vocabulary))), []
            for _ in range(words):
                text.append(vocabulary[place])
                jump = random.choice([1, 3, int(random.integers(len(vocabulary)))], p=[0.6, 0.3, 0.1])
                place = (place + int(jump)) % len(vocabulary)
            (directory / f"{number}.txt").write_text(" ".join(text) + ".\n")
    return root


def write_lm_config(directory: Path, data: dict[str, Any], **sections: Any) -> Path:
    """A YAML file with TINY_LM on the tiny corpus, sections merged one level deep."""
    return write_yaml(directory, TINY_LM | {"data": TINY_LM["data"] | data}, sections)
