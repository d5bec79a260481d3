"""Permutation local search: learn slot -> expert together with the model, then round it.

COMET (KDD 2023), section on local search; constants from the authors' code
(permutations of the mazumder-lab/COMET repository). For step t = 1, 2, ... of a stage of length T:

    P_soft = Sinkhorn_N(t)(R / tau(t))     rows first, columns last, in log space; R starts in +-0.05
    log tau(t) and N(t) go straight from their first to their last value
    t <  T: the layer mixes with P_soft, gradients flow to R
    t >= T: the layer relabels with P_hard = the assignment that maximises <P_soft, P>, for ever
    any evaluation relabels with P_hard of the last P_soft

The authors' temperatures (``schedule: paper``) are far below the differences between R's entries from the first step
on: P_soft starts beside a vertex, where the gradient of R vanishes, and in a short stage hardly a row moves. The
``hot`` ones begin with nearly equal entries of P_soft and cool down to a vertex.

Three options go beyond the paper: several matrices, rounding R instead of P_soft (sounder at the paper's last
temperatures, where Sinkhorn is far from converged), and a hard forward pass while learning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.config.settings import LARGEST_EPOCHS, Settings
from dist_moe.gates import Gate
from dist_moe.routing import SlotMap, SoftPermutation, StraightThroughPermutation
from dist_moe.search.agreement import agree_on_tables, round_to_tables
from dist_moe.search.sinkhorn import permutation_entropy, sinkhorn
from dist_moe.search.slot_table import SlotTable, give_branches_slots

INIT_RANGE = 0.05
FP32_ABOVE = 1e-2
"""From this temperature up P_soft is computed in fp32, below in fp64; see :meth:`PermutationSearch.soft_matrix`."""

Temperature = Annotated[float, Field(gt=0)]
Iterations = Annotated[int, Field(ge=1, le=100_000)]


class Schedule(NamedTuple):
    """First and last temperature and number of Sinkhorn iterations of a stage."""

    temperature: tuple[float, float]
    iterations: tuple[int, int]


SCHEDULES = {"hot": Schedule((1e-1, 1e-3), (20, 20)), "paper": Schedule((1e-3, 1e-7), (20, 150))}


class PermutationSearchConfig(Settings):
    """The paper's permutation search (the "+" of COMET+): Sinkhorn-relaxed, then rounded."""

    epochs: float = Field(
        0.1,
        gt=0,
        le=LARGEST_EPOCHS,
        description="length of the learning stage; while it lasts every token visits every expert, unless forward=hard",
    )
    entropy_weight: float = Field(1e-4, ge=0, description="weight of the entropy of the relaxed permutation")
    schedule: Literal["hot", "paper"] = Field(
        "hot",
        description="temperatures and iterations: hot moves rows in a short stage, paper (the authors') starts beside "
        "a vertex, where in a short stage hardly any moves",
    )
    temperature: tuple[Temperature, Temperature] | None = Field(
        None,
        description="first and last temperature of the stage, interpolated in their logarithm (null: the schedule's, "
        + ", ".join(f"{list(one.temperature)} of {name}" for name, one in SCHEDULES.items())
        + ")",
    )
    iterations: tuple[Iterations, Iterations] | None = Field(
        None,
        description="first and last number of Sinkhorn iterations, interpolated (null: the schedule's, "
        + ", ".join(f"{list(one.iterations)} of {name}" for name, one in SCHEDULES.items())
        + ")",
    )
    per_gate: bool = Field(False, description="one permutation for each task's gate instead of a shared one")
    per_branch: bool = Field(False, description="one permutation for each tree or selector of a gate")
    rounding: Literal["soft", "relaxed"] = Field(
        "soft", description="what is rounded in the end: the soft permutation (the paper's code) or R itself"
    )
    forward: Literal["soft", "hard"] = Field(
        "soft",
        description="what a training step mixes with: the soft permutation (every token visits every expert), or "
        "the hard one with straight-through gradients (routing stays sparse)",
    )
    control: Literal["random", "identity"] | None = Field(
        None,
        description="for comparisons: draw R and hold it still, so that mixing hardens as the temperature falls, but "
        "nothing is learnt; towards a random permutation, or towards the identity",
    )

    def build(self, gates: Sequence[Gate], steps_per_epoch: int) -> PermutationSearch:
        """Return the search for the ``gates`` of one layer, whose branches get slots of their own if need be.

        It permutes: the layer must have as many experts as a gate has slots, which the layer checks.
        """
        options = self.model_dump(exclude={"epochs", "per_branch", "schedule"})
        options |= {name: getattr(self, name) or value for name, value in SCHEDULES[self.schedule]._asdict().items()}
        search = PermutationSearch(
            gates[0].num_experts,
            max(1, round(self.epochs * steps_per_epoch)),
            len(gates),
            branches=gates[0].num_branches if self.per_branch else 1,
            **options,
        )
        give_branches_slots(gates, search)
        return search


class PermutationSearch(SlotTable):
    """Relaxed n x n permutations, one for all or one for each gate and branch.

    ``relaxed`` (P, K, n, n) is R, learned by the model's own optimiser; under a ``control`` it is a buffer. Buffers,
    all in the checkpoint: ``step`` counts training steps, ``soft`` is the last P_soft, ``table`` is P_hard as
    slot -> expert, ``start`` (P, K, n) what R rounds to before the first step. Call :meth:`begin_step` once before each
    training step, and :meth:`begin_evaluation` before evaluating: these two are the places where ranks agree.
    """

    relaxed: Tensor
    step: Tensor
    soft: Tensor
    start: Tensor

    def __init__(
        self,
        num_experts: int,
        stage_steps: int,
        num_gates: int = 1,
        *,
        entropy_weight: float = 1e-4,
        temperature: tuple[float, float] = SCHEDULES["hot"].temperature,
        iterations: tuple[int, int] = SCHEDULES["hot"].iterations,
        per_gate: bool = False,
        branches: int = 1,
        rounding: Literal["soft", "relaxed"] = "soft",
        forward: Literal["soft", "hard"] = "soft",
        control: Literal["random", "identity"] | None = None,
    ) -> None:
        super().__init__(num_experts, num_gates, per_gate=per_gate, branches=branches)
        self.stage_steps = stage_steps
        self.entropy_weight = entropy_weight
        self.temperature = temperature
        self.iterations = iterations
        self.rounds_relaxed = rounding == "relaxed"
        self.straight_through = forward == "hard"
        self.control = control
        matrices = (*self.table.shape, num_experts)
        relaxed = torch.empty(matrices).uniform_(-INIT_RANGE, INIT_RANGE)
        if control == "identity" and not relaxed.is_meta:  # let slot s have the column that it rounds to
            relaxed = relaxed.take_along_dim(round_to_tables(relaxed).unsqueeze(-2), dim=-1)
        if control is None:
            self.relaxed = nn.Parameter(relaxed)
        else:
            self.register_buffer("relaxed", relaxed)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("soft", torch.eye(num_experts).expand(matrices).clone())
        self.register_buffer("start", self.table.clone())
        self._counted: tuple[Tensor, int, int] | None = None
        self._ahead: Tensor | None = None
        self._softly = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._counted = self._ahead = None

    @property
    def count(self) -> int:
        """Number of training steps that have begun: ``step``, for which the host waits only if others wrote it."""
        if self._counted is None or self._counted[0] is not self.step or self._counted[1] != self.step._version:
            self._counted = self.step, self.step._version, int(self.step)
        return self._counted[2]

    @property
    def learning(self) -> bool:
        """Whether the stage lasts, that is, whether training learns the permutation."""
        return self.count < self.stage_steps

    def end_learning(self) -> None:
        """End the stage here, with the rounding of the last soft permutation."""
        self.begin_evaluation()
        self.step.fill_(max(self.count, self.stage_steps))

    @torch.no_grad()
    def begin_step(self) -> None:
        """Count a training step; the one that ends the stage rounds the permutation.

        A straight-through search rounds the permutation of every step of the stage.
        """
        count = self.count + 1
        self.step += 1
        self._counted, self._ahead = (self.step, self.step._version, count), None
        if count == 1:
            self.start.copy_(agree_on_tables(self.relaxed.detach()))
        if self.learning and self.straight_through:
            self.soft.copy_(self.soft_matrix())
            self.round()
        elif count == self.stage_steps:
            self.round()

    def begin_evaluation(self) -> None:
        """During the stage, round the last soft permutation so that the evaluation uses it."""
        if 0 < self.count < self.stage_steps:
            self.round()

    def round(self) -> None:
        """Set ``table`` to the rounded permutation, the same on all ranks."""
        self.table.copy_(agree_on_tables(self.relaxed.detach() if self.rounds_relaxed else self.soft))

    def forward(self) -> tuple[Sequence[SlotMap], dict[str, Tensor]]:
        """Return one slot map per gate, soft while training learns it, and the entropy term; a control has none."""
        if self._softly:
            return self.for_gates([SoftPermutation(matrix_KEE) for matrix_KEE in self.soft]), {}
        if not (self.training and self.learning):
            permutations, aux = super().forward()
            if self.training and self.control is None:
                # R stays in the graph with a zero gradient, so that no rank or ZeRO stage treats it as absent.
                aux["permutation"] = 0.0 * self.relaxed.sum()
            return permutations, aux
        with torch.autocast(self.relaxed.device.type, enabled=False):
            soft = self.soft_matrix() if self._ahead is None else self._ahead
            self._ahead = None  # its graph serves one backward pass
            self.soft.copy_(soft.detach())
            learnt = self.control is None  # in every step alike, as each step's losses have the same names
            aux = {"permutation": self.entropy_weight * permutation_entropy(soft)} if learnt else {}
        if self.straight_through:
            maps = zip(soft, self.hard_maps(), strict=True)
            return self.for_gates([StraightThroughPermutation(*matrix_and_map) for matrix_and_map in maps]), aux
        return self.for_gates([SoftPermutation(matrix_KEE) for matrix_KEE in soft]), aux

    def current_matrix(self) -> Tensor:
        """Return (P, K, n, n), without gradient: the last soft matrices during the stage, then the hard ones.

        With ``forward: hard`` the soft ones are what is learnt, not what training routes by.
        """
        return self.soft if self.learning else super().current_matrix()

    @contextmanager
    def mixing_softly(self) -> Iterator[None]:
        """Let the layer mix with the last P_soft within, whatever the stage says."""
        self._softly = True
        try:
            yield
        finally:
            self._softly = False

    @torch.no_grad()
    def rows_changed(self) -> int:
        """Return how many rows of R round to another expert than before the first step, over gates and branches.

        It is R that is rounded, as the last P_soft of a schedule may round otherwise although R has not moved. Raises
        FloatingPointError if R holds a NaN or an infinity.
        """
        return int((round_to_tables(self.relaxed) != self.start).sum())

    def row_entropy(self) -> float:
        """Return the mean entropy of a row of the last P_soft in nats: 0 at a vertex, log n where all are equal."""
        return float(-(self.soft.double() * self.soft.double().clamp_min(1e-30).log()).sum(-1).mean())

    def soft_matrix(self) -> Tensor:
        """Return P_soft of the current step, (P, K, n, n), in fp32 (fp64 if R is), below FP32_ABOVE computed in fp64.

        Near a vertex its gradient is a difference of nearly equal numbers. In fp32 that is rounding
        noise, which Adam turns into steps of full size: two layouts of a run would part company.
        """
        return _soft(self.relaxed, self.schedule(self.count))

    def schedule(self, count: int) -> tuple[float, int]:
        """Return temperature and number of Sinkhorn iterations of the ``count``-th training step."""
        progress = min(count / self.stage_steps, 1.0)
        log_first, log_last = (math.log10(t) for t in self.temperature)
        first, last = self.iterations
        return 10 ** (log_first + (log_last - log_first) * progress), math.floor(first + (last - first) * progress)


def relax_together(tables: Iterable[object]) -> None:
    """Compute P_soft of all searches that learn matrices of one size on one schedule in one tensor, for a pass.

    Call it before each forward pass of a training step; a search that is not among ``tables``, or alone of its kind,
    computes its own. The kernels of a stage are then as many as those of a single layer.
    """
    groups: dict[Any, list[PermutationSearch]] = {}
    for table in tables:
        if isinstance(table, PermutationSearch) and table.training and table.learning:
            relaxed = table.relaxed
            kind = relaxed.shape[-1], relaxed.dtype, relaxed.device, table.schedule(table.count)
            groups.setdefault(kind, []).append(table)
    for (*_, schedule), group in groups.items():
        if len(group) > 1:
            flat = [search.relaxed.flatten(0, 1) for search in group]
            parts = _soft(torch.cat(flat), schedule).split([len(one) for one in flat])
            for search, part in zip(group, parts, strict=True):
                search._ahead = part.view_as(search.relaxed)


def _soft(relaxed: Tensor, schedule: tuple[float, int]) -> Tensor:
    temperature, iterations = schedule
    single = temperature >= FP32_ABOVE and relaxed.dtype != torch.float64
    with torch.autocast(relaxed.device.type, enabled=False):
        soft = sinkhorn((relaxed.float() if single else relaxed.double()) / temperature, iterations)
    return soft if relaxed.dtype == torch.float64 else soft.float()
