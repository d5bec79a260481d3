"""HoME: a hierarchy of multi-gate experts, for groups of targets (Kuaishou, arXiv 2408.05430, KDD 2025).

    expert          E(x) = Swish(BN(MLP(x * FG(x)))), see :mod:`dist_moe.experts.mlp` for its feature gate FG
    meta level      z_g = sum over {E_sh, E_g} of softmax(W_g v) E(v) + self-gate over E_g     for each group g
                    z_sh = the same over {E_sh, E of all groups}, self-gate over E_sh
    target level    u_t = [z_g, z_sh] of t's group
                    h_t = sum over {E'_sh(z_sh), E'_g(z_g), E'_t(z_g)} of softmax(W_t u_t) E' + self-gate over E'_t
    self-gate       sum_j a(W v)_j E_j over an output's own experts: a sigmoid for one, a softmax over several

The hierarchy is a mask: no representation of a group touches another group's experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from dist_moe.config.settings import LARGEST_COUNT
from dist_moe.errors import UserError
from dist_moe.experts import FeatureGateConfig, MlpConfig
from dist_moe.experts.mlp import Activation
from dist_moe.models.multi_task.levels import SHARED, LevelOutput, LevelsConfig, LevelShape

Ids = tuple[int, ...]


class HomeExpertsConfig(MlpConfig):
    """HoME's expert: an MLP, batch normalisation, Swish, and feature gates."""

    activation: Activation = Field("silu", description="the activation after every layer; silu is Swish")
    batch_norm: bool = Field(
        True, description="normalise the last layer over all of an expert's rows, before its activation"
    )
    feature_gate: FeatureGateConfig | None = Field(
        default_factory=lambda: FeatureGateConfig(),
        description="gates of each expert on the features that it sees (null: none)",
    )


class HomeConfig(LevelsConfig):
    """Two levels of experts: of groups of targets, then of targets; shared ones at both."""

    name: Literal["home"] = Field("home", description="which model this is")
    groups: dict[str, tuple[str, ...]] = Field(
        {}, description="names of targets by the group that they belong to, each once (empty: one group of all)"
    )
    shared_experts: int = Field(2, ge=1, le=LARGEST_COUNT, description="experts of all targets, at each level")
    group_experts: int = Field(2, ge=1, le=LARGEST_COUNT, description="experts of each group, at each level")
    target_experts: int = Field(2, ge=1, le=LARGEST_COUNT, description="experts of each target, at the second level")
    experts: HomeExpertsConfig = Field(default_factory=lambda: HomeExpertsConfig(), description="the experts")
    self_gate: bool = Field(True, description="add the output's own experts, weighted by a gate of their own")
    self_gate_input: Literal["gate", "experts"] = Field(
        "gate",
        description="what a target's self-gate sees: what its gate does, or what its own experts do; descriptions of "
        "HoME disagree",
    )
    mask: bool = Field(True, description="keep each group and target to its experts (false: all see all of a level)")

    @property
    def num_moe_layers(self) -> int:
        """Number of levels: 2."""
        return 2

    @property
    def slots_per_gate(self) -> int:
        """Number of experts that a group's gate chooses among."""
        return self.shared_experts + self.group_experts

    def shapes(self, targets: Sequence[str]) -> tuple[LevelShape, ...]:
        """Return both levels: shared experts first, then those of the groups, then those of the targets."""
        groups = self.groups or {"all": tuple(targets)}
        given = [name for members in groups.values() for name in members]
        if sorted(given) != sorted(targets) or not all(groups.values()):
            raise UserError(
                f"model.groups={ {name: list(members) for name, members in groups.items()} }: each of the targets "
                f"{', '.join(targets)} must be in one group, once, and no group empty"
            )
        group_of = [next(g for g, members in enumerate(groups.values()) if name in members) for name in targets]
        counts = [self.shared_experts, *[self.group_experts] * len(groups), *[self.target_experts] * len(targets)]
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        shared, *others = (tuple(range(end - count, end)) for count, end in zip(counts, ends, strict=True))
        of_group, of_target = others[: len(groups)], others[len(groups) :]
        everyone = len(groups)  # the stream, and the output, of the shared representation

        def output(name: str, reads: Ids, level: Ids, own: Ids, own_reads: Ids, *more: Ids) -> LevelOutput:
            seen = (*shared, *(e for experts in more for e in experts)) if self.mask else level
            return LevelOutput(name, reads, seen, own if self.self_gate else (), own_reads)

        meta = tuple(range(ends[everyone]))
        titles = [f"group {name}" for name in groups]  # a group may be called as one of its targets is
        group_outputs = [output(name, (0,), meta, own, (0,), own) for name, own in zip(titles, of_group, strict=True)]
        shared_output = output(SHARED, (0,), meta, shared, (0,), *of_group)
        target_outputs = []
        for name, own, g in zip(targets, of_target, group_of, strict=True):
            reads = (g, everyone)
            own_reads = reads if self.self_gate_input == "gate" else (g,)
            target_outputs.append(output(name, reads, tuple(range(ends[-1])), own, own_reads, of_group[g], own))
        streams = [
            *[everyone] * self.shared_experts,
            *(g for g, experts in enumerate(of_group) for _ in experts),
            *(g for g, experts in zip(group_of, of_target, strict=True) for _ in experts),
        ]
        names = [SHARED, *titles, *targets]
        owners = tuple(name for name, count in zip(names, counts, strict=True) for _ in range(count))
        return (
            LevelShape(1, (0,) * len(meta), owners[: len(meta)], (*group_outputs, shared_output)),
            LevelShape(everyone + 1, tuple(streams), owners, tuple(target_outputs)),
        )
