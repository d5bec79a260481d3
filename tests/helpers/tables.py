"""A table with a structure that a model can find, and a configuration that trains on it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.runs import TINY_RUN, write_yaml

TABLE_SCHEMA: dict[str, Any] = {
    "columns": {
        "user": {"type": "categorical"},
        "item": {"type": "categorical"},
        "x": {"type": "numeric"},
        "tags": {"type": "list", "length": 3},
    },
    "targets": {"click": {"type": "binary"}, "like": {"type": "binary"}, "stars": {"type": "numeric"}},
    "weight": "weight",
    "group": "user",
}
MODELS: dict[str, dict[str, Any]] = {
    "shared_bottom": {"bottom_units": [16, 8]},
    "mmoe": {"num_experts": 4, "experts": {"units": [8]}},
    "ple": {"experts": {"units": [8]}, "shared_experts": 2, "target_experts": 2},
    "home": {"experts": {"units": [8]}, "groups": {"act": ["click", "like"], "rate": ["stars"]}},
}


def write_table(path: Path, rows: int = 1200) -> Path:
    """Rows in CSV: ``click`` follows the sum of a user's, an item's and ``x``'s effects; ``like``, known of clicks
    alone, the user's; ``stars`` the sum."""
    rng = np.random.default_rng(0)
    users, items = 2 * rng.normal(size=12), rng.normal(size=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["user", "item", "x", "tags", "weight", "click", "like", "stars"])
        for user, item, x in zip(
            rng.integers(0, 12, rows), rng.integers(0, 10, rows), rng.normal(size=rows), strict=True
        ):
            total = users[user] + items[item] + x
            click, like = (int(rng.random() < 1 / (1 + np.exp(-2 * z))) for z in (total, users[user]))
            tags = "|".join(f"t{tag}" for tag in rng.choice(6, rng.integers(0, 4), replace=False))
            cells = [f"u{user}", f"i{item}", f"{x:.3f}", tags, int(rng.integers(1, 3)), click, like if click else ""]
            table.writerow([*cells, f"{total / 2:.3f}"])
    return path


def table_config(directory: Path, model: str, **sections: Any) -> Path:
    """A YAML file that trains a small model of that name on the table, with sections merged in."""
    data = TABLE_SCHEMA | {"name": "table", "cache": str(directory / "cache")}
    data |= {"files": str(write_table(directory / "table.csv"))}
    content = {
        "data": data,
        "model": MODELS[model] | {"name": model, "embedding_dim": 4, "tower_units": [8]},
        "train": TINY_RUN["train"] | {"max_steps": 40},
        "deepspeed": TINY_RUN["deepspeed"] | {"optimizer": {"type": "AdamW", "params": {"lr": 0.02}}},
    }
    return write_yaml(directory / model, content, sections)
