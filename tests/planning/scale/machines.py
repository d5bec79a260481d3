"""A machine of round numbers."""

from __future__ import annotations

from typing import Any

from dist_moe.planning.scale.machine import Link, Machine

PLAIN = Machine(
    name="plain",
    source="made up",
    processors_per_node=8,
    memory_bytes_per_rank=2**34,
    gemm_flop_per_s_by_rows={1: 1e9, 100: 1e11},
    elementwise_bytes_per_s=1e10,
    index_bytes_per_s=5e9,
    scatter_bytes_per_s=4e9,
    combine_bytes_per_s=2e9,
    sort_keys_per_s=2e7,
    layer_fixed_s=1e-3,
    step_fixed_s=2e-3,
    inside=Link(all_to_all_bytes_per_s=1e10, all_reduce_bytes_per_s=8e9, latency_s=1e-5),
    between=Link(all_to_all_bytes_per_s=1e9, all_reduce_bytes_per_s=9e8, latency_s=1e-4),
)


def with_links(**changes: Any) -> Machine:
    """PLAIN with other numbers in both links."""
    assert PLAIN.inside is not None
    assert PLAIN.between is not None
    inside, between = (link.model_copy(update=changes) for link in (PLAIN.inside, PLAIN.between))
    return PLAIN.model_copy(update={"inside": inside, "between": between})
