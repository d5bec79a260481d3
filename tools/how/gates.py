"""Pictures of gates: how trees harden, and six gates beside each other."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dist_moe.gates import Comet, DSelectK, Gate, HashRouting, NullSlots, SMoEDropout, TopK
from dist_moe.gates.base import smooth_step
from dist_moe.gates.tree import descend
from dist_moe.routing import Route
from tools.how.canvas import INK, LINE, RANKS, SOFT, heat, note

TOKENS, WIDTH, EXPERTS = 12, 6, 8


def half_hard_route(tokens: int = TOKENS) -> Route:
    """Return the route of tokens by a COMET gate some of whose splits are saturated: one to four experts each."""
    torch.manual_seed(0)
    gate = Comet(WIDTH, EXPERTS, k=2, gamma=1.0, lazy=False)
    assert gate.split_weight is not None  # None for a static gate
    torch.nn.init.normal_(gate.split_weight, std=1.5)
    with torch.no_grad():
        return gate(torch.randn(tokens, WIDTH))


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


def _six_gates() -> dict[str, Gate]:
    """Return untrained gates by name; splits and bits are drawn so large that some of them are saturated."""
    torch.manual_seed(5)
    dropout = SMoEDropout(WIDTH, EXPERTS, 1, EXPERTS, schedule_steps=100)
    dropout.begin_step(30)
    gates = {
        "Hash": HashRouting(WIDTH, EXPERTS, torch.ones(TOKENS, dtype=torch.int64)),
        "Top-k, k = 2": TopK(WIDTH, EXPERTS, k=2),
        "DSelect-k, two selectors": DSelectK(WIDTH, EXPERTS, k=2),
        "AdaMoE, 4 slots of 8 + 8 nulls": NullSlots(TopK(WIDTH, 2 * EXPERTS, k=4), EXPERTS),
        "SMoE-Dropout, step 30 of 100": dropout,
        "COMET, two trees": Comet(WIDTH, EXPERTS, k=2, lazy=False),
    }
    for gate in gates.values():
        for name, parameter in gate.named_parameters():
            if name in ("bit_weight", "split_weight"):
                torch.nn.init.normal_(parameter, std=0.8)
    return gates


@torch.no_grad()
def draw_gates_compared() -> Figure:
    """The weights that six gates give the same tokens' experts, and how many experts each token gets."""
    gates = _six_gates()
    x_TD, ids_T = torch.randn(TOKENS, WIDTH), torch.arange(TOKENS) // 2
    figure = Figure(figsize=(8.2, 6.6), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, (title, gate) in zip(panels, gates.items(), strict=True):
        route = gate(x_TD, ids_T)
        heat(axes, route.dense())
        count_T = route.token_N.bincount(minlength=TOKENS)
        for token, count in enumerate(count_T.tolist()):
            note(axes, EXPERTS + 0.1, token, str(count), color=INK if count else RANKS[1])
        axes.set_title(f"{title}\n{count_T.float().mean():.2f} experts per token", color=INK)
        axes.set_xticks(range(EXPERTS), [f"E{expert}" for expert in range(EXPERTS)])
        axes.set_yticks(range(TOKENS), [f"t{token}" for token in range(TOKENS)])
        axes.tick_params(length=0, labelsize=8, colors=SOFT)
        axes.set_xlim(-0.5, EXPERTS + 0.7)
    return figure
