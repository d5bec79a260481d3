"""Machines in numbers: rates that were measured, or taken from a data sheet."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator

from dist_moe.config.plain_yaml import read_yaml, yaml_text
from dist_moe.config.settings import Settings
from dist_moe.errors import UserError, shown

Positive = Annotated[float, Field(gt=0)]


class Link(Settings):
    """Rates of collectives over one kind of link, in one direction."""

    all_to_all_bytes_per_s: float = Field(
        gt=0, description="bytes that leave a rank (a node, for the links between nodes) in an all-to-all, per second"
    )
    all_reduce_bytes_per_s: float = Field(
        gt=0, description="bytes that leave a rank (a node) in an all-reduce by a ring, per second"
    )
    latency_s: float = Field(ge=0, description="seconds of a collective of next to no bytes, per peer")


class Machine(Settings):
    """The constants of a cluster of like nodes. All rates are of one rank that has a processor for itself,
    while the others of its node are as busy."""

    name: str = Field(description="what it is called in tables")
    source: str = Field(description="where the numbers come from: measured, or which data sheets")
    processors_per_node: float = Field(gt=0, description="GPUs, or CPU cores, of a node; more ranks share them")
    memory_bytes_per_rank: float | None = Field(None, gt=0, description="memory of a rank (null: not known)")
    gemm_flop_per_s_by_rows: dict[int, Positive] = Field(
        description="rate of the three products of a linear layer's step, by the rows that share a weight"
    )
    elementwise_bytes_per_s: float = Field(gt=0, description="bytes read and written by elementwise operations")
    index_bytes_per_s: float = Field(gt=0, description="bytes read and written when rows are put into another order")
    scatter_bytes_per_s: float = Field(gt=0, description="bytes read and written when rows are added into others")
    combine_bytes_per_s: float = Field(
        gt=0, description="bytes of rows of which weighted sums are made, forward and backward, per second and gate"
    )
    sort_keys_per_s: float = Field(gt=0, description="64-bit keys sorted, with their inverse, per second")
    layer_fixed_s: float = Field(ge=0, description="seconds of an MoE layer, forward and backward, of hardly any token")
    step_fixed_s: float = Field(ge=0, description="seconds of a training step of hardly any token, on one rank")
    inside: Link | None = Field(None, description="links between ranks of a node (null: not known)")
    between: Link | None = Field(None, description="links between nodes, whose ranks share them (null: not known)")

    @field_validator("gemm_flop_per_s_by_rows")
    @classmethod
    def _has_rows(cls, rates: dict[int, float]) -> dict[int, float]:
        if not rates or min(rates) < 1:
            raise ValueError("must hold at least one rate, for 1 row or more, such as {256: 5.0e10}")
        return dict(sorted(rates.items()))

    def flop_per_s(self, rows: float) -> float:
        """Return the rate of products of so many rows: between two known ones on a straight line in log-log, as a
        product that waits for its weight is; below the least in proportion to the rows, above the most alike."""
        known = list(self.gemm_flop_per_s_by_rows.items())
        if rows <= known[0][0]:
            return known[0][1] * rows / known[0][0]
        for (low, at_low), (high, at_high) in pairwise(known):
            if rows <= high:
                share = math.log(rows / low) / math.log(high / low)
                return float(at_low * (at_high / at_low) ** share)
        return known[-1][1]

    def write(self, path: Path) -> None:
        """Write it as YAML that :func:`read_machine` reads."""
        path.write_text(yaml_text(self.model_dump()), encoding="utf-8")


def _gpu(name: str, memory: float, flop_per_s: float, hbm: float, nvlink: float, network: float) -> Machine:
    """Return nodes of eight such GPUs. A product of bf16 reads its weight once: as many FLOP a byte as it has rows."""
    return Machine(
        name=name,
        source="data sheets, not measured: peak rates; latencies and fixed times are assumptions",
        processors_per_node=8,
        memory_bytes_per_rank=memory,
        gemm_flop_per_s_by_rows={1: hbm, math.ceil(flop_per_s / hbm): flop_per_s},
        elementwise_bytes_per_s=hbm,
        index_bytes_per_s=hbm,
        scatter_bytes_per_s=hbm,
        combine_bytes_per_s=hbm / 16,
        sort_keys_per_s=1e9,
        layer_fixed_s=1e-3,
        step_fixed_s=4e-3,
        inside=Link(all_to_all_bytes_per_s=nvlink, all_reduce_bytes_per_s=nvlink, latency_s=2e-6),
        between=Link(all_to_all_bytes_per_s=8 * network, all_reduce_bytes_per_s=8 * network, latency_s=4e-6),
    )


BUILTIN = {
    machine.name: machine
    for machine in (
        _gpu("h100", 80e9, 989e12, 3.35e12, 450e9, 50e9),
        _gpu("h200", 141e9, 989e12, 4.8e12, 450e9, 50e9),
        _gpu("a100", 80e9, 312e12, 2.039e12, 300e9, 25e9),
    )
}
"""By name. H100 and H200 SXM: 989 TFLOP/s bf16 without sparsity, NVLink 900 GB/s in both directions, InfiniBand NDR
400 Gbit/s per GPU; A100 SXM: 312 TFLOP/s, 600 GB/s, HDR 200 Gbit/s (NVIDIA's data sheets)."""


def read_machine(name: str) -> Machine:
    """Return one of ``BUILTIN``, or that of a YAML file. Raises UserError for what is neither, or a wrong field."""
    if name in BUILTIN:
        return BUILTIN[name]
    path = Path(name)
    if not path.suffix and not path.exists():
        raise UserError(
            f"--machine={name}: there is no such machine; known: {', '.join(BUILTIN)}; or give a YAML file, which "
            f"'dist-moe plan --measure FILE.yaml' makes"
        )
    try:
        return Machine.model_validate(read_yaml(path, "machine"))
    except ValidationError as error:
        lines = []
        for each in error.errors():
            field, message = ".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")
            if each["type"] == "missing":
                lines.append(f"{field}: required, but not given; measure it with 'dist-moe plan --measure FILE.yaml'")
            else:
                lines.append(f"{field}={shown(each['input'])}: {message[0].lower() + message[1:]}")
        raise UserError(f"the machine in {path} is not valid:\n  " + "\n  ".join(lines)) from error
