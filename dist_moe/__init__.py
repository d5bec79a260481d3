"""dist_moe: distributed expert-parallel training of sparse mixtures of experts.

gate = dist_moe.gates.Comet(dim=256, num_experts=16, k=2)
moe = dist_moe.MoE([gate], dist_moe.experts.DenseReLUBank(256, 256, 16, range(16)))
y = moe(x).outputs[0]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_moe import experts, gates, parallel, routing
    from dist_moe.engine.training import fit
    from dist_moe.layer import MoE, MoEOutput
    from dist_moe.recording import record
    from dist_moe.routing import Route

__version__ = "0.1.0"

__all__ = ["MoE", "MoEOutput", "Route", "experts", "fit", "gates", "parallel", "record", "routing"]

_MODULE_OF = {
    "MoE": "layer",
    "MoEOutput": "layer",
    "Route": "routing",
    "fit": "engine.training",
    "record": "recording",
}


def __getattr__(name: str) -> Any:
    """Torch takes seconds to import: it is imported with the first thing that needs it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return import_module(f"{__name__}.{name}")
