"""Top-k: a linear router keeps the k best experts of every token.

Shazeer et al.: Outrageously Large Neural Networks (ICLR 2017). With logits l = W x + b:

    noise (training only)  l += N(0, 1) softplus(W_noise x)
    softmax_after          softmax over the k kept logits (Shazeer, eq. 3-5; the COMET comparison)
    softmax_before         the kept entries of the softmax over all, not divided by their sum (Fedus et
                           al., Switch Transformers, JMLR 2022): a token's weights sum to at most 1
    sigmoid                the kept sigmoids divided by their sum (DeepSeek-V3, 2024, eq. 13-16)

Against overloaded experts: the load-balance loss (see :mod:`dist_moe.gates.balance`), or, without a
loss, a bias that is added to the scores for the selection only (Wang et al.: Auxiliary-Loss-Free
Load Balancing, 2024): after each step b_i += rate * sign(mean load - load of i). Against growing
logits: the mean of logsumexp(l)^2 (Zoph et al.: ST-MoE, 2022, eq. 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe import kernels
from dist_moe.gates.balance import load_balance
from dist_moe.gates.base import GATES, Gate, GateContext, GateSettings, Mixture, affine, check_k
from dist_moe.routing import Route

Scores = Literal["softmax_after", "softmax_before", "sigmoid"]


def largest(score_TE: Tensor, k: int) -> Tensor:
    """Return the (T, k) slots of the largest scores, falling; of equal ones the lower, which topk does not promise."""
    return score_TE.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def largest_of_many(score_TE: Tensor, k: int) -> Tensor:
    """Return what :func:`largest` does without sorting all scores: tokens with ties in their k + 1 largest are redone.

    Under ``torch.vmap``, where nothing may depend on values, use :func:`largest`.
    """
    if k == score_TE.shape[1] or kernels.on_device_path(score_TE):
        return largest(score_TE, k)
    found = score_TE.topk(k + 1, dim=1)
    tied_T = (found.values[:, 1:] == found.values[:, :-1]).any(dim=1)
    slot_TK = found.indices[:, :k]
    return slot_TK.index_put((tied_T,), largest(score_TE[tied_T], k)) if tied_T.any() else slot_TK


@GATES.register
class TopKConfig(GateSettings):
    """The Top-k gate: the k experts with the largest router logits, for every token alike."""

    evaluation_fields: ClassVar[tuple[str, ...]] = ("k",)
    stackable: ClassVar[bool] = True

    name: Literal["top_k"] = "top_k"
    k: int = Field(2, ge=1, description="experts per token")
    scores: Scores = Field(
        "softmax_after",
        description="weights: softmax over the kept logits, the kept part of the softmax over all (as Switch; not "
        "renormalised), or kept sigmoids divided by their sum (as DeepSeek-V3)",
    )
    bias: bool = Field(
        True, description="a learnt bias for each expert's logit; Mixtral has none, so that only false can become one"
    )
    noise: bool = Field(False, description="add learnt gaussian noise to the logits while training")
    balance_weight: float = Field(
        0.0, ge=0, description="weight of the load-balance loss, which is 1 for uniform routing"
    )
    z_loss_weight: float = Field(0.0, ge=0, description="weight of the mean squared logsumexp of the logits")
    bias_update_rate: float = Field(
        0.0, ge=0, description="step of the selection bias that balances the load without a loss (0: no bias)"
    )

    def build(self, dim: int, num_experts: int, context: GateContext) -> TopK:
        """Return the gate with these options."""
        return TopK(dim, num_experts, **self.model_dump(exclude={"name"}))

    def stacking_errors(self) -> Iterator[str]:
        """Yield an error for a feedback loop, whose state would change between steps."""
        if self.bias_update_rate:
            yield f"bias_update_rate={self.bias_update_rate:g}: a gate with a feedback loop cannot be stacked"


class TopK(Gate):
    """``weight`` (n, dim), glorot-uniform, and ``bias`` (n,), zero, as in the COMET comparison, or None.

    Logits are kept by index, never by value: a kept logit of exactly 0 counts. Among equal ones the
    lower slot wins. ``noise_weight`` (n, dim), zero at first, exists only with ``noise``.
    ``aux["load_balance"]`` and ``aux["z_loss"]``: only with a weight, only while training. The
    options are described in :class:`TopKConfig`.
    """

    can_exclude = True
    selections: Tensor
    bias_steps: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        scores: Scores = "softmax_after",
        bias: bool = True,
        noise: bool = False,
        balance_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        bias_update_rate: float = 0.0,
    ) -> None:
        super().__init__(dim, num_experts)
        check_k(k, num_experts)
        self.k = k
        self.scores = scores
        self.balance_weight = balance_weight
        self.z_loss_weight = z_loss_weight
        self.bias_update_rate = bias_update_rate
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_experts, dim)))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim)) if noise else None
        if bias_update_rate:
            # Whole steps: a bias kept in bf16, as the rest of a bf16 model, would soon swallow its updates.
            self.register_buffer("bias_steps", torch.zeros(num_experts, dtype=torch.int64))
            self.register_buffer("selections", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    @property
    def selection_bias(self) -> Tensor:
        """Return the (n,) fp64 biases added to the scores for the selection; only with ``bias_update_rate``."""
        return self.bias_update_rate * self.bias_steps.double()

    def mixture(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Mixture:
        """Return the kept slots' weights, in one branch."""
        return self.mixture_of_logits(self.logits(x_TD))

    def route(self, x_TD: Tensor, ids_T: Tensor | None) -> Route:
        """Return the route of the k choices: no (T, n) mixture is made, and on an accelerator the host never waits.

        With excluded slots it does wait: where fewer than k are left, some of the k have no weight.
        """
        logit_TE = self.logits(x_TD)
        slot_TK, kept_TK = self._choose(logit_TE, largest_of_many)
        route = Route.from_choices(slot_TK, kept_TK, self.num_slots, self._aux(logit_TE, slot_TK))
        waits = not kernels.on_device_path(x_TD) or self.allowed_E is not None
        return route.keep(route.weight_N != 0) if waits else route

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the (T, n) logits, with noise while training if there is any; -inf for excluded slots."""
        bias_E = self.weight.new_zeros(()).expand(self.num_experts) if self.bias is None else self.bias
        logit_TE = affine(x_TD, self.weight, bias_E)
        if self.noise_weight is not None and self.training:
            deviation_TE = nn.functional.softplus(nn.functional.linear(x_TD, self.noise_weight.to(x_TD.dtype)))
            logit_TE = logit_TE + torch.randn_like(logit_TE) * deviation_TE
        return self.exclude(logit_TE)

    @property
    def rows_ED(self) -> Tensor | None:
        """The router's (n, dim) rows."""
        return self.weight

    def probabilities(self, logit_TE: Tensor) -> Tensor:
        """Return the (T, n) router probabilities over all slots: the softmax, or each sigmoid divided by their sum."""
        return self._log_scores(logit_TE).softmax(dim=-1)

    def mixture_of_logits(self, logit_TE: Tensor) -> Mixture:
        """Return the selected and weighed slots of (T, n) logits, in one branch, with the auxiliary losses."""
        slot_TK, kept_TK = self._choose(logit_TE)
        weight_TE = torch.zeros_like(logit_TE).scatter(1, slot_TK, kept_TK)
        return Mixture(weight_TE.unsqueeze(1), self._aux(logit_TE, slot_TK))

    def end_step(self) -> None:
        """Move the selection bias against the loads of all ranks since the last call."""
        if self.bias_update_rate:
            load_E = self.sum_over_ranks(self.selections)
            share = self.num_experts if self.allowed_E is None else self.allowed_E.sum()
            self.bias_steps += torch.sign(load_E.sum() - share * load_E)
            self.selections.zero_()

    def _choose(self, logit_TE: Tensor, select: Callable[[Tensor, int], Tensor] = largest) -> tuple[Tensor, Tensor]:
        """(T, k) slots and their weights."""
        slot_TK = select(self._selection_scores(logit_TE.detach()), self.k)
        if self.scores == "softmax_before":
            return slot_TK, logit_TE.softmax(dim=-1).gather(1, slot_TK)
        return slot_TK, self._log_scores(logit_TE).gather(1, slot_TK).softmax(dim=-1)

    def _log_scores(self, logit_TE: Tensor) -> Tensor:
        """Return logarithms of the scores: their softmax over any set of slots divides the scores by the set's sum."""
        return nn.functional.logsigmoid(logit_TE) if self.scores == "sigmoid" else logit_TE

    def _selection_scores(self, logit_TE: Tensor) -> Tensor:
        if not self.bias_update_rate:
            return logit_TE  # in the order of the scores, and without ties by underflow
        score_TE = logit_TE.sigmoid() if self.scores == "sigmoid" else logit_TE.softmax(dim=-1)
        # One logit that is not finite makes NaN of all: it must come first itself, or it would vanish unseen.
        score_TE = torch.where(score_TE.isnan(), logit_TE, score_TE)
        return self.exclude(score_TE + self.selection_bias.to(score_TE.dtype))

    def _aux(self, logit_TE: Tensor, slot_TK: Tensor) -> dict[str, Tensor]:
        """While training: count the selections and give the auxiliary losses."""
        if not self.training:
            return {}
        selected_TE = torch.zeros_like(logit_TE, dtype=torch.bool).scatter(1, slot_TK, True)
        if self.allowed_E is not None:  # with fewer slots than k, some that are excluded come last among the k
            selected_TE = selected_TE & self.allowed_E
        aux = {}
        if self.bias_update_rate:
            self.selections += selected_TE.sum(dim=0)
        if self.balance_weight:
            aux["load_balance"] = self.balance_weight * load_balance(self, selected_TE, self.probabilities(logit_TE))
        if self.z_loss_weight:
            z_T = logit_TE.logsumexp(dim=-1).square()
            aux["z_loss"] = self.z_loss_weight * (z_T.sum() / max(len(z_T), 1))
        return aux
