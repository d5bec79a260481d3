"""The base class of gates and of their settings, the registry of gates, and what gates compute with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, ClassVar, Self

import torch
from pydantic import SerializeAsAny
from torch import Tensor, nn

from dist_moe.config.registry import Registry
from dist_moe.config.settings import Settings
from dist_moe.routing import Route


@dataclass(frozen=True)
class Mixture:
    """A gate's result, dense: ``weight_TKE`` (T, branches, n), non-negative, differentiable.

    The branches are the parts whose sum is the mixture: COMET's trees, DSelect-k's selectors; most
    gates have one. ``aux``: auxiliary losses by name, as in :class:`~dist_moe.routing.Route`.
    """

    weight_TKE: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)


class Gate(nn.Module, ABC):
    """Tokens -> Route: ``gate(x_TD, ids_T=None)``.

    ``x_TD``: (T, D) routing input, T may be 0. ``ids_T``: (T,) integer ids, for gates that route by
    identity (hash routing); others ignore them. Arithmetic is fp32 under any autocast and for any
    input below fp64; an fp64 input is computed in fp64.

    ``allowed_E``: None, or an (n,) bool buffer, in the checkpoint, of the slots that the gate may choose (see
    :meth:`allow`). A gate that heeds it says so by ``can_exclude``.

    A gate implements :meth:`mixture`. One that can do without the dense matrix overrides
    :meth:`route` as well. A gate knows no ranks; whoever spreads tokens over ranks sets
    ``sum_over_ranks``, by which statistics that are not a mean over tokens become global. ``num_experts``: n, the
    slots among which the gate chooses, which a layer maps to its experts.
    """

    num_branches = 1
    can_exclude = False
    allowed_E: Tensor | None

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        if num_experts < 2:
            raise ValueError(f"num_experts must be at least 2, got {num_experts}")
        self.dim = dim
        self.num_experts = num_experts
        self.splits_branches = False
        self.sum_over_ranks: Callable[[Tensor], Tensor] = _alone
        self.register_buffer("allowed_E", None)

    @property
    def num_slots(self) -> int:
        """Number of slots of the routes: n, or branches * n if every branch has its own (``splits_branches``)."""
        return self.num_experts * (self.num_branches if self.splits_branches else 1)

    def allow(self, allowed_E: Tensor) -> None:
        """Exclude the slots where ``allowed_E`` (n,) bool is false, in every branch: their weight is exactly 0.

        The gate then chooses among the others as if there were no more, whatever the input, and the weights of a
        token still have their sum. Raises ValueError if no slot is left, or if the gate cannot exclude slots.
        """
        if not self.can_exclude:
            raise ValueError(f"{type(self).__name__} cannot exclude slots: it does not heed allowed_E")
        if allowed_E.dtype != torch.bool or allowed_E.shape != (self.num_experts,) or not allowed_E.any():
            raise ValueError(
                f"allowed_E must be {self.num_experts} booleans, one for each slot, at least one of them true, "
                f"got {allowed_E.tolist()}"
            )
        where = next(chain(self.parameters(), self.buffers()), allowed_E).device
        self.allowed_E = allowed_E.to(where, copy=True)

    @property
    def num_allowed(self) -> int:
        """Number of slots that the gate may choose."""
        return self.num_experts if self.allowed_E is None else int(self.allowed_E.sum())

    @property
    def largest_entropy(self) -> float:
        """Return the auxiliary loss ``entropy`` where every slot is as likely as any other; 0: there is no such loss.

        Divided by it, the loss says how far the gate has hardened: near 1 at the start, 0 when its choice is certain.
        """
        return 0.0

    def exclude(self, score_E: Tensor) -> Tensor:
        """Return (..., n) logits or scores with -inf for excluded slots."""
        return score_E if self.allowed_E is None else score_E.masked_fill(~self.allowed_E, -torch.inf)

    def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Route:
        """Return the route of (T, D) tokens. Raises ValueError for tokens of another shape."""
        if x_TD.dim() != 2 or x_TD.shape[1] != self.dim:
            raise ValueError(f"expected tokens of shape (T, {self.dim}), got {tuple(x_TD.shape)}")
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.route(x_TD.to(gate_dtype(x_TD)), ids_T)

    @abstractmethod
    def mixture(self, x_TD: Tensor, ids_T: Tensor | None) -> Mixture:
        """Return the dense mixture of tokens that have their final precision (fp32 or fp64)."""

    def route(self, x_TD: Tensor, ids_T: Tensor | None) -> Route:
        """Return the non-zeros of :meth:`mixture`: of every branch, or of their sum."""
        mixture = self.mixture(x_TD, ids_T)
        weight_TKE = mixture.weight_TKE
        weight_TS = weight_TKE.flatten(1) if self.splits_branches else weight_TKE.sum(dim=1)
        return Route.from_dense(weight_TS, mixture.aux)

    def logits(self, x_TD: Tensor) -> Tensor | None:
        """Return the (T, n) logits of the slots, -inf for excluded ones, by which a gate of one linear layer chooses.

        None: it has no such layer.
        """
        return None

    @property
    def rows_ED(self) -> Tensor | None:
        """The (n, D) rows of the linear layer that gives the slots' logits; None: the gate has no such layer."""
        return None

    def begin_step(self, step: int) -> None:
        """Prepare for training step ``step`` (from 0), on every rank; for gates with a schedule."""

    def end_step(self) -> None:
        """Conclude a training step, on every rank; for gates with a feedback loop."""

    def total(self, sums: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the sums over all ranks' tokens, given ``sums`` over this rank's ``num_tokens``, and their number.

        All tokens are those of this forward pass: with gradient accumulation, of one micro-batch.

        Differentiable: an auxiliary loss counts with this rank's share of the tokens, so the gradient
        to the local part is divided by that share. The ranks' gradients then add up to the true one.
        """
        with torch.no_grad():
            totals = self.sum_over_ranks(torch.cat([sums.detach().flatten(), sums.new_full((1,), num_tokens)]))
        total_tokens = totals[-1]
        own = (sums - sums.detach()) * (total_tokens / max(num_tokens, 1))
        return totals[:-1].view_as(sums) + own, total_tokens


class GateSettings(Settings, ABC):
    """A gate's section of the configuration: a literal ``name``, its options, and how to build it.

    ``evaluation_fields``: options that a trained gate may be evaluated with other values of, as no tensor of it
    depends on them.
    ``stackable``: whether trials of a sweep can be trained as one stack, by ``torch.vmap`` over :meth:`Gate.mixture`:
    no operation of it may depend on values, and no state change between steps.
    ``varying``: numbers that may differ between the trials of a stack: attributes of that name of the gate, which may
    be 0-dim tensors. What the gate is built with, such as initial weights, may depend on them.
    """

    evaluation_fields: ClassVar[tuple[str, ...]] = ()
    stackable: ClassVar[bool] = False
    varying: ClassVar[tuple[str, ...]] = ()

    name: str

    @abstractmethod
    def build(self, dim: int, num_experts: int, context: GateContext) -> Gate:
        """Return the gate over ``num_experts`` slots for tokens of width ``dim``."""

    @property
    def has_entropy(self) -> bool:
        """Whether the gate's :attr:`~Gate.largest_entropy` is above 0: training records how far it has hardened."""
        return False

    def of_layer(self, layer: int) -> Self:
        """Return the settings of the gate of MoE layer ``layer`` (from 0) of a model that has several."""
        return self

    def experts_per_token(self, num_experts: int) -> int:
        """Return the most slots that a token gets, for plans; of a gate that becomes sparse while it learns, then."""
        return min(getattr(self, "k", num_experts), num_experts)

    def stacking_errors(self) -> Iterator[str]:
        """Yield which options keep trials of a stackable gate from being stacked, as "field=value: reason"."""
        yield from ()

    def validation_errors(self, num_experts: int) -> Iterator[str]:
        """Yield whatever does not fit ``num_experts`` slots, as "field=value: reason"."""
        k = getattr(self, "k", 1)
        if k > num_experts:
            yield f"k={k} exceeds num_experts={num_experts}; allowed: 1..{num_experts}"


@dataclass(frozen=True)
class GateContext:
    """Facts of the run that a gate may need. ``id_counts``: (ids,) how often each id occurs in the
    training data. ``total_steps``: of the run."""

    id_counts: Tensor | None = None
    total_steps: int | None = None


GATES = Registry("gate", GateSettings, default="comet")

GateConfig = Annotated[SerializeAsAny[GateSettings], GATES]
"""The type of a configuration field that holds any registered gate."""


def check_k(k: int, num_experts: int) -> None:
    """Raise ValueError unless 1 <= k <= num_experts."""
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must lie in 1..num_experts={num_experts}, got {k}")


def gate_dtype(x: Tensor) -> torch.dtype:
    """Return the precision in which a gate computes: fp64 for fp64, fp32 for anything lower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def affine(x_TD: Tensor, weight_QD: Tensor | None, bias_Q: Tensor) -> Tensor:
    """Return the (T, ...) values of hyperplanes (..., D) with biases (...), in the precision of ``x_TD``.

    Without weights (a static gate) these are the biases, for every token.
    """
    if weight_QD is None:
        return bias_Q.to(x_TD.dtype).expand(len(x_TD), *bias_Q.shape)
    weight = weight_QD.reshape(-1, weight_QD.shape[-1]).to(x_TD.dtype)
    values = nn.functional.linear(x_TD, weight, bias_Q.flatten().to(x_TD.dtype))
    return values.view(-1, *bias_Q.shape)


def smooth_step(t: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return the smooth-step S(t) and 1 - S(t), of any shape: a sigmoid that reaches 0 and 1 exactly.

    Hazimeh et al., The Tree Ensemble Layer (ICML 2020), eq. 2; used by DSelect-k (2021) and COMET (KDD 2023)::

        S(t) = 0 for t <= -gamma/2,  1 for t >= gamma/2,  -2 t^3/gamma^3 + 3 t/(2 gamma) + 1/2 between

    With u = clamp(t/gamma + 1/2, 0, 1) the cubic is u^2 (3 - 2u) and its complement
    (1-u)^2 (1 + 2u). The cubic as printed gives values below 0 just inside the left edge in fp32,
    and 1 - S loses all precision near 1; this form does neither. Both derivatives are exactly 0
    outside the open interval, which is what makes skipping an expert exact.
    """
    u = (t / gamma + 0.5).clamp(0.0, 1.0)
    w = 1.0 - u
    return u * u * (3.0 - 2.0 * u), w * w * (1.0 + 2.0 * u)


def _alone(x: Tensor) -> Tensor:
    return x
