"""Pruning of rows of S while experts that are stored as U V + S train.

Importance of a row q of an S: I_t = beta I_{t-1} + (1 - beta) mean_i |S_qi dL/dS_qi|, S and gradient being those of
step t: the release of MC-SMoE compares those of the step before. After step t of T the most important rows are kept, a
share r_t of all, with start t_i (warm_up) and end t_f = T - hold,

    r_t = 1 before t_i,   r + (1 - r) (1 - (t - t_i) / (t_f - t_i))^3 in between,   r from t_f on

(Li et al.: LoSparse, ICML 2023; the cubic: Zhu and Gupta, 2017). Rows are removed for good, with their moments.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_moe.config.settings import LARGEST_STEP, Settings, Size
from dist_moe.engine.callbacks import Callback
from dist_moe.engine.deepspeed.parameter_state import zero_state
from dist_moe.engine.deepspeed.sharded_parameters import gather_kept, whole_shape
from dist_moe.engine.training import Trainer
from dist_moe.errors import UserError
from dist_moe.experts import ExpertBank
from dist_moe.parallel import sum_over_ranks
from dist_moe.recording import record


class LowRankPruningConfig(Settings):
    """How experts become a product of low rank plus a few rows."""

    rank: Size = Field(32, description="rank of U V")
    remaining: float = Field(0.1, ge=0, le=1, description="share of the rows of S that is kept")
    scope: Literal["global", "matrix"] = Field(
        "global",
        description="what rows are ranked over: all matrices, as published, each layer's being padded to those of the "
        "expert with most; or each expert's matrix, of which equally many are kept",
    )
    beta: float = Field(0.85, ge=0, lt=1, description="share that importance keeps from step to step")
    warm_up: float = Field(
        0.1, ge=0, le=LARGEST_STEP, description="steps before rows are removed; below 1: share of the training"
    )
    hold: float = Field(
        0.2, ge=0, le=LARGEST_STEP, description="last steps, which remove none; below 1: share of the training"
    )

    def between(self, total_steps: int) -> tuple[int, int]:
        """Return the last step that keeps all rows, and the first that has removed all that are to be removed.

        Raises UserError if no step is left between them.
        """
        warm_up, hold = (round(x if x >= 1 else x * total_steps) for x in (self.warm_up, self.hold))
        if warm_up + hold >= total_steps:
            raise UserError(
                f"warm_up={self.warm_up:g}, hold={self.hold:g}: no step of {total_steps} is left to remove rows; "
                "give less"
            )
        return warm_up, total_steps - hold

    def share_at(self, step: int, total_steps: int) -> float:
        """Return the share of rows that is left after ``step`` steps."""
        start, end = self.between(total_steps)
        to_go = 1 - min(max((step - start) / (end - start), 0.0), 1.0)
        return self.remaining + (1 - self.remaining) * to_go**3


class RowPruning(Callback):
    """Removes rows of S after each step, as ``config`` says: of all factored experts of the model that is trained.

    Ranks agree by one sum over the rows of all experts, to which each expert's score is added once. A removed row has
    the id -1 in its bank's buffer, gets no gradient from then on, and is 0 with its moments. Takes memory as large as a
    rank's S, and where experts have copies, a collective of that size, as importance is of whole gradients.
    """

    def __init__(self, config: LowRankPruningConfig) -> None:
        self._config = config
        self._matrices: dict[str, _Sparse] = {}
        self._saved: dict[str, str] = {}
        self._hooks: list[RemovableHandle] = []
        self._scale = 1.0

    def on_start(self, trainer: Trainer) -> None:
        """Watch the gradients of S. Raises UserError for a model without one, or one that is held or not whole."""
        banks = {name: m for name, m in trainer.model.named_modules() if isinstance(m, ExpertBank)}
        self._matrices = {
            f"{name}.{matrix}": _Sparse(bank, matrix)
            for name, bank in banks.items()
            for matrix in bank.factored
            if hasattr(bank, f"{matrix}_sparse")
        }
        if not self._matrices:
            raise UserError("model.low_rank: no expert has rows that could be pruned; give rank, and rows=null")
        for name, sparse in self._matrices.items():
            if not sparse.parameter.requires_grad:
                raise UserError(f"{name} is not trained: only rows that are can be pruned; train the experts")
            if name in self._saved:
                sparse.importance_EQ.copy_(_tensor_of(self._saved[name]).view_as(sparse.importance_EQ))
            elif not bool((sparse.ids_EQ >= 0).all()):
                raise UserError(f"model.low_rank.rows: rows of {name} are pruned already; give rows=null")
        if trainer.step < self._config.between(trainer.total_steps)[1]:
            self._hooks = [sparse.parameter.register_hook(sparse.see) for sparse in self._matrices.values()]

    def before_step(self, trainer: Trainer, step: int) -> None:
        """Forget the gradients of the step before."""
        self._scale = float(getattr(trainer.engine.optimizer, "loss_scale", 1.0))
        for sparse in self._matrices.values():
            sparse.product_EDQ = None

    def after_step(self, trainer: Trainer, step: int) -> None:
        """Update importance, and remove what is too many. Collective over all ranks."""
        _, end = self._config.between(trainer.total_steps)
        if step <= end:
            if not trainer.engine.step_was_skipped:
                self._update_importance(trainer)
            self._remove(trainer, self._config.share_at(step, trainer.total_steps))
        if step == end:
            self._let_go()
        left, rows = (sum(f(s) for s in self._matrices.values()) for f in (_Sparse.rows_left, _Sparse.rows))
        record("rows_left", left / rows, reduce="max")

    def on_end(self, trainer: Trainer) -> None:
        """Let go of the parameters, of a training that ended early."""
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """Return the importance of all rows; which of them are left is in the model's buffers."""
        return {name: _text_of(sparse.importance_EQ) for name, sparse in self._matrices.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back importance."""
        self._saved = {name: str(text) for name, text in state.items()}

    def _let_go(self) -> None:
        """Watch no gradients any more."""
        for hook in self._hooks:
            hook.remove()
        for sparse in self._matrices.values():
            sparse.product_EDQ = None

    def _update_importance(self, trainer: Trainer) -> None:
        groups, world_size = trainer.groups, trainer.groups.environment.world_size
        scores = []
        for sparse in self._matrices.values():
            product_EDQ = sparse.product_EDQ
            if product_EDQ is None:  # no token of this rank came to the layer
                product_EDQ = torch.zeros(whole_shape(sparse.parameter), device=groups.device)
            trainer.engine.sum_over_copies(product_EDQ)
            score_EQ = torch.zeros(sparse.ids_EQ.shape, device=groups.device)
            if groups.copy == 0:
                score_EQ[list(sparse.bank.expert_ids)] = product_EDQ.abs().mean(dim=1) / (world_size * self._scale)
            scores.append(score_EQ.flatten())
        # Each number is one rank's, plus zeros: the same bits on all ranks, whatever the order of the sum.
        all_scores = sum_over_ranks(torch.cat(scores)).cpu().split([len(score) for score in scores])
        for sparse, score in zip(self._matrices.values(), all_scores, strict=True):
            sparse.importance_EQ.mul_(self._config.beta).add_((1 - self._config.beta) * score.view_as(sparse.ids_EQ))

    def _remove(self, trainer: Trainer, share: float) -> None:
        removed = []
        for mask_EQ, sparse in zip(self._too_many(share), self._matrices.values(), strict=True):
            removed.append(bool(mask_EQ.any()))
            if not removed[-1]:
                continue
            sparse.remove(mask_EQ)
            local_E1Q = mask_EQ[list(sparse.bank.expert_ids)].unsqueeze(1)
            zero_state(trainer.engine, sparse.parameter, local_E1Q.expand(whole_shape(sparse.parameter)))
        if any(removed) and trainer.engine.shards_parameters:
            gather_kept(trainer.engine)

    def _too_many(self, share: float) -> list[Tensor]:
        """Return the rows of each S to be removed, (E, Q): the least important of all, or of each expert's matrix."""
        matrices = list(self._matrices.values())
        left = [sparse.ids_EQ >= 0 for sparse in matrices]
        if self._config.scope == "matrix":
            return [
                torch.stack([least_important(*of, share) for of in zip(s.importance_EQ, left_EQ, strict=True)])
                for s, left_EQ in zip(matrices, left, strict=True)
            ]
        importance = torch.cat([sparse.importance_EQ.flatten() for sparse in matrices])
        mask = least_important(importance, torch.cat([left_EQ.flatten() for left_EQ in left]), share)
        sizes = [left_EQ.numel() for left_EQ in left]
        return [part.view_as(left_EQ) for part, left_EQ in zip(mask.split(sizes), left, strict=True)]


def least_important(importance_N: Tensor, left_N: Tensor, share: float) -> Tensor:
    """Return (N,) bool: which of the rows that are left to remove, so that round(share N) are; of equal ones the last.

    ``importance_N``: of every row. ``left_N``: bool.
    """
    count = max(int(left_N.sum()) - round(share * len(left_N)), 0)
    order_N = importance_N.masked_fill(~left_N, -torch.inf).argsort(descending=True, stable=True)
    mask_N = torch.zeros_like(left_N)
    kept = int(left_N.sum()) - count
    mask_N[order_N[kept : kept + count]] = True
    return mask_N


class _Sparse:
    """An S of all experts of a layer. ``product_EDQ``: S dL/dS of this rank's experts and tokens in this step.

    ``importance_EQ``, ``ids_EQ``: of all experts, on the host.
    """

    def __init__(self, bank: ExpertBank, matrix: str) -> None:
        self.bank = bank
        self.parameter: nn.Parameter = bank.get_parameter(f"{matrix}_sparse")
        self._buffer = bank.get_buffer(f"{matrix}_row_ids")
        self.ids_EQ = self._buffer.cpu().clone()
        self.importance_EQ = torch.zeros(self.ids_EQ.shape)
        self.product_EDQ: Tensor | None = None

    def see(self, grad_EDQ: Tensor) -> None:
        """Add a micro-batch's gradient; a hook of the parameter, which is whole then at every stage of ZeRO."""
        product_EDQ = self.parameter.detach().float() * grad_EDQ.float()
        self.product_EDQ = product_EDQ if self.product_EDQ is None else self.product_EDQ.add_(product_EDQ)

    def remove(self, mask_EQ: Tensor) -> None:
        """Take rows out of those that there are."""
        self.ids_EQ.masked_fill_(mask_EQ, -1)
        self._buffer.copy_(self.ids_EQ)

    def rows(self) -> int:
        """Return the number of all rows of all experts."""
        return self.ids_EQ.numel()

    def rows_left(self) -> int:
        """Return the number of rows that are not removed."""
        return int((self.ids_EQ >= 0).sum())


def _text_of(x: Tensor) -> str:
    return base64.b64encode(x.numpy().astype("<f4").tobytes()).decode()


def _tensor_of(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())
