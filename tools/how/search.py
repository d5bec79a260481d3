"""The picture of an assignment search that restores a scrambled table from slots to experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import TopK
from dist_moe.layer import MoE
from dist_moe.search import AssignmentSearch, AssignmentSearchConfig, SearchReport, SlotTable, StreamedScores
from dist_moe.search.moves import Move, apply
from tools.how.canvas import INK, LINE, RANKS, SOFT, box, heat, note

EXPERTS, WIDTH, OUT, TOKENS = 8, 6, 4, 512
Batch = tuple[Tensor, Tensor]
"""Tokens, and what the layer is to give for them."""


@dataclass(frozen=True)
class Planted:
    """A layer whose planted table gave the targets of two batches, and which has another table now."""

    layer: MoE
    planted_S: Tensor
    fitted: StreamedScores
    verified: StreamedScores

    @property
    def table(self) -> Tensor:
        """The (1, 1, S) table."""
        return self.fitted.tables[0]

    def gradient_SE(self) -> Tensor:
        """Return D = dL/dP at the present table."""
        with self.fitted.searching():
            return self.fitted.gradients()[0][0, 0]


def planted_problem() -> Planted:
    """Return a Top-k layer of random weights in fp64: the loss is 0 at its planted table alone."""
    torch.manual_seed(0)
    gate, bank = TopK(WIDTH, EXPERTS, k=2), DenseReLUBank(WIDTH, OUT, EXPERTS, range(EXPERTS), 0.0)
    slot_table = SlotTable(EXPERTS)
    layer = MoE(gate, bank, slot_table).double().eval()
    nn.init.normal_(gate.weight)
    planted_S = torch.randperm(EXPERTS)
    slot_table.table.copy_(planted_S)
    x_2TD = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        batches = [(x_TD, layer(x_TD).outputs[0]) for x_TD in x_2TD]
    slot_table.table.copy_(torch.randperm(EXPERTS))

    def loss(batch: Batch) -> Tensor:
        x_TD, y_TF = batch
        return (layer(x_TD).outputs[0] - y_TF).square().mean()

    fitted, verified = (StreamedScores(layer, [batch], loss, chunk_bytes=2**20) for batch in batches)
    return Planted(layer, planted_S, fitted, verified)


def draw_assignment_search() -> Figure:
    """The derivatives of the loss by the table before each move, what is assigned by them, and the tables between."""
    problem, twin = planted_problem(), planted_problem()  # the twin is searched, the other follows move by move
    report = AssignmentSearch(twin.fitted, twin.verified, AssignmentSearchConfig(polish=True)).run()
    figure = Figure(figsize=(8.2, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, len(report.moves), height_ratios=(1.25, 1))
    tables = [problem.table.flatten().tolist()]
    for number, move in enumerate(report.moves):
        axes = figure.add_subplot(grid[0, number])
        _draw_gradient(axes, problem, move)
        title = "one linear assignment" if len(move) > 1 else "then the best swap"
        axes.set_title(f"D = dL/dP at {report.losses[number]:.4f}: {title}", color=INK)
        apply(move, [problem.table])
        tables.append(problem.table.flatten().tolist())
    _draw_tables(figure.add_subplot(grid[1, :]), problem.planted_S.tolist(), tables, report)
    return figure


def _draw_gradient(axes: Axes, problem: Planted, move: Move) -> None:
    """Draw D, a ring at every slot's present expert, and a dot at the one that the move gives it."""
    gradient_SE, present_S = problem.gradient_SE(), problem.table.flatten().tolist()
    largest = float(gradient_SE.abs().max())
    heat(axes, gradient_SE, largest, colours=(RANKS[1], RANKS[0]))
    after = problem.table.clone()
    apply(move, [after])
    for slot, (expert, taken) in enumerate(zip(present_S, after.flatten().tolist(), strict=True)):
        axes.scatter([expert], [slot], s=110, facecolors="none", edgecolors=INK, linewidths=1.2)
        axes.scatter([taken], [slot], s=26, color=INK)
    axes.set_xticks(range(EXPERTS), [f"E{expert}" for expert in range(EXPERTS)])
    axes.set_yticks(range(EXPERTS), [f"s{slot}" for slot in range(EXPERTS)])
    slot_S = torch.arange(EXPERTS)
    estimate = float((gradient_SE[slot_S, after.flatten()] - gradient_SE[slot_S, problem.table.flatten()]).sum())
    axes.set_xlabel(f"ring: now, dot: after; to first order {estimate:+.4f}\ndarkest: {largest:.4f} either way")


def _draw_tables(axes: Axes, planted: list[int], tables: list[list[int]], report: SearchReport) -> None:
    """Draw a row of boxes for each table, grey where it is not the planted one's."""
    axes.set(xlim=(-2.6, EXPERTS + 3.2), ylim=(-0.6, len(tables) + 1.4))
    axes.axis("off")
    names = ["scrambled", *("assignment" if len(move) > 1 else "swap" for move in report.moves)]
    rows = [("planted", planted, ""), *zip(names, tables, map("loss {:.4f}".format, report.losses), strict=True)]
    for slot in range(EXPERTS):
        note(axes, slot, len(rows) - 0.1, f"s{slot}", ha="center")
    for row, (name, table, text) in enumerate(rows):
        y = len(rows) - 1 - row
        for slot, expert in enumerate(table):
            box(axes, slot, y, f"E{expert}", RANKS[2] if expert == planted[slot] else SOFT, (0.84, 0.62))
        note(axes, -0.7, y, name, ha="right", color=INK)
        right = sum(map(int.__eq__, table, planted))
        note(axes, EXPERTS - 0.3, y, f"{text}, {right} of {EXPERTS} right" if text else "", color=INK)
    axes.axhline(len(rows) - 1.5, xmin=0.02, xmax=0.98, color=LINE, linewidth=0.8)
    note(
        axes,
        EXPERTS / 2 - 0.5,
        -0.85,
        f"{report.screened} candidates estimated, {report.verified} verified on other tokens",
        ha="center",
    )
