"""dist_moe: distributed expert-parallel training of sparse mixtures of experts.

gate = dist_moe.gates.Comet(dim=256, num_experts=16, k=2)
moe = dist_moe.MoE([gate], dist_moe.experts.DenseReLUBank(256, 256, 16, range(16)))
y = moe(x).outputs[0]
"""

from dist_moe import experts, gates, parallel, routing
from dist_moe.layer import MoE, MoEOutput
from dist_moe.routing import Route

__all__ = ["MoE", "MoEOutput", "Route", "experts", "gates", "parallel", "routing"]
