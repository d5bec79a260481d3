"""Draw docs/how/*.svg, the pictures of docs/how_it_works.md: what stands in them is computed by the library.

python tools/draw_how_it_works.py [DIRECTORY]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib as mpl
from matplotlib.figure import Figure

from tools.how.canvas import INK, LINE, SOFT
from tools.how.checkpoint import draw_checkpoint_layout
from tools.how.exchange import draw_overlap, draw_ragged_exchange, draw_two_levels
from tools.how.forest import draw_posterior
from tools.how.gates import draw_gates_compared, draw_tree_gate
from tools.how.merging import draw_merged_experts
from tools.how.rank_memory import draw_rank_memory
from tools.how.search import draw_assignment_search
from tools.how.tables import draw_slot_map
from tools.how.weak_strong import draw_weak_strong

PICTURES = Path(__file__).parents[1] / "docs/how"

DRAWINGS: dict[str, Callable[[], Figure]] = {
    "ragged_exchange": draw_ragged_exchange,
    "tree_gate": draw_tree_gate,
    "gates_compared": draw_gates_compared,
    "two_levels": draw_two_levels,
    "overlap": draw_overlap,
    "slot_map": draw_slot_map,
    "assignment_search": draw_assignment_search,
    "merged_experts": draw_merged_experts,
    "posterior": draw_posterior,
    "weak_strong": draw_weak_strong,
    "rank_memory": draw_rank_memory,
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
