"""Gates: tokens -> Route. Pure modules that know nothing of ranks."""

from typing import Annotated

from pydantic import Field

from dist_moe.gates.base import Gate
from dist_moe.gates.comet import Comet, CometConfig
from dist_moe.gates.top_k import TopK, TopKConfig

GateConfig = Annotated[CometConfig | TopKConfig, Field(discriminator="name")]

__all__ = ["Comet", "CometConfig", "Gate", "GateConfig", "TopK", "TopKConfig"]
