"""The picture of a checkpoint: what each rank writes, and what another number of ranks reads of it."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dist_moe.parallel import Placement
from tools.how.canvas import INK, LINE, RANKS, arrow, box, canvas, note
from tools.how.gates import EXPERTS


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
