"""Draw docs/how/*.svg, the pictures of docs/how_it_works.md: routes, masses and placements are computed by the library.

python tools/draw_how_it_works.py [DIRECTORY]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from dist_moe.gates import Comet
from dist_moe.gates.base import smooth_step
from dist_moe.gates.tree import descend
from dist_moe.parallel import Placement
from dist_moe.routing import HardMap, Route
from dist_moe.search import choose_placement

PICTURES = Path(__file__).parents[1] / "docs/how"
INK, SOFT, LINE = "#1f2933", "#61707f", "#c3cad1"
RANKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Okabe and Ito's colours, safe for the colour-blind; one for each rank."""
TOKENS, WIDTH, EXPERTS = 12, 6, 8


def box(axes: Axes, x: float, y: float, text: str, colour: str, size: tuple[float, float] = (0.8, 0.5)) -> None:
    """Draw a filled box around (x, y) with ``text`` in it; its colour says to which rank it belongs."""
    width, height = size
    style = "round,pad=0,rounding_size=0.08"
    patch = FancyBboxPatch((x - width / 2, y - height / 2), width, height, style, facecolor=colour, edgecolor="none")
    axes.add_patch(patch)
    axes.text(x, y, text, color="white", ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1.2) -> None:
    """Draw an arrow from ``start`` to ``end``."""
    patch = FancyArrowPatch(
        start, end, arrowstyle="-|>", color=colour, linewidth=width, mutation_scale=8, shrinkA=0, shrinkB=0
    )
    axes.add_patch(patch)


def note(axes: Axes, x: float, y: float, text: str, **options: Any) -> None:
    """Write ``text`` beside the picture."""
    plain: dict[str, Any] = {"color": SOFT, "fontsize": 9, "va": "center"}
    axes.text(x, y, text, **(plain | options))


def canvas(width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return a figure of that size in inches with one empty plane with these limits."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return figure, axes


def half_hard_route(tokens: int = TOKENS) -> Route:
    """Return the route of tokens by a COMET gate some of whose splits are saturated: one to four experts each."""
    torch.manual_seed(0)
    gate = Comet(WIDTH, EXPERTS, k=2, gamma=1.0, lazy=False)
    assert gate.split_weight is not None  # None for a static gate
    torch.nn.init.normal_(gate.split_weight, std=1.5)
    with torch.no_grad():
        return gate(torch.randn(tokens, WIDTH))


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


def draw_tree_gate() -> Figure:
    """The smooth-step, the masses of a tree's leaves for one token, and experts per token as trees harden."""
    figure = Figure(figsize=(8.2, 5.6), layout="constrained")
    (step_axes, course_axes), trees = figure.subplots(2, 2, height_ratios=(1, 1.15))
    t = torch.linspace(-1.2, 1.2, 241)
    for gamma, colour in zip((2.0, 1.0, 0.4), RANKS, strict=False):
        step_axes.plot(t, smooth_step(t, gamma)[0], color=colour, label=f"gamma = {gamma}")
    step_axes.set(xlabel="w·x + b", ylabel="probability of left", title="a split: exactly 0 or 1 outside ±gamma/2")
    step_axes.legend(frameon=False)
    mean_S, most_S = _hardening()
    course_axes.plot(most_S, color=RANKS[1], label="largest of the batch")
    course_axes.plot(mean_S, color=RANKS[0], label="mean")
    course_axes.axhline(2, color=LINE, linestyle="--", zorder=0)
    course_axes.set(
        xlabel="training step", ylabel="experts per token", title="two trees over 8 experts harden", ylim=(0, 8.4)
    )
    course_axes.legend(frameon=False)
    torch.manual_seed(3)
    split_Q = torch.randn(EXPERTS - 1)
    for axes, gamma, title in zip(
        trees, (8.0, 1.0), ("soft: every leaf is reached", "hard: most are not"), strict=True
    ):
        _draw_tree(axes, split_Q, gamma, title)
    return figure


def _hardening() -> tuple[list[float], list[float]]:
    """Train a COMET gate on random tokens with its entropy loss; return experts per token by step: mean, largest."""
    torch.manual_seed(0)
    gate = Comet(WIDTH, EXPERTS, k=2, gamma=1.0, entropy_weight=1.0, lazy=False)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.02)
    x_TD = torch.randn(256, WIDTH)
    mean, most = [], []
    for _ in range(150):
        route = gate(x_TD)
        count_T = route.token_N.bincount(minlength=len(x_TD)).float()
        mean.append(float(count_T.mean()))
        most.append(float(count_T.max()))
        optimizer.zero_grad()
        route.aux["entropy"].backward()
        optimizer.step()
    return mean, most


def _draw_tree(axes: Axes, split_Q: torch.Tensor, gamma: float, title: str) -> None:
    left_Q, right_Q = smooth_step(split_Q, gamma)
    mass_Q, mass_E = (mass.flatten().tolist() for mass in descend(left_Q[None, None], right_Q[None, None]))
    axes.set(xlim=(-0.7, EXPERTS - 0.3), ylim=(-1.0, 3.5), title=title)
    axes.axis("off")
    masses = [*mass_Q, *mass_E]
    depth = [(node + 1).bit_length() - 1 for node in range(len(masses))]
    place = [
        ((node + 1 - 2**level + 0.5) * EXPERTS / 2**level - 0.5, 3.2 - level)
        for node, level in zip(range(len(masses)), depth, strict=True)
    ]
    for child in range(1, len(masses)):
        (x0, y0), (x1, y1), mass = place[(child - 1) // 2], place[child], masses[child]
        colour, width, style = (RANKS[0], 0.8 + 4 * mass, "-") if mass > 0 else (LINE, 1.0, ":")
        axes.plot([x0, x1], [y0, y1], color=colour, linewidth=width, linestyle=style, zorder=1)
    for (x, y), mass in zip(place, masses, strict=True):
        axes.scatter([x], [y], s=70, color=RANKS[0] if mass > 0 else LINE, zorder=2)
    for expert, mass in enumerate(mass_E):
        note(axes, expert, -0.25, f"E{expert}", ha="center", color=INK if mass > 0 else LINE)
        note(axes, expert, -0.7, f"{mass:.2f}" if mass > 0 else "0", ha="center", color=INK if mass > 0 else LINE)


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


def draw_checkpoint_layout() -> Figure:
    """Eight experts of four ranks with two copies of each, the files of a checkpoint, and two ranks that load it."""
    figure, axes = canvas(8.2, 4.6, (-0.4, 16.2), (-0.9, 8.0))
    halves = [Placement.identity(EXPERTS, 2).experts_of(rank) for rank in range(2)]
    note(axes, 2.0, 7.6, "written by 4 ranks, two copies of each expert", ha="center", color=INK)
    files = []
    for rank in range(4):
        mine, turn, y = halves[rank % 2], rank // 2, 6.6 - 1.8 * rank
        written = [expert for i, expert in enumerate(mine) if (i + rank) % 2 == turn]  # as the checkpoint saver's turns
        note(axes, -0.3, y, f"rank {rank}", color=RANKS[rank])
        for place, expert in enumerate(mine):
            box(axes, 1.5 + 0.85 * place, y, f"E{expert}", RANKS[rank] if expert in written else LINE, (0.75, 0.6))
        files.append((f"experts-{rank:05d}.safetensors", written, y))
        arrow(axes, (4.6, y), (5.7, y), RANKS[rank])
    note(axes, 8.0, 7.6, "step-00000500/", ha="center", color=INK)
    for name, written, y in files:
        content = "  ".join(f"E{expert}" for expert in written)
        axes.add_patch(FancyBboxPatch((5.8, y - 0.6), 4.4, 1.2, "round,pad=0", facecolor="none", edgecolor=LINE))
        note(axes, 8.0, y + 0.22, name, ha="center", color=INK, fontsize=8)
        note(axes, 8.0, y - 0.25, f"{content}: master, moments", ha="center", fontsize=8)
        for reader in range(2):
            if set(written) & set(halves[reader]):
                arrow(axes, (10.3, y), (11.6, 5.2 - 3.2 * reader), RANKS[reader])
    note(
        axes,
        8.0,
        -0.55,
        "dense.safetensors, trainer.json, manifest.json with a sha256 of each",
        ha="center",
        fontsize=8,
    )
    note(axes, 13.9, 7.6, "loaded by 2 ranks, one copy", ha="center", color=INK)
    for rank in range(2):
        y = 5.2 - 3.2 * rank
        note(axes, 13.9, y + 0.75, f"rank {rank}", ha="center", color=RANKS[rank])
        for place, expert in enumerate(halves[rank]):
            box(axes, 12.4 + 0.85 * place, y, f"E{expert}", RANKS[rank], (0.75, 0.6))
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


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "ragged_exchange": draw_ragged_exchange,
    "tree_gate": draw_tree_gate,
    "two_levels": draw_two_levels,
    "overlap": draw_overlap,
    "slot_map": draw_slot_map,
    "checkpoint_layout": draw_checkpoint_layout,
}


def draw(directory: Path = PICTURES) -> None:
    """Write every picture into ``directory``; the same source gives the same files."""
    directory.mkdir(parents=True, exist_ok=True)
    style: dict[Any, Any] = {
        "axes.edgecolor": LINE,
        "axes.labelcolor": SOFT,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "dist_moe",
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
    }
    with mpl.rc_context(style):
        for name, drawing in DRAWINGS.items():
            drawing().savefig(directory / f"{name}.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
