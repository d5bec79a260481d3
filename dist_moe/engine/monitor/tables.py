"""Pictures of what routes: the slot -> expert tables that a search rewrites, and which rank has which expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from dist_moe.engine.callbacks import Callback
from dist_moe.engine.monitor.pictures import HeatMap, has_grown, short_names
from dist_moe.parallel import Placement
from dist_moe.recording import record
from dist_moe.search import PermutationSearch, SlotTable

if TYPE_CHECKING:
    from dist_moe.engine.training import Trainer

_PANELS = 4


def rows_changed(table: SlotTable) -> int:
    """Return how many slots, over all tables of a layer, lead elsewhere than at first.

    At first slot i leads to expert i mod E, or where a permutation search began.
    """
    return int(_is_changed(table).sum())


def _is_changed(table: SlotTable) -> torch.Tensor:
    """Return (P, K, S) whether a slot leads elsewhere than at first."""
    first_S: torch.Tensor = torch.arange(table.num_slots, device=table.table.device) % table.num_experts
    return table.table != (table.start if isinstance(table, PermutationSearch) else first_S)


class RouterPictures(Callback):
    """Shows the tables of a run that searches: the rows changed at every step, and pictures at its end and whenever it
    is half as long again as at the last ones. Shows the placement when it has changed, and at first."""

    def __init__(self) -> None:
        self._tables: dict[str, SlotTable] = {}
        self._searched = False
        self._counted: dict[str, tuple[object, int, int]] = {}
        self._drawn_at = 0
        self._placements: list[Placement] = []

    def on_start(self, trainer: Trainer) -> None:
        """Show where the experts live."""
        self._tables = trainer.tables
        self._searched = any(isinstance(table, PermutationSearch) for table in self._tables.values())
        self._show_placement(trainer, trainer.step)

    def after_step(self, trainer: Trainer, step: int) -> None:
        """Record the rows changed, where a table is searched or not as it was at first, and is not being learnt."""
        if any(table.learning for table in self._tables.values()):
            return
        changed = sum(self._count(name, table) for name, table in self._tables.items())
        if changed or self._searched:
            record("rows_changed", float(changed))

    def on_records(self, trainer: Trainer, records: list[dict[str, float]]) -> None:
        """Show what is due."""
        step = trainer.step
        self._show_placement(trainer, step)
        if (self._searched or "rows_changed" in records[-1]) and has_grown(step, self._drawn_at):
            self._show_tables(trainer, step)

    def on_end(self, trainer: Trainer) -> None:
        """Show the tables as they are in the end."""
        if self._drawn_at < trainer.step and (self._searched or any(changed for *_, changed in self._counted.values())):
            self._show_tables(trainer, trainer.step)

    def _count(self, name: str, table: SlotTable) -> int:
        """Return :func:`rows_changed`, for which the host waits for the device only after a change of the table."""
        known = self._counted.get(name)
        if known is None or known[0] is not table.table or known[1] != table.table._version:
            known = self._counted[name] = table.table, table.table._version, rows_changed(table)
        return known[2]

    def _show_tables(self, trainer: Trainer, step: int) -> None:
        self._drawn_at = step
        panels: list[tuple[int, HeatMap]] = []
        for name, table in zip(short_names(list(trainer.tables)), trainer.tables.values(), strict=True):
            changed_PK = _is_changed(table).sum(dim=-1).cpu().numpy()
            matrix_PKSE = table.current_matrix().detach().double().cpu().numpy()
            for gate, branch in np.ndindex(changed_PK.shape):
                which = f", gate {gate}, branch {branch}" if changed_PK.size > 1 else ""
                changed, slots = int(changed_PK[gate, branch]), table.num_slots
                title = f"{name}{which}: {changed} of {slots} rows changed"
                panel = HeatMap(matrix_PKSE[gate, branch], title, "slot", "expert", "weight", limits=(0.0, 1.0))
                panels.append((changed, panel))
        panels.sort(key=lambda one: -one[0])
        trainer.monitor.picture("permutation/slot_to_expert", [panel for _, panel in panels[:_PANELS]], step)

    def _show_placement(self, trainer: Trainer, step: int) -> None:
        placements = [layer.placement for layer in trainer.layers]
        if placements == self._placements or not any(one.num_ranks > 1 for one in placements):
            return
        self._placements = placements
        width, ranks = max(one.num_experts for one in placements), max(one.num_ranks for one in placements)
        rank_LE: NDArray[np.float64] = np.full((len(placements), width), np.nan)
        for rank_E, placement in zip(rank_LE, placements, strict=True):
            rank_E[: placement.num_experts] = [placement.rank_of(e) for e in range(placement.num_experts)]
        title, unit = "where the experts live", "rank in the expert-parallel group"
        panel = HeatMap(rank_LE, title, "MoE layer", "expert", unit, limits=(0.0, ranks - 1.0))
        trainer.monitor.picture("placement/rank_of_expert", [panel], step)
