"""Pictures of the tables from slots to experts and from experts to ranks."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from dist_moe.parallel import Placement
from dist_moe.routing import HardMap
from dist_moe.search import choose_placement
from tools.how.canvas import INK, RANKS, SOFT, arrow, box, canvas, note


def draw_slot_map() -> Figure:
    """A gate's slots, the experts that they mean, and the ranks on which these live before and after a move."""
    num_slots, num_experts, num_ranks = 8, 6, 3
    table = HardMap(torch.tensor([[2, 0, 5, 1, 2, 4, 3, 0]]), num_experts, merges=True).table_KS[0].tolist()
    load_E = [60, 50, 5, 10, 20, 15]
    before = Placement.identity(num_experts, num_ranks)
    choice = choose_placement(load_E, before)
    figure, axes = canvas(8.2, 4.3, (-2.6, 17.2), (-0.8, 5.6))
    slot_x = [i * 1.0 for i in range(num_slots)]
    expert_x = [0.2 + i * 1.32 for i in range(num_experts)]
    for slot, expert in enumerate(table):
        box(axes, slot_x[slot], 5.0, f"s{slot}", SOFT)
        arrow(axes, (slot_x[slot], 4.75), (expert_x[expert], 3.4), SOFT)
    for expert in range(num_experts):
        box(axes, expert_x[expert], 3.1, f"E{expert}", INK)
        position = choice.placement.position_of_expert[expert]
        colour = RANKS[choice.placement.rank_of(expert)]
        arrow(axes, (expert_x[expert], 2.85), (expert_x[position], 1.0), colour, 1.8)
    for position, expert in enumerate(choice.placement.expert_of_position):
        colour = RANKS[choice.placement.rank_of(expert)]
        box(axes, expert_x[position], 0.7, f"E{expert}", colour)
        note(axes, expert_x[position], 0.2, f"{load_E[expert]}", ha="center")
    for rank in range(num_ranks):
        note(axes, sum(expert_x[2 * rank : 2 * rank + 2]) / 2, -0.35, f"rank {rank}", ha="center", color=RANKS[rank])
    note(axes, -0.8, 5.0, "slots", ha="right", color=INK)
    note(axes, -0.8, 4.05, "slot map:\nwhat is computed", ha="right")
    note(axes, -0.8, 3.1, "experts", ha="right", color=INK)
    note(axes, -0.8, 1.95, "placement:\nwhere", ha="right")
    note(axes, -0.8, 0.2, "tokens a step", ha="right")
    bars = ((9.8, "contiguous ids", before, choice.before), (14.2, "after the move", choice.placement, choice.after))
    for left, title, placement, imbalance in bars:
        note(axes, left + 1.0, 5.0, title, ha="center", color=INK)
        for rank in range(num_ranks):
            load = sum(load_E[expert] for expert in placement.experts_of(rank))
            axes.bar(left + rank, load / 32, 0.8, bottom=0.7, color=RANKS[rank])
            note(axes, left + rank, 0.95 + load / 32, str(load), ha="center")
            note(axes, left + rank, 0.4, f"rank {rank}", ha="center", fontsize=8)
        note(axes, left + 1.0, -0.35, f"heaviest / mean = {imbalance:.2f}", ha="center")
    return figure
