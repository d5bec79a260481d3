"""Alarms about routing: a layer that collapses, one that does nothing, balance that is lost, a search without effect.

Of each layer the rows of the last 20 steps are looked at together, every ten steps. Let E be its experts, m the mean
number of experts per token, n = exp(entropy of the load) the effective number of experts. All tokens with the same
experts have n = m, an even load has n = E, so that

    diversity d = (n - m) / (E - m)

is 0 for a collapsed layer and 1 for an even one, however many experts a token has. A layer in which nearly every token
goes to nearly every expert (m > 0.8 E: trees that are still soft) is even by nature, and not looked at.

    dead layer             no row at all
    collapse               d < 0.1
    collapse within steps  the mean of the d of each step is below 0.1, two looks in a row, and there is no collapse
    loss of balance        d below half of its mean over about the last hundred steps, two looks in a row

A balance loss can hide from d that the tokens of a step are all alike to the gate: it sends them to other experts in
the next step, all together. In one step there are few rows: the d of a step is that over what an even gate has at
least, (n - m) / (r E / (r + E - 1) - m) at r rows (the inverse of Simpson's index, in expectation).

An alarm is given once, until the layer has recovered. It comes at most 40 steps after its cause is complete, and
``train.log_every`` steps, until which the numbers wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from dist_moe.engine.callbacks import Callback
from dist_moe.engine.monitor.load import effective_experts
from dist_moe.search import PermutationSearch

if TYPE_CHECKING:
    from dist_moe.engine.training import Trainer

WINDOW, EVERY = 20, 10
"""Steps whose rows are pooled, and steps between two looks at them."""

_SOFT, _COLLAPSED, _RECOVERED = 0.8, 0.1, 0.2
_LOST, _REGAINED, _LOOKS = 0.5, 0.75, 2
_MEMORY, _LEAST_LOOKS = 0.1, 10
_COUNTERS = ("looks", "lost", "alike")
_STATE = TypeAdapter(dict[str, list[Any]])

REMEDIES = {
    "dead layer": "no token reaches its experts: look at null slots, slot masks, and what the gate gets as input",
    "collapse": "raise the gate's balance loss, lower the learning rate, or go on from an earlier checkpoint",
    "collapse within steps": "the tokens of a step are alike to the gate, which no balance loss mends: look at its "
    "input and the norm of that, lower the learning rate, or go on from an earlier checkpoint",
    "loss of balance": "look at learning rate and gradient norm there; if it stays, raise the gate's balance loss",
    "search without effect": "begin with higher temperatures or learn for longer (model.permutation), or leave it out",
}
"""Advice by kind of alarm."""


@dataclass(frozen=True)
class Alarm:
    """``kind``: a key of REMEDIES. ``what``: where and how much, in words."""

    kind: str
    what: str

    def sentence(self, step: int) -> str:
        """Return the one line that the screen shows."""
        return f"ALARM after step {step}: {self.kind}: {self.what}; {REMEDIES[self.kind]} (docs/monitoring.md)"


@dataclass
class _Block:
    """The rows of some steps by layer and expert, their tokens, how many steps they are, and sums over the steps.

    ``within_3L``: how many steps could be judged alone, the sum of their d, and of their effective experts.
    """

    load_LE: NDArray[np.float64] = field(default_factory=lambda: np.zeros((1, 1)))
    tokens: float = 0.0
    steps: int = 0
    within_3L: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, 1)))

    def add(self, other: _Block) -> None:
        self.load_LE, self.within_3L = self.load_LE + other.load_LE, self.within_3L + other.within_3L
        self.tokens, self.steps = self.tokens + other.tokens, self.steps + other.steps

    def plain(self) -> list[Any]:
        return [self.load_LE.tolist(), self.tokens, self.steps, self.within_3L.tolist()]

    @classmethod
    def of_step(cls, load_LE: NDArray[np.float64], tokens: float, experts_L: NDArray[np.float64]) -> _Block:
        rows_L = load_LE.sum(axis=1)
        per_token_L = rows_L / max(tokens, 1.0)
        room_L = rows_L * experts_L / np.maximum(rows_L + experts_L - 1, 1.0) - per_token_L
        is_judged_L = (rows_L > 0) & (per_token_L <= _SOFT * experts_L)
        is_judged_L &= room_L >= np.minimum(1.0, (experts_L - per_token_L) / 2)  # else there are too few rows to tell
        effective_L = effective_experts(load_LE)
        diversity_L = (effective_L - per_token_L) / np.where(is_judged_L, room_L, 1.0)
        return cls(load_LE, tokens, 1, is_judged_L * np.stack([np.ones_like(rows_L), diversity_L, effective_L]))


class LoadWatch:
    """Looks at the load of layers with ``experts`` experts each; knows no trainer."""

    def __init__(self, experts: Sequence[int]) -> None:
        self._experts_L = np.asarray(experts, dtype=np.float64)
        self._blocks: deque[_Block] = deque([_Block()], maxlen=WINDOW // EVERY)
        self._usual_L = np.full(len(experts), np.nan)
        self._looks_L, self._lost_looks_L, self._alike_looks_L = np.zeros((3, len(experts)))
        self._raised: dict[str, list[int]] = {}

    def see(self, step: int, load: Sequence[Sequence[float]], tokens: float | None) -> list[Alarm]:
        """Take in the rows of a step, by layer and expert, and the tokens of the step; return what is wrong since then.

        ``tokens`` None: unknown; each is taken to have one expert.
        """
        width = max(map(len, load))
        load_LE = np.asarray([[*load_E, *[0.0] * (width - len(load_E))] for load_E in load], dtype=np.float64)
        self._blocks[-1].add(_Block.of_step(load_LE, tokens or float(load_LE.sum(axis=1).max()), self._experts_L))
        if step % EVERY:
            return []
        pooled = _Block()
        for block in self._blocks:
            pooled.add(block)
        self._blocks.append(_Block())
        if pooled.steps < WINDOW:
            return []
        load_LE, per_token_L = pooled.load_LE, pooled.load_LE.sum(axis=1) / max(pooled.tokens, 1.0)
        effective_L = effective_experts(load_LE)
        is_dead_L, is_soft_L = per_token_L == 0, per_token_L > _SOFT * self._experts_L
        diversity_L = np.where(
            is_dead_L | is_soft_L, np.nan, (effective_L - per_token_L) / np.maximum(self._experts_L - per_token_L, 1e-9)
        )
        usual_L = np.where(self._looks_L >= _LEAST_LOOKS, np.maximum(self._usual_L, 1e-9), np.nan)
        lost_L = diversity_L / usual_L
        self._lost_looks_L = np.where(lost_L < _LOST, self._lost_looks_L + 1, 0)
        share_L = load_LE.max(axis=1) / np.maximum(load_LE.sum(axis=1), 1.0)
        in_words = [
            f"{n:.1f} effective experts of {int(e)}, at {m:.1f} per token, the busiest with {s:.0%} of the rows"
            for n, e, m, s in zip(effective_L, self._experts_L, per_token_L, share_L, strict=True)
        ]
        alarms = [
            *self._settle(
                "dead layer", is_dead_L, ~is_dead_L, -per_token_L, [f"no row in the last {WINDOW} steps"] * len(load)
            ),
            *self._settle("collapse", diversity_L < _COLLAPSED, diversity_L > _RECOVERED, diversity_L, in_words),
        ]
        collapsed_L = np.isin(np.arange(len(load)), self._raised.get("collapse", []))
        alarms += self._look_within(pooled, per_token_L, collapsed_L)
        is_lost_L = (self._lost_looks_L >= _LOOKS) & ~collapsed_L
        alarms += self._settle("loss of balance", is_lost_L, lost_L > _REGAINED, lost_L, in_words)
        self._remember(np.where(self._lost_looks_L > 0, np.nan, diversity_L))
        return alarms

    def _look_within(
        self, pooled: _Block, per_token_L: NDArray[np.float64], collapsed_L: NDArray[np.bool_]
    ) -> list[Alarm]:
        """Return an alarm for layers whose tokens have the same experts in each step, but others in others."""
        count_L, diversity_L, effective_L = pooled.within_3L
        is_known_L = count_L > WINDOW / 2
        within_L = np.where(is_known_L, diversity_L / np.maximum(count_L, 1), np.nan)
        self._alike_looks_L = np.where(within_L < _COLLAPSED, self._alike_looks_L + 1, 0)
        in_words = [
            f"{n:.1f} effective experts of {int(e)} within a step, at {m:.1f} per token, and others in other steps"
            for n, e, m in zip(effective_L / np.maximum(count_L, 1), self._experts_L, per_token_L, strict=True)
        ]
        is_alike_L = (self._alike_looks_L >= _LOOKS) & ~collapsed_L
        return self._settle("collapse within steps", is_alike_L, within_L > _RECOVERED, within_L, in_words)

    def _settle(
        self,
        kind: str,
        is_bad_L: NDArray[np.bool_],
        is_good_L: NDArray[np.bool_],
        worst_L: NDArray[np.float64],
        in_words: Sequence[str],
    ) -> list[Alarm]:
        """Return an alarm for the layers that have become bad; forget those that have become good."""
        raised = [layer for layer in self._raised.get(kind, []) if not is_good_L[layer]]
        new = [layer for layer in np.flatnonzero(is_bad_L).tolist() if layer not in raised]
        self._raised[kind] = raised + new
        if not new:
            return []
        worst = min(new, key=lambda layer: worst_L[layer])
        several = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
        return [Alarm(kind, f"MoE layer {worst}{several} has {in_words[worst]}")]

    def _remember(self, diversity_L: NDArray[np.float64]) -> None:
        known_L = ~np.isnan(diversity_L)
        weight_L = np.maximum(_MEMORY, 1 / (self._looks_L + 1))  # a plain mean at first
        before_L = np.where(np.isnan(self._usual_L), diversity_L, self._usual_L)
        self._usual_L = np.where(known_L, before_L + weight_L * (diversity_L - before_L), self._usual_L)
        self._looks_L += known_L

    def state_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: the steps that are pooled, what is usual, and which alarms were given."""
        usual = [None if np.isnan(one) else one for one in self._usual_L.tolist()]
        counters = (self._looks_L, self._lost_looks_L, self._alike_looks_L)
        seen = {name: looks_L.tolist() for name, looks_L in zip(_COUNTERS, counters, strict=True)}
        return {"blocks": [block.plain() for block in self._blocks], "usual": usual, **seen, **self._raised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`state_dict` gave. Raises ValueError if it is of another kind or of other layers."""
        state = _STATE.validate_python(state)
        blocks = [
            _Block(np.asarray(load, float), float(n), int(steps), np.asarray(within, float))
            for load, n, steps, within in state.pop("blocks", [])
        ]
        usual = [np.nan if one is None else one for one in state.pop("usual", [])]
        arrays = [np.asarray(one, float) for one in (usual, *(state.pop(name, []) for name in _COUNTERS))]
        raised = {kind: list(map(int, layers)) for kind, layers in state.items()}
        layers = len(self._experts_L)
        shapes = {((1, 1), (3, 1)), ((layers, int(self._experts_L.max(initial=1))), (3, layers))}
        found = {(one.load_LE.shape, one.within_3L.shape) for one in blocks}
        if any(array.shape != (layers,) for array in arrays) or not found <= shapes:
            raise ValueError(f"it is not of a model with {layers} layers")
        if any(not 0 <= layer < layers for of_kind in raised.values() for layer in of_kind):
            raise ValueError("it names layers that there are not")
        self._blocks.extend(blocks)
        self._usual_L, self._looks_L, self._lost_looks_L, self._alike_looks_L = arrays
        self._raised = raised


class RouterAlarm(Callback):
    """Gives the alarms of a fit: one line on the screen, and a text in the trackers."""

    def __init__(self) -> None:
        self._watch: LoadWatch | None = None
        self._state: dict[str, Any] = {}
        self._is_learning = False

    def on_start(self, trainer: Trainer) -> None:
        """Begin, or go on with what was usual before a restart; anew, which is said, if that was of other layers."""
        self._watch = LoadWatch([layer.experts.num_experts for layer in trainer.layers])
        if self._state:
            try:
                self._watch.load_state_dict(self._state)
            except (ValueError, TypeError) as error:
                trainer.monitor.say(f"warning: alarms begin anew, the checkpoint has unfit ones: {error}")
        self._is_learning = _is_learning(trainer)

    def on_records(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        """Look at the load of every step, and whether a permutation that is learnt no more has moved anything."""
        assert self._watch is not None
        for record in records:
            if record.get("skipped"):  # nothing of such a step remains
                continue
            if len(load := record.get("load", ())) == len(trainer.layers) and load:
                for alarm in self._watch.see(record["step"], load, record.get("tokens")):
                    _give(trainer, alarm, record["step"])
        was_learning, self._is_learning = self._is_learning, _is_learning(trainer)
        if not was_learning or self._is_learning:
            return
        searches = {name: one for name, one in trainer.tables.items() if isinstance(one, PermutationSearch)}
        if still := [name for name, one in searches.items() if one.control is None and not one.rows_changed()]:
            what = f"the permutation search has moved no row of {', '.join(still)}, whose tables are random"
            _give(trainer, Alarm("search without effect", what), records[-1]["step"])

    def state_dict(self) -> dict[str, Any]:
        """Return what is usual, and which alarms were given."""
        return {} if self._watch is None else self._watch.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state until the layers are known."""
        self._state = state


def _is_learning(trainer: Trainer) -> bool:
    return any(table.learning for table in trainer.tables.values())


def _give(trainer: Trainer, alarm: Alarm, step: int) -> None:
    trainer.monitor.say(alarm.sentence(step))
    trainer.monitor.text("alarm", alarm.sentence(step), step)
