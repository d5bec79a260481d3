"""The picture of experts that are aligned, grouped and merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from dist_moe.engine.checkpoint import ModelWeights, place_weights
from dist_moe.engine.checkpoint.models import weights_of
from dist_moe.experts import FeedForwardBank
from dist_moe.gates import TopK
from dist_moe.layer import MoE
from dist_moe.recipes.merge_compress.calibrate import LayerStatistics, LayerSums
from dist_moe.recipes.merge_compress.group import join_leaders, largest
from dist_moe.recipes.merge_compress.merge import MergedLayer, merged_weights, one_expert, orders, shares
from dist_moe.search import SlotTable
from tools.how.canvas import INK, RANKS, SOFT, arrow, box, heat, note

EXPERTS, KINDS, WIDTH, HIDDEN, TOKENS = 6, 3, 10, 8, 2000
NOISE = 0.15
NAME = "moe"


class OneLayer(nn.Module):
    """A layer in fp64: a Top-k gate over six slots, and so many experts."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        bank = FeedForwardBank(WIDTH, HIDDEN, experts, range(experts), activation="relu")
        self.moe = MoE(TopK(WIDTH, EXPERTS, k=2), bank, SlotTable(experts, num_slots=EXPERTS))
        self.double().eval()

    @property
    def bank(self) -> FeedForwardBank:
        """The experts."""
        assert isinstance(self.moe.experts, FeedForwardBank)
        return self.moe.experts

    @property
    def gate(self) -> TopK:
        """The gate, which has biases."""
        (gate,) = self.moe.each_gate
        assert isinstance(gate, TopK)
        return gate

    @property
    def table(self) -> Tensor:
        """The table of slots."""
        assert isinstance(self.moe.slot_map, SlotTable)
        return self.moe.slot_map.table


@dataclass(frozen=True)
class Merge:
    """A model, what was seen of its layer on some tokens, and the plan by which its experts become three."""

    model: OneLayer
    weights: ModelWeights
    statistics: LayerStatistics
    plan: MergedLayer
    x_TD: Tensor


@torch.no_grad()
def planted_model() -> OneLayer:
    """Return a layer whose experts E3 to E5 are noisy copies of E0 to E2, their units in another order, less used."""
    torch.manual_seed(1)
    model = OneLayer(EXPERTS)
    gate, bank = model.gate, model.bank
    assert gate.bias is not None
    gate.bias[:KINDS] = 0.3
    for copy in range(KINDS, EXPERTS):
        order_H = torch.randperm(HIDDEN)
        for name, axis in bank.hidden_axes.items():
            weight: Tensor | None = getattr(bank, name)
            if weight is not None:
                moved = weight[copy - KINDS].index_select(axis - 1, order_H)
                weight[copy] = moved + NOISE * moved.std() * torch.randn_like(moved)
        row_D = gate.weight[copy - KINDS]
        gate.weight[copy] = row_D + 0.5 * row_D.std() * torch.randn_like(row_D)
    return model


def planned() -> Merge:
    """Return what calibration says of the layer, the groups that follow, and how units match those of the leader."""
    model, x_TD = planted_model(), torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    layer, weights = model.moe, weights_of(model)
    sums = LayerSums(layer, outputs=False)
    with torch.no_grad():
        sums.see(layer, (x_TD,), layer(x_TD))
    seen, axes = sums.statistics(), model.bank.hidden_axes
    leader_E = join_leaders(largest(seen.usage_E, KINDS), seen.router_EE)
    order_EH = orders(weights, NAME, leader_E, axes)
    return Merge(model, weights, seen, MergedLayer(leader_E, shares(leader_E, seen.usage_E), order_EH, axes), x_TD)


@torch.no_grad()
def relative_error(merge: Merge, plan: MergedLayer) -> float:
    """Return the root mean square by which the merged layer's results differ, over that of the results."""
    table = plan.expert_E[merge.model.table]
    after = OneLayer(len(plan.leaders))
    place_weights(after, merged_weights(merge.weights, {NAME: plan}, {f"{NAME}.slot_map.table": table}))
    was_TF, is_TF = (model.moe(merge.x_TD).outputs[0] for model in (merge.model, after))
    return float((is_TF - was_TF).norm() / was_TF.norm())


def draw_merged_experts() -> Figure:
    """Units of an expert and its leader before and after aligning, the groups by the router, and the merged layer."""
    merge = planned()
    figure = Figure(figsize=(8.2, 5.7), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1.25, 1))
    member = next(e for e, leader in enumerate(merge.plan.leader_E.tolist()) if e != leader)
    assert merge.plan.order_EH is not None
    orders_H = {"as they are": torch.arange(HIDDEN), "aligned": merge.plan.order_EH[member]}
    for column, (title, order_H) in enumerate(orders_H.items()):
        _draw_units(figure.add_subplot(grid[0, column]), merge, member, title, order_H)
    _draw_groups(figure.add_subplot(grid[0, 2]), merge)
    _draw_merged(figure.add_subplot(grid[1, :]), merge)
    return figure


def _draw_units(axes: Axes, merge: Merge, member: int, title: str, order_H: Tensor) -> None:
    """Draw the correlations of an expert's units, in that order, with those of its leader."""
    leader, bank = int(merge.plan.leader_E[member]), merge.model.bank
    leaders_TH, members_TH = (
        bank.hidden_units(one_expert(merge.weights, NAME, expert), merge.x_TD) for expert in (leader, member)
    )
    correlation_HH = torch.corrcoef(torch.cat([leaders_TH, members_TH[:, order_H]], dim=1).T)[:HIDDEN, HIDDEN:]
    heat(axes, correlation_HH)
    axes.set_title(f"units of E{leader} and E{member}, {title}", color=INK)
    axes.set_xticks(range(HIDDEN), [str(unit) for unit in order_H.tolist()])
    axes.set_yticks(range(HIDDEN), [str(unit) for unit in range(HIDDEN)])
    axes.set_ylabel(f"unit of E{leader}")
    mean = float(correlation_HH.diagonal().mean())
    axes.set_xlabel(f"unit of E{member}\ncorrelation along the diagonal: {mean:.2f}")


def _draw_groups(axes: Axes, merge: Merge) -> None:
    """Draw how alike the router's logits are, and a ring where an expert meets its leader."""
    similarity_EE = torch.from_numpy(merge.statistics.router_EE)
    heat(axes, similarity_EE)
    for expert, leader in enumerate(merge.plan.leader_E.tolist()):
        axes.scatter([leader], [expert], s=130, facecolors="none", edgecolors=INK, linewidths=1.2)
    axes.set_title("cosines of router logits", color=INK)
    axes.set_xticks(range(EXPERTS), [f"E{expert}" for expert in range(EXPERTS)])
    axes.set_yticks(range(EXPERTS), [f"E{expert}" for expert in range(EXPERTS)])
    axes.set_xlabel("ring: the expert's leader\nblue: alike, orange: opposed")


def _draw_merged(axes: Axes, merge: Merge) -> None:
    """Draw slots, the experts with their use and share, the experts that they become, and what merging costs."""
    plan, usage_E = merge.plan, merge.statistics.usage_E
    axes.set(xlim=(-1.3, 11.3), ylim=(-0.35, 3.6))
    axes.axis("off")
    expert_E = plan.expert_E.tolist()
    for expert, new in enumerate(expert_E):
        x, colour, leads = 1.05 * expert, RANKS[new], plan.leader_E[expert] == expert
        box(axes, x, 3.2, f"s{expert}", SOFT, (0.8, 0.5))
        arrow(axes, (x, 2.93), (x, 2.28), SOFT)
        box(axes, x, 2.0, f"E{expert}", colour, (0.8, 0.5))
        arrow(axes, (x, 1.28), (1.0 + 1.6 * new, 0.3), colour, 0.6 + 2 * float(plan.share_E[expert]))
        note(axes, x, 1.5, f"{usage_E[expert]:.3f}", ha="center", fontweight="bold" if leads else "normal", fontsize=8)
    for new, leader in enumerate(plan.leaders.tolist()):
        box(axes, 1.0 + 1.6 * new, 0.0, f"M{new}", RANKS[new], (1.0, 0.5))
        members = " + ".join(
            f"{plan.share_E[expert]:.2f} E{expert}" for expert in range(EXPERTS) if plan.leader_E[expert] == leader
        )
        note(axes, 6.6, 2.4 - 0.5 * new, f"M{new} = {members}", color=RANKS[new], fontsize=10)
    for y, name in ((3.2, "slots"), (2.0, "experts"), (1.5, "use"), (0.0, "merged")):
        note(axes, -0.65, y, name, ha="right", color=INK)
    table = ", ".join(f"s{slot}: M{new}" for slot, new in enumerate(expert_E))
    note(axes, 6.6, 3.2, f"new slot map: {table}", color=INK, fontsize=8)
    unaligned = MergedLayer(plan.leader_E, plan.share_E, None, plan.hidden_axes)
    errors = (f"{name} {relative_error(merge, of):.3f}" for name, of in (("aligned", plan), ("not aligned", unaligned)))
    note(axes, 6.6, 0.4, "results differ by, relative:\n" + ", ".join(errors), color=INK)
