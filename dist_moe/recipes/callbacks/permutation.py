"""Whether a permutation search moved anything: rows changed, entropy of P, and what rounding it gained."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from dist_moe.data.batches import spread_over
from dist_moe.engine.callbacks import Callback
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.engine.training import Trainer
from dist_moe.parallel import sum_over_ranks
from dist_moe.recipes.callbacks.table_search import batches_of, ready_to_search, task_loss
from dist_moe.search import PermutationSearch
from dist_moe.search.layers import is_held
from dist_moe.tasks.task import Task

TOKENS, BATCH_TOKENS = 4096, 1024
"""Tokens of validation examples, over all ranks, on which rounding is scored, and those of a pass of a rank."""


class PermutationCallback(Callback):
    """Records how far a stage of permutation learning has come, and warns where it ends without a row that changed.

    ``found``: at the stage's end, empty before. ``layers``: by name, ``rows_changed`` since the start of ``rows``, and
    ``entropy`` of a row of P_soft in nats. ``rounding_gain``: the loss on validation examples with P_soft less that
    with the rounded tables, the weights being the same.
    """

    def __init__(self, task: Task, weights: tuple[float, ...]) -> None:
        self._task, self._weights = task, weights
        self.found: dict[str, Any] = {}

    def on_records(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        """Show rows changed and entropy, over all layers, while the stage lasts."""
        searches = _searches(trainer)
        if searches and not self.found:
            trainer.monitor.metrics("permutation", _totals(_state(searches).values()), records[-1]["step"])

    def after_step(self, trainer: Trainer, step: int) -> None:
        """Look at the stage once it has ended."""
        searches = _searches(trainer)
        if searches and not self.found and not any(search.learning for search in searches.values()):
            self._finish(trainer, searches, step)

    def on_end(self, trainer: Trainer) -> None:
        """Look at a stage that lasted to the end of the training."""
        searches = _searches(trainer)
        if searches and not self.found:
            self._finish(trainer, searches, trainer.step)

    def state_dict(self) -> dict[str, Any]:
        """Return what was found."""
        return self.found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what was found."""
        self.found = state

    def _finish(self, trainer: Trainer, searches: dict[str, PermutationSearch], step: int) -> None:
        ACTIVITY.enter("permutation search")
        layers = _state(searches)
        self.found = {"layers": layers, "rounding_gain": self._rounding_gain(trainer, list(searches.values()))}
        totals = _totals(layers.values())
        trainer.monitor.metrics("permutation", totals | {"rounding_gain": self.found["rounding_gain"]}, step)
        trainer.monitor.say(
            f"permutation search until step {step}: {totals['rows_changed']} of {totals['rows']} rows changed, entropy "
            f"{totals['entropy']:.3g}, rounding gained {self.found['rounding_gain']:.3g} of the validation loss"
        )
        still = [name for name, one in layers.items() if not one["rows_changed"] and searches[name].control is None]
        if still:
            trainer.monitor.say(
                f"warning: the permutation search has moved no row of {', '.join(still)}: its table is the random one "
                "that it began with; use model.permutation.schedule=hot, more epochs of it or a higher learning rate"
            )

    @torch.no_grad()
    def _rounding_gain(self, trainer: Trainer, searches: Sequence[PermutationSearch]) -> float:
        model, environment = trainer.model, trainer.groups.environment
        loss, of_example = task_loss(self._task, model, self._weights), self._task.example_shape().tokens
        examples, size = (max(1, int(tokens / of_example)) for tokens in (TOKENS, BATCH_TOKENS))
        batches = batches_of(self._task.val, spread_over(len(self._task.val), examples), size, environment)
        totals = torch.zeros(2, dtype=torch.float64, device=environment.device)
        was_training = model.training
        with ready_to_search(model):
            model.eval()
            for batch in batches:
                totals[1] += loss(batch)
                with ExitStack() as stack:
                    for search in searches:
                        stack.enter_context(search.mixing_softly())
                    totals[0] += loss(batch)
        model.train(was_training)
        soft, hard = sum_over_ranks(totals).tolist()
        return float(soft - hard)


def _searches(trainer: Trainer) -> dict[str, PermutationSearch]:
    tables = trainer.tables.items()
    return {name: one for name, one in tables if isinstance(one, PermutationSearch) and not is_held(one)}


def _state(searches: dict[str, PermutationSearch]) -> dict[str, dict[str, float]]:
    return {
        name: {"rows_changed": one.rows_changed(), "rows": one.start.numel(), "entropy": one.row_entropy()}
        for name, one in searches.items()
    }


def _totals(layers: Any) -> dict[str, float]:
    """Return the sums over layers, and the mean entropy of their rows."""
    changed, rows, entropy = (sum(one[name] for one in layers) for name in ("rows_changed", "rows", "entropy"))
    return {"rows_changed": changed, "rows": rows, "entropy": entropy / len(layers)}
