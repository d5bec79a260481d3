"""Gates: tokens -> Route. Pure modules that know nothing of ranks."""

from dist_moe.gates.base import GATES, Gate, GateConfig, GateContext, GateSettings, Mixture
from dist_moe.gates.comet import Comet, CometConfig
from dist_moe.gates.dselect_k import DSelectK, DSelectKConfig
from dist_moe.gates.hash_routing import HashRouting, HashRoutingConfig
from dist_moe.gates.null_slots import AdaMoEConfig, NullSlots
from dist_moe.gates.relu import ReLU, ReLUConfig
from dist_moe.gates.smoe_dropout import SMoEDropout, SMoEDropoutConfig
from dist_moe.gates.softmax import Softmax, SoftmaxConfig
from dist_moe.gates.top_k import TopK, TopKConfig

__all__ = [
    "GATES",
    "AdaMoEConfig",
    "Comet",
    "CometConfig",
    "DSelectK",
    "DSelectKConfig",
    "Gate",
    "GateConfig",
    "GateContext",
    "GateSettings",
    "HashRouting",
    "HashRoutingConfig",
    "Mixture",
    "NullSlots",
    "ReLU",
    "ReLUConfig",
    "SMoEDropout",
    "SMoEDropoutConfig",
    "Softmax",
    "SoftmaxConfig",
    "TopK",
    "TopKConfig",
]
