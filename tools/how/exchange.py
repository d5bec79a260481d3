"""Pictures of rows that travel between ranks, and of the time that it takes."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from tools.how.canvas import INK, LINE, RANKS, arrow, box, canvas, note
from tools.how.gates import EXPERTS, TOKENS, half_hard_route


def draw_ragged_exchange() -> Figure:
    """Tokens of four ranks, the experts that a gate chose for each, and the rows that travel between ranks."""
    route, ranks = half_hard_route(), len(RANKS)
    figure, axes = canvas(8.2, 3.9, (-1.6, 18.4), (-0.9, 4.1))
    token_x = [t * 1.02 for t in range(TOKENS)]
    expert_x = [0.25 + e * 1.53 for e in range(EXPERTS)]
    sent = torch.zeros(ranks, ranks, dtype=torch.int64)
    for token, expert in zip(route.token_N.tolist(), route.slot_N.tolist(), strict=True):
        source, target = token * ranks // TOKENS, expert * ranks // EXPERTS
        sent[source, target] += 1
        colour = RANKS[source] if source != target else LINE
        arrow(axes, (token_x[token], 2.95), (expert_x[expert], 0.52), colour)
    for token, count in enumerate(route.token_N.bincount(minlength=TOKENS).tolist()):
        box(axes, token_x[token], 3.2, f"t{token}", RANKS[token * ranks // TOKENS])
        note(axes, token_x[token], 3.7, str(count), ha="center")
    for expert, count in enumerate(route.slot_N.bincount(minlength=EXPERTS).tolist()):
        box(axes, expert_x[expert], 0.25, f"E{expert}", RANKS[expert * ranks // EXPERTS])
        note(axes, expert_x[expert], -0.3, f"{count} rows", ha="center")
    note(axes, -0.6, 3.7, "experts", ha="right")
    note(axes, 15.3, 3.85, "rows sent", ha="center", color=INK)
    note(axes, 15.3, 3.35, "from rank \\ to rank", ha="center")
    for i in range(ranks):
        note(axes, 13.9 + i, 2.8, str(i), color=RANKS[i], ha="center", fontweight="bold")
        note(axes, 13.0, 2.25 - 0.6 * i, str(i), color=RANKS[i], ha="center", fontweight="bold")
        for j in range(ranks):
            note(axes, 13.9 + j, 2.25 - 0.6 * i, str(int(sent[i, j])), color=LINE if i == j else INK, ha="center")
    stay = int(sent.trace())
    note(axes, 15.3, -0.3, f"{int(sent.sum()) - stay} travel, {stay} stay", ha="center", color=INK)
    return figure


def draw_two_levels() -> Figure:
    """One token's way to four experts on two nodes, row by row and once per node, and rows counted over many tokens."""
    tokens, ranks = 1024, len(RANKS)
    route = half_hard_route(tokens)
    node_of_token, node_of_expert = route.token_N * 2 // tokens, route.slot_N * 2 // EXPERTS
    crossing = node_of_token != node_of_expert
    rows = int(crossing.sum())
    once = len((route.token_N * 2 + node_of_expert)[crossing].unique())
    figure, axes = canvas(8.2, 3.6, (-0.6, 17.4), (-1.5, 4.2))
    for left, title, count in ((0.0, "flat: a row per expert", rows), (9.0, "two levels: a row per node", once)):
        note(axes, left + 3.9, 4.0, title, ha="center", color=INK)
        axes.plot([left + 3.85] * 2, [-0.6, 3.6], color=LINE, linestyle="--")
        expert_x = [left + e * 1.1 for e in range(EXPERTS)]
        for expert, x in enumerate(expert_x):
            box(axes, x, 0.3, f"E{expert}", RANKS[expert * ranks // EXPERTS] if expert in (2, 4, 5, 7) else LINE)
        for node in range(2):
            note(axes, left + 1.65 + 4.4 * node, -0.35, f"node {node}", ha="center")
        start, relay, peer = (left + 2.75, 3.2), (left + 7.15, 2.0), (left + 4.95, 1.35)
        box(axes, *start, "token", RANKS[1], (1.2, 0.5))
        arrow(axes, (start[0], 2.93), (expert_x[2], 0.57), LINE)
        if left:
            arrow(axes, (start[0] + 0.62, 3.1), (relay[0] - 0.62, 2.2), RANKS[1], 2.2)
            box(axes, *relay, "rank 3", RANKS[3], (1.2, 0.5))
            arrow(axes, (relay[0], 1.73), (expert_x[7], 0.57), LINE)
            arrow(axes, (relay[0] - 0.62, 1.9), (peer[0] + 0.62, 1.45), LINE)
            box(axes, *peer, "rank 2", RANKS[2], (1.2, 0.5))
            for expert in (4, 5):
                arrow(axes, (peer[0], 1.08), (expert_x[expert], 0.57), LINE)
        else:
            for expert in (4, 5, 7):
                arrow(axes, (start[0] + 0.3, 2.93), (expert_x[expert], 0.57), RANKS[1], 2.2)
        note(axes, left + 3.9, -1.15, f"{tokens} tokens: {count} rows between nodes", ha="center", color=INK)
    return figure


def draw_overlap() -> Figure:
    """Sending, computing and returning with one chunk and with three, if each takes as long as the others."""
    figure = Figure(figsize=(8.2, 3.6), layout="constrained")
    for axes, chunks in zip(figure.subplots(2, 1, sharex=True, sharey=True), (1, 3), strict=True):
        length = 3 / chunks
        sends, returns = ([(kind, chunk) for chunk in range(chunks)] for kind in ("send", "return"))
        wire = [sends[0], *(one for pair in zip(sends[1:], returns, strict=False) for one in pair), returns[-1]]
        free, end = 0.0, 0.0
        computed: dict[int, float] = {}
        for kind, chunk in wire:
            start = max(free, computed[chunk]) if kind == "return" else free
            free = start + length
            colour = RANKS[0] if kind == "send" else RANKS[2]
            axes.barh(1, length * 0.97, left=start, color=colour, height=0.6)
            axes.text(start + length / 2, 1, f"{kind} {chunk}", color="white", ha="center", va="center", fontsize=8)
            if kind == "send":
                begin = max(free, end)
                end = computed[chunk] = begin + length
                axes.barh(0, length * 0.97, left=begin, color=RANKS[1], height=0.6)
                axes.text(
                    begin + length / 2, 0, f"experts {chunk}", color="white", ha="center", va="center", fontsize=8
                )
        axes.set(yticks=[0, 1], yticklabels=["compute", "wire"], xticks=[], ylim=(-0.5, 1.5), xlabel="time")
        axes.set_title(f"overlap_chunks: {chunks}")
    return figure
