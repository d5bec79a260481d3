"""A level: an MoE layer whose experts and gates see different inputs, for PLE and HoME.

Its tokens are S streams of B rows each, one stream after the other: row b of stream s is token s * B + b. An expert is
attached to one stream. A gate makes the mixture of one output: it reads one or several streams, side by side, and
chooses among the experts that its output may see; its weight for expert e is at the token of e's stream. So the tokens
that travel are the pairs that some gate wants, and each once; a mask costs nothing where it forbids.
The output is the sum over the streams of what the layer gives.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from dist_moe.experts import EXPERTS, ExpertSettings, MlpConfig
from dist_moe.gates import GATES, Gate, GateContext, GateSettings, Mixture, SoftmaxConfig
from dist_moe.gates.base import affine
from dist_moe.layer import MoE, MoEOutput
from dist_moe.models.moe_model import ModelOutput, RunShape, check_experts
from dist_moe.models.multi_task.front import Front, MultiTaskConfig, TableFeatures, TableModel, routing_ids
from dist_moe.parallel import experts_of_rank
from dist_moe.routing import Route

SHARED = "shared by all"
"""The owner of what is for all targets; a target may be called "shared"."""


@dataclass(frozen=True)
class LevelOutput:
    """One output of a level. ``name``: of its target, "group NAME" of a group, or ``SHARED``. ``reads``: streams that
    its gate sees. ``experts``: those that it may choose.

    ``own``: experts that a self-gate adds, a residual; empty: no self-gate. ``own_reads``: streams that this one sees.
    """

    name: str
    reads: tuple[int, ...]
    experts: tuple[int, ...]
    own: tuple[int, ...] = ()
    own_reads: tuple[int, ...] = ()


@dataclass(frozen=True)
class LevelShape:
    """``streams``: S. ``stream_of_expert``, ``owner_of_expert``: (E,), an owner being a target, a group, or ``SHARED``.
    ``outputs``: in order."""

    streams: int
    stream_of_expert: tuple[int, ...]
    owner_of_expert: tuple[str, ...]
    outputs: tuple[LevelOutput, ...]


class LevelGate(Gate):
    """Weights of a level's experts in one output: those of ``main``, a gate over its experts alone, and a self-gate's.

    The self-gate (HoME) is a sigmoid for a single expert, a softmax over several, of a linear map ``own_weight``
    (O, width), glorot-uniform, and ``own_bias`` (O,), zero. Its weights add to those of ``main``, which sum to 1 over
    the streams: with a self-gate a row's sum is greater. For layers without a slot map: an expert keeps its stream.
    """

    expert_A: Tensor
    own_O: Tensor
    stream_E: Tensor

    def __init__(self, dim: int, shape: LevelShape, output: LevelOutput, main: GateSettings, context: GateContext):
        super().__init__(dim, len(shape.stream_of_expert))
        self.shape, self.streams, self.output = shape, shape.streams, output
        self.main = main.build(len(output.reads) * dim, len(output.experts), context)
        self.register_buffer("expert_A", torch.tensor(output.experts))
        self.register_buffer("stream_E", torch.tensor(shape.stream_of_expert))
        if output.own:
            self.register_buffer("own_O", torch.tensor(output.own))
            own = torch.empty(len(output.own), len(output.own_reads) * dim)
            self.own_weight = nn.Parameter(nn.init.xavier_uniform_(own))
            self.own_bias = nn.Parameter(torch.zeros(len(output.own)))

    def route(self, x_TD: Tensor, ids_T: Tensor | None) -> Route:
        """Return the non-zero weights of (S * B, D) tokens; of their ids, those of the first stream count."""
        batch = len(x_TD) // self.streams
        x_SBD = x_TD.view(self.streams, batch, self.dim)
        self.main.sum_over_ranks = self.sum_over_ranks
        main = self.main(_side_by_side(x_SBD, self.output.reads), None if ids_T is None else ids_T[:batch])
        parts = [(main, self.expert_A)]
        if self.output.own:
            logit_BO = affine(_side_by_side(x_SBD, self.output.own_reads), self.own_weight, self.own_bias)
            own_BO = logit_BO.sigmoid() if len(self.own_O) == 1 else logit_BO.softmax(dim=1)
            parts.append((Route.from_dense(own_BO), self.own_O))
        row_N = torch.cat([route.token_N for route, _ in parts])
        expert_N = torch.cat([expert[route.slot_N] for route, expert in parts])
        weight_N = torch.cat([route.weight_N for route, _ in parts])
        token_N = self.stream_E[expert_N] * batch + row_N
        return Route.merge(token_N, expert_N, weight_N, len(x_TD), self.num_experts, main.aux)

    def mixture(self, x_TD: Tensor, ids_T: Tensor | None) -> Mixture:
        """Return the weights as a dense matrix, 0 at the tokens of other streams."""
        route = self.route(x_TD, ids_T)
        return Mixture(route.dense().unsqueeze(1), route.aux)

    def begin_step(self, step: int) -> None:
        """Prepare the main gate."""
        self.main.begin_step(step)

    def end_step(self) -> None:
        """Conclude the step of the main gate."""
        self.main.end_step()


def _side_by_side(x_SBD: Tensor, streams: Sequence[int]) -> Tensor:
    return torch.cat([x_SBD[s] for s in streams], dim=1)


class LevelsConfig(MultiTaskConfig):
    """The fields of models of several levels, of which each takes the outputs of the one before it for streams.

    How many experts a level has follows from other fields, whose names end in ``_experts``, and the targets.
    """

    one_layer: ClassVar[bool] = False
    has_tables: ClassVar[bool] = False

    num_experts: int = Field(0, ge=0, description="not of this model: the fields below count the experts of a level")
    gate: Annotated[SerializeAsAny[GateSettings], GATES.with_default("softmax")] = Field(
        default_factory=lambda: SoftmaxConfig(), description="the gate of each output of a level"
    )
    experts: Annotated[SerializeAsAny[ExpertSettings], EXPERTS.with_default("mlp")] = Field(
        default_factory=lambda: MlpConfig(), description="the experts"
    )

    @abstractmethod
    def shapes(self, targets: Sequence[str]) -> tuple[LevelShape, ...]:
        """Return the levels for these targets, the first with a single stream, the last with an output per target.

        Raises UserError if the fields do not fit the targets.
        """

    @property
    def experts_per_token(self) -> int:
        """Experts that one gate gives a row, at most."""
        return self.gate.experts_per_token(self.slots_per_gate)

    def expert_counts(self, targets: Sequence[str]) -> dict[str, int]:
        """Return the number of experts of each level, by what to call it in a message. Raises UserError."""
        fields = [name for name in type(self).model_fields if name.endswith("_experts") and name != "num_experts"]
        counted = ", ".join(f"model.{name}={getattr(self, name)}" for name in fields)
        counts = [len(shape.stream_of_expert) for shape in self.shapes(targets)]
        return {f"the {n} experts of level {i} ({counted})": n for i, n in enumerate(counts, start=1)}

    def validation_errors(self) -> Iterator[str]:
        """Yield what does not fit together, as "field=value: reason"."""
        if self.num_experts:
            yield f"num_experts={self.num_experts}: name={self.name} counts its experts by other fields; leave it out"
        yield from super().validation_errors()

    def gate_errors(self) -> Iterator[str]:
        """Yield what of the gate does not fit the fewest experts that one chooses among."""
        for error in self.gate.validation_errors(self.slots_per_gate):
            yield "gate." + error.replace("num_experts=", "the experts that an output may see, ")

    def build(self, features: TableFeatures, targets: tuple[str, ...], run: RunShape) -> LevelsModel:
        """Return the model with this rank's experts. Raises UserError for experts or groups that do not fit."""
        front = Front(features, self.embedding_dim)
        levels, dim = list[MoE](), front.width
        for number, shape in enumerate(self.shapes(targets)):
            check_experts(self.experts, dim)
            count = len(shape.stream_of_expert)
            experts = self.experts.build(dim, count, experts_of_rank(count, run.world))
            main = self.gate.of_layer(number)
            gates = [LevelGate(dim, shape, output, main, run.gates) for output in shape.outputs]
            levels.append(self.layer_of(gates, experts, None, run))
            dim = experts.out_dim
        return LevelsModel(front, levels, len(targets), self.tower_units)


class LevelsModel(TableModel):
    """The towers' inputs are the outputs of the last of ``levels``."""

    def __init__(self, front: Front, levels: Sequence[MoE], num_targets: int, tower_units: Sequence[int]) -> None:
        super().__init__(front, levels[-1].experts.out_dim, num_targets, tower_units)
        self.levels = nn.ModuleList(levels)

    def forward(self, ids_BC: Tensor, numeric_BM: Tensor, lists_BP: Tensor) -> ModelOutput:
        """Return predictions of each target, and what the levels did."""
        streams: tuple[Tensor, ...] = (self.front(ids_BC, numeric_BM, lists_BP),)
        mixed = list[MoEOutput]()
        for level in self.levels:
            streams, of_level = through(level, streams, routing_ids(ids_BC))
            mixed.append(of_level)
        return ModelOutput(self.predictions(streams), tuple(mixed))


def through(level: nn.Module, streams: Sequence[Tensor], ids_B: Tensor | None) -> tuple[tuple[Tensor, ...], MoEOutput]:
    """Return each output of a level, (B, F), for its S streams (B, D), and what the level did."""
    mixed: MoEOutput = level(torch.cat(tuple(streams)), None if ids_B is None else ids_B.repeat(len(streams)))
    by_stream = (y_TF.view(len(streams), len(streams[0]), y_TF.shape[1]) for y_TF in mixed.outputs)
    return tuple(y_SBF.sum(dim=0) for y_SBF in by_stream), mixed
