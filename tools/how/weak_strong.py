"""The picture of a weak and a strong expert, and of the confidence that decides which of them answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from dist_moe.models.weak_strong import WeakStrong
from dist_moe.models.weak_strong.confidence import DispersionConfidence, DispersionConfig, dispersion
from tools.how.canvas import INK, LINE, RANKS, SOFT, note

CLASSES, COUNT, STEPS, SESSIONS = 3, 240, 100, 3
CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64)
"""The three certain predictions in the plane of all of them."""

BORDER = -0.2
THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Columns(nn.Module):
    """Gives the columns of a batch that an expert sees."""

    def __init__(self, first: int, end: int) -> None:
        super().__init__()
        self.columns = slice(first, end)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return these columns."""
        return x_BD[:, self.columns]


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (B, 4) numbers, two of a point's own and two of its neighbours, and (B,) classes.

    Its own tell class 0 from the others; between these the neighbours decide, by a chequerboard.
    """
    drawn = torch.Generator().manual_seed(seed)
    x_B4 = 2 * torch.rand(count, 4, generator=drawn, dtype=torch.float64) - 1
    label_B = torch.where(x_B4[:, 0] < BORDER, 0, 1 + (x_B4[:, 2] * x_B4[:, 3] > 0).long())
    return x_B4, label_B


def trained() -> WeakStrong:
    """Return a linear weak expert and a strong network: the weak one trained first, then both in turns, as Mowst."""
    torch.manual_seed(0)
    weak = nn.Sequential(Columns(0, 2), nn.Linear(2, CLASSES))
    strong = nn.Sequential(Columns(2, 4), nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, CLASSES))
    model = WeakStrong(weak, strong, DispersionConfig(of="variance", map="monotone").build(4)).double()
    x_B4, label_B = points(600, seed=1)

    def fit(parts: list[nn.Module], steps: int, loss: Callable[[], Tensor]) -> None:
        optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    with torch.enable_grad():
        fit([model.weak], 2 * STEPS, lambda: nn.functional.cross_entropy(model.weak(x_B4), label_B))
        for _ in range(SESSIONS):
            for parts in ([model.weak, model.confidence], [model.strong]):
                fit(parts, STEPS, lambda: model(x_B4).cross_entropy(label_B).mean())
    return model.eval()


@torch.no_grad()
def draw_weak_strong() -> Figure:
    """The weak expert's predictions among all that there are, its confidence, and who answers at which threshold."""
    model = trained()
    x_B4, label_B = points(COUNT, seed=2)
    weak_BC, confidence_B = model.weak(x_B4), model(x_B4).confidence_B
    figure = Figure(figsize=(8.2, 5.9), layout="constrained")
    ((plane, simplex), (curve, answers)) = figure.subplots(2, 2, height_ratios=(1.15, 1))
    for expert, chosen_B, colour in (
        ("strong", confidence_B < 0.5, RANKS[1]),
        ("weak", confidence_B >= 0.5, RANKS[0]),
    ):
        name = f"{expert} expert: {int(chosen_B.sum())}"
        plane.scatter(*x_B4[chosen_B, :2].T.tolist(), s=9, color=colour, label=name)
        place_B2 = weak_BC.softmax(dim=1) @ CORNERS
        simplex.scatter(*place_B2[chosen_B].T.tolist(), s=9, color=colour)
    _label_plane(plane)
    _draw_contours(simplex)
    _draw_curve(curve, model, dispersion(weak_BC)[:, 0], confidence_B)
    _draw_thresholds(answers, model, x_B4, label_B)
    return figure


def _label_plane(axes: Axes) -> None:
    """Say where the classes lie."""
    axes.axvline(BORDER, color=LINE, linewidth=1, zorder=0)
    white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for x, text in (((BORDER - 1) / 2, "class 0"), ((BORDER + 1) / 2, "classes 1 and 2")):
        note(axes, x, 0, text, color=INK, ha="center", bbox=white)
    axes.set(xticks=[], yticks=[], ylim=(-1.3, 1.1), title="who answers, at a confidence of 1/2")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.13), ncols=2, handletextpad=0.1)


def _draw_contours(axes: Axes) -> None:
    """Draw the plane of distributions over three classes, with lines of equal dispersion."""
    axes.plot(*CORNERS[[0, 1, 2, 0]].T.tolist(), color=SOFT, linewidth=1)
    centre_2 = CORNERS.mean(dim=0)
    turn_A = torch.linspace(-torch.pi / 6, 2 * torch.pi - torch.pi / 6, 361, dtype=torch.float64)
    ring_A2 = torch.stack([turn_A.cos(), turn_A.sin()], dim=1)
    into_3C = torch.cat([CORNERS.T, torch.ones(1, CLASSES, dtype=torch.float64)])
    for share in (0.3, 0.5, 0.7, 0.9):  # of the way from the centre to a corner
        circle_A2 = centre_2 + share * (CORNERS[1] - centre_2).norm() * ring_A2
        p_AC = torch.linalg.solve(into_3C, torch.cat([circle_A2.T, torch.ones(1, len(turn_A))])).T
        inside_A = (p_AC > 0).all(dim=1)
        axes.plot(*circle_A2.where(inside_A[:, None], torch.nan).T.tolist(), color=LINE, linewidth=0.9, zorder=0)
        text = f"{float(dispersion(p_AC[:1].log())[0, 0]):.2f}"
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        x, y = circle_A2[0].tolist()
        note(axes, x, y, text, ha="center", fontsize=8, bbox=white)
    for corner, (x, y, ha) in enumerate(((-0.04, 0, "right"), (1.04, 0, "left"), (0.5, 0.93, "center"))):
        note(axes, x, y, f"class {corner}", ha=ha)
    axes.set(xlim=(-0.3, 1.3), ylim=(-0.06, 0.98), aspect="equal", title="predictions of the weak expert, dispersion")
    axes.axis("off")


def _draw_curve(axes: Axes, model: WeakStrong, variance_B: Tensor, confidence_B: Tensor) -> None:
    """Draw the confidence over the dispersion, as it was learnt, with the examples on it."""
    d_N1 = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    assert isinstance(model.confidence, DispersionConfidence)
    axes.plot(d_N1[:, 0].tolist(), model.confidence.map(d_N1)[:, 0].sigmoid().tolist(), color=SOFT)
    colours = [RANKS[0] if confidence >= 0.5 else RANKS[1] for confidence in confidence_B.tolist()]
    axes.scatter(variance_B.tolist(), confidence_B.tolist(), s=9, c=colours, zorder=3)
    axes.axhline(0.5, color=LINE, linestyle="--", zorder=0)
    axes.set(
        xlabel="dispersion D(p)", ylabel="confidence C", ylim=(-0.04, 1.04), title="C = sigmoid(G(D(p))), G learnt"
    )


def _draw_thresholds(axes: Axes, model: WeakStrong, x_B4: Tensor, label_B: Tensor) -> None:
    """Draw for some thresholds how many ask the strong expert, and how many answers are right."""
    for place, threshold in enumerate(THRESHOLDS):
        class_B, asks_B = model.classify(x_B4, threshold=threshold)
        right, asked = (float(100 * part.double().mean()) for part in (class_B == label_B, asks_B))
        for offset, value, colour in ((-0.2, right, RANKS[2]), (0.2, asked, RANKS[1])):
            axes.bar(place + offset, value, 0.38, color=colour)
            note(axes, place + offset, value + 5, f"{value:.1f}", ha="center", color=INK, fontsize=8)
    axes.set_xticks(range(len(THRESHOLDS)), [f"{threshold:g}" for threshold in THRESHOLDS])
    axes.set(xlabel="asks the strong expert below this confidence", ylim=(0, 128), yticks=[0, 50, 100], ylabel="%")
    note(axes, -0.4, 120, "right answers", color=RANKS[2])
    note(axes, 1.3, 120, "ask the strong expert", color=RANKS[1])
    axes.set_title("on new points")
