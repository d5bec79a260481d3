"""The picture of what a rank holds by ZeRO stage and expert-parallel size, as ``dist-moe plan`` computes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from tokenizers.models import BPE

from dist_moe.data.text import Text, TokenTable
from dist_moe.planning.memory import MemoryPlan, StatePlan, plan_memory
from dist_moe.recipes.recipe import load_config
from dist_moe.tasks.language import LanguageModelTask
from tools.how.canvas import INK, LINE, RANKS, note

CONFIG = Path(__file__).parents[2] / "configs/lm_small.yaml"
RANKS_IN_ALL, EXPERTS, VOCABULARY, LENGTH = 8, 32, 32_000, 1024
OVERRIDES = (
    "model.layers=12",
    "model.dim=768",
    "model.heads=12",
    "model.kv_heads=4",
    f"model.num_experts={EXPERTS}",
    "model.experts={hidden: 2048}",
    "model.dense_hidden=2048",
    "model.permutation=null",
    "deepspeed.bf16.enabled=true",
    "deepspeed.zero_optimization.reduce_bucket_size=50000000",
    "deepspeed.zero_optimization.stage3_max_reuse_distance=50000000",
)
"""A decoder of about a billion parameters, every second layer with experts."""

PARTS = {
    "dense_parameters": ("parameters, dense", RANKS[0]),
    "expert_parameters": ("parameters, experts", "#56b4e9"),
    "gathered": ("gathered in a step, at most", RANKS[3]),
    "gradients": ("gradients", RANKS[2]),
    "bucket": ("bucket of gradients", "#f0e442"),
    "masters": ("fp32 masters", "#e69f00"),
    "optimizer": ("moments of AdamW", RANKS[1]),
}
"""Fields of a plan with their names and colours, from the bottom of a bar up."""


def task_of_sizes() -> LanguageModelTask:
    """Return a task without text: a plan asks for its vocabulary, its length and its number of sequences alone."""
    sequences = 64
    starts_N = LENGTH * np.arange(sequences)
    token_M, one_V = np.zeros(sequences * LENGTH + 1, dtype=np.uint16), np.ones(VOCABULARY, dtype=np.int64)
    table = TokenTable(token_M, starts_N, np.zeros_like(starts_N), one_V, LENGTH)
    return LanguageModelTask(
        Text(table, table, table, VOCABULARY, Tokenizer(BPE()), 0, one_V, one_V, domains=("all",), manifest={})
    )


def plans() -> list[MemoryPlan]:
    """Return the plans for eight ranks, the experts over one to eight of them."""
    task = task_of_sizes()
    sizes = (1, 2, 4, 8)
    configs = [load_config(CONFIG, [*OVERRIDES, f"parallel.expert_parallel_size={size}"]) for size in sizes]
    return [plan_memory(config, task, RANKS_IN_ALL) for config in configs]


def draw_rank_memory() -> Figure:
    """A bar of what a rank holds for every expert-parallel size and ZeRO stage."""
    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    found = plans()
    for group, plan in enumerate(found):
        left = 4.8 * group
        for state in plan.states:
            _draw_state(axes, left + state.stage, state, named=group == state.stage == 0)
        held = EXPERTS // plan.expert_parallel_size
        over = "not split" if plan.expert_parallel_size == 1 else f"over {plan.expert_parallel_size} ranks"
        words = f"ZeRO stage\n\nexperts {over}:\n{held} of {EXPERTS} on a rank"
        note(axes, left + 1.5, -0.17, words, ha="center", color=INK, transform=axes.get_xaxis_transform())
    axes.set_xticks(
        [4.8 * group + stage for group in range(len(found)) for stage in range(4)], [*range(4)] * len(found)
    )
    axes.set(ylabel="GiB on a rank", xlim=(-0.8, 4.8 * len(found) - 1.1))
    axes.set_title(f"{RANKS_IN_ALL} ranks, bf16", color=INK)
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", length=0)
    axes.legend(facecolor="white", framealpha=1, edgecolor="none", loc="upper right", reverse=True)
    return figure


def _draw_state(axes: Axes, x: float, state: StatePlan, *, named: bool) -> None:
    """Draw a bar, the sum above it; ``named``: its parts stand in the legend."""
    bottom = 0.0
    for field, (name, colour) in PARTS.items():
        height = getattr(state, field) / 2**30
        axes.bar(x, height, 0.86, bottom=bottom, color=colour, label=name if named else None)
        bottom += height
    note(axes, x, bottom + 0.3, f"{state.total / 2**30:.2f}", ha="center", color=INK, fontsize=8)
