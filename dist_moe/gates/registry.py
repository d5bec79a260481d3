"""Gates by name: what ``gate: {name: ...}`` in a configuration can mean."""

from __future__ import annotations

from typing import Annotated

from pydantic import SerializeAsAny

from dist_moe.config.registry import Registry
from dist_moe.gates.base import GateSettings

GATES = Registry("gate", GateSettings, default="comet")

GateConfig = Annotated[SerializeAsAny[GateSettings], GATES]
"""The type of a configuration field that holds any registered gate."""
