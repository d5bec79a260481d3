"""Tiny forests: two experts on invented domains, and a third domain that is held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.texts import write_lm_config, write_tiny_text

TRAINED_ON, HELD_OUT = ("cooking", "sailing"), "mending"
_SENTENCES = {
    "cooking": "stir the soup and add salt then bake bread until it is brown before you serve warm with butter",
    "mending": "thread a needle and sew the torn sleeve then press it flat before you fold and put away the shirt",
    "sailing": "haul the sheet and trim sail then steer north until wind shifts before you drop anchor at dusk",
}
STEPS, SEED_STEPS = 12, 6
OFTEN = {"checkpoint_every": 2, "async_checkpoints": False}
"""Checkpoints that are there as soon as their step is done."""


def write_forest_config(directory: Path, **sections: Any) -> Path:
    """A YAML file of a forest of MoE decoders on the tiny text, which is written beside it; merged as others are."""
    root = directory / "text"
    if not root.exists():
        write_tiny_text(root, sentences=_SENTENCES)
    recipe = {"name": "branch_train_merge", "partition": {"domains": list(TRAINED_ON)}, "prior_sequences": 5}
    sections["recipe"] = recipe | sections.get("recipe", {})
    data = {"root": str(root), "cache": str(directory / "cache")} | sections.pop("data", {})
    return write_lm_config(directory, data, **sections)
