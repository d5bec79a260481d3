"""The four recommenders row by row, written from their papers; and small ones with every parameter drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.experts import MlpBank
from dist_moe.gates import Softmax
from dist_moe.models import MODELS, MoEModel, RunShape, TableFeatures
from dist_moe.parallel import SingleWorld, World
from tests.helpers.oracle import naive_gate

FEATURES = TableFeatures(sizes=(5, 4), numeric=1, lists=((6, 3),))
TARGETS = ("long_view", "like", "finish")
GROUPS = {"watch": ["long_view", "finish"], "interact": ["like"]}
EXPERTS: dict[str, Any] = {
    "units": [5, 4],
    "activation": "silu",
    "batch_norm": True,
    "feature_gate": {"number": 2, "rank": 3},
}
SMALL: dict[str, dict[str, Any]] = {
    "shared_bottom": {"bottom_units": [6, 5]},
    "mmoe": {"num_experts": 4, "experts": EXPERTS},
    "ple": {"levels": 3, "target_experts": 2, "shared_experts": 2, "experts": EXPERTS},
    "home": {"groups": GROUPS, "shared_experts": 2, "group_experts": 1, "target_experts": 4, "experts": EXPERTS},
}
"""Every layer has a multiple of 4 experts: PLE 2 * 3 + 2, HoME 2 + 2 * 1 and 2 + 2 * 1 + 3 * 4."""

Batch = tuple[Tensor, Tensor, Tensor]
Rows = list[Tensor]


def small_model(
    name: str,
    world: World | None = None,
    features: TableFeatures = FEATURES,
    targets: Sequence[str] = TARGETS,
    **more: Any,
) -> Any:
    """In fp64; every parameter that begins at a constant is drawn, the same for an expert on whatever rank."""
    torch.manual_seed(3)
    config = MODELS.by_name[name].model_validate({"embedding_dim": 2, "tower_units": [3]} | SMALL[name] | more)
    assert not [*config.validation_errors(), *config.gate_errors()]
    model: MoEModel = config.build(features=features, targets=tuple(targets), run=RunShape(world or SingleWorld(), 9))
    draw_parameters(model.double())
    return model


@torch.no_grad()
def draw_parameters(model: nn.Module) -> None:
    """Draw all parameters anew, those of an expert by its global id."""
    banks = {id(p): bank for bank in model.modules() if isinstance(bank, MlpBank) for p in bank.parameters()}
    for position, parameter in enumerate(model.parameters()):
        bank = banks.get(id(parameter))
        for index, part in enumerate([parameter] if bank is None else parameter):
            seed = 1000 * position + (0 if bank is None else bank.expert_ids[index])
            part.copy_(torch.rand(part.shape, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.7)


def batch_of(rows: int, seed: int = 0) -> Batch:
    """Lists of no, some and all places; the same row may come twice."""
    drawn = torch.Generator().manual_seed(seed)
    ids_BC = torch.stack([torch.randint(size, (rows,), generator=drawn) for size in FEATURES.sizes], dim=1)
    numeric_BM = torch.randn(rows, FEATURES.numeric, generator=drawn, dtype=torch.float64)
    return ids_BC, numeric_BM, torch.randint(-1, 6, (rows, 3), generator=drawn)


def part_of(batch: Batch, rows: slice) -> Batch:
    ids_BC, numeric_BM, lists_BP = (column[rows] for column in batch)
    return ids_BC, numeric_BM, lists_BP


def naive_front(front: Any, batch: Batch) -> Rows:
    found = []
    for ids, numbers, places in zip(*batch, strict=True):
        parts = [value * scale + shift for value, scale, shift in zip(numbers, front.scale, front.shift, strict=True)]
        parts += [front.ids.weight[int(ids[0])], front.ids.weight[5 + int(ids[1])]]
        there = [front.ids.weight[9 + int(i)] for i in places if i >= 0]
        parts.append(sum(there) / len(there) if there else torch.zeros(2, dtype=torch.float64))
        found.append(torch.cat(parts))
    return found


def naive_expert(bank: MlpBank, e: int, x_B: Rows) -> Rows:
    """E(x * FG(x)) of expert ``e`` on all its rows of a step, whose statistics normalise them."""
    config = bank.config
    if config.feature_gate is not None:
        x_B = [x_D * naive_feature_gate(bank, e, x_D) for x_D in x_B]
    for i in range(len(config.units)):
        weight = bank.get_parameter(f"weight{i}")[e]
        x_B = [torch.stack([(x_D * w).sum() for w in weight.T]) for x_D in x_B]
        if i == len(config.units) - 1 and config.batch_norm:
            mean = sum(x_B) / len(x_B)
            variance = sum((x - mean) ** 2 for x in x_B) / len(x_B)
            x_B = [(x - mean) / (variance + 1e-5) ** 0.5 * bank.norm_weight[e] + bank.norm_bias[e] for x in x_B]
        else:
            x_B = [x + bank.get_parameter(f"bias{i}")[e] for x in x_B]
        x_B = [x / (1 + torch.exp(-x)) if config.activation == "silu" else x.clamp(min=0) for x in x_B]
    return x_B


def naive_feature_gate(bank: MlpBank, e: int, x_D: Tensor) -> Tensor:
    gate = bank.config.feature_gate
    assert gate is not None
    share_L = naive_softmax(x_D @ bank.choice[e])
    rank = bank.into.shape[2] // gate.number
    maps = [
        (x_D @ bank.into[e][:, m * rank : (m + 1) * rank]) @ bank.back[e][m * rank : (m + 1) * rank]
        for m in range(gate.number)
    ]
    if gate.mix == "before":
        return 2 / (1 + torch.exp(-sum(s * m for s, m in zip(share_L, maps, strict=True))))
    return sum(s * 2 / (1 + torch.exp(-m)) for s, m in zip(share_L, maps, strict=True))


def naive_softmax(logits: Tensor) -> Tensor:
    return torch.exp(logits) / torch.exp(logits).sum()


def weights_of(gate: Any, x_D: Tensor) -> Tensor:
    if isinstance(gate, Softmax):
        return naive_softmax(gate.weight @ x_D + gate.bias)
    return naive_gate(gate, x_D.unsqueeze(0))[0][0]


def mixed(weight_A: Tensor, results: Sequence[Tensor]) -> Tensor:
    return sum(w * y for w, y in zip(weight_A, results, strict=True))


def naive_towers(model: Any, h_TB: Sequence[Rows]) -> list[Tensor]:
    return [torch.stack([_tower(tower, h_F) for h_F in h_B]) for tower, h_B in zip(model.towers, h_TB, strict=True)]


def _tower(tower: Any, h_F: Tensor) -> Tensor:
    return (tower[2].weight @ (tower[0].weight @ h_F + tower[0].bias).clamp(min=0) + tower[2].bias)[0]


def naive_predictions(model: Any, name: str, batch: Batch, **options: Any) -> list[Tensor]:
    x_B = naive_front(model.front, batch)
    return naive_towers(model, {"mmoe": _mmoe, "ple": _ple, "home": _home}.get(name, _bottom)(model, x_B, **options))


def _bottom(model: Any, x_B: Rows) -> list[Rows]:
    first, second = model.bottom[0], model.bottom[2]
    hidden = [(first.weight @ x_D + first.bias).clamp(min=0) for x_D in x_B]
    return [[(second.weight @ h + second.bias).clamp(min=0) for h in hidden]] * len(model.towers)


def _mmoe(model: Any, x_B: Rows) -> list[Rows]:
    """Statistics of an expert are those of the rows that some gate sends to it."""
    bank, nothing = model.moe.experts, torch.zeros(model.moe.experts.out_dim, dtype=torch.float64)
    weights = [[weights_of(gate, x_D) for x_D in x_B] for gate in model.moe.gates]
    results = []
    for e in range(bank.num_experts):
        rows = [b for b in range(len(x_B)) if any(of_gate[b][e] != 0 for of_gate in weights)]
        found = dict(zip(rows, naive_expert(bank, e, [x_B[b] for b in rows]) if rows else [], strict=True))
        results.append([found.get(b, nothing) for b in range(len(x_B))])
    return [[mixed(w_E, [y[b] for y in results]) for b, w_E in enumerate(of_gate)] for of_gate in weights]


def _ple(model: Any, x_B: Rows) -> list[Rows]:
    targets = len(model.towers)
    own_inputs, shared_input = [x_B] * targets, x_B
    for level in model.levels:
        bank = level.experts
        own = [[naive_expert(bank, 2 * t + i, own_inputs[t]) for i in range(2)] for t in range(targets)]
        shared = [naive_expert(bank, 2 * targets + i, shared_input) for i in range(2)]
        outputs = [
            [
                mixed(weights_of(level.gates[t].main, x_D), [y[b] for y in (*own[t], *shared)])
                for b, x_D in enumerate(own_inputs[t])
            ]
            for t in range(targets)
        ]
        if level is not model.levels[-1]:
            everything = [*(y for of_target in own for y in of_target), *shared]
            shared_input = [
                mixed(weights_of(level.gates[targets].main, x_D), [y[b] for y in everything])
                for b, x_D in enumerate(shared_input)
            ]
        own_inputs = outputs
    return own_inputs


def _home(
    model: Any, x_B: Rows, self_gate: bool = True, mask: bool = True, self_gate_input: str = "gate"
) -> list[Rows]:
    """Groups watch (targets 0, 2) and interact (1); 2 shared experts, 1 of each group, 4 of each target."""

    def output(gate: Any, u_D: Tensor, results: Rows, own: Rows, own_u_D: Tensor) -> Tensor:
        y = mixed(weights_of(gate.main, u_D), results)
        if not self_gate:
            return y
        logits = gate.own_weight @ own_u_D + gate.own_bias
        return y + mixed(1 / (1 + torch.exp(-logits)) if len(own) == 1 else naive_softmax(logits), own)

    meta, second = model.levels
    shared = [naive_expert(meta.experts, e, x_B) for e in (0, 1)]
    of_group = [[naive_expert(meta.experts, 2 + g, x_B)] for g in (0, 1)]
    everything = [*shared, *of_group[0], *of_group[1]]
    z = [
        [output(meta.gates[i], x_D, [y[b] for y in seen], [y[b] for y in own], x_D) for b, x_D in enumerate(x_B)]
        for i, (seen, own) in enumerate(
            [([*shared, *of_group[g]] if mask else everything, of_group[g]) for g in (0, 1)] + [(everything, shared)]
        )
    ]
    group_of = [0, 1, 0]
    shared = [naive_expert(second.experts, e, z[2]) for e in (0, 1)]
    of_group = [[naive_expert(second.experts, 2 + g, z[g])] for g in (0, 1)]
    of_target = [[naive_expert(second.experts, 4 + 4 * t + i, z[g]) for i in range(4)] for t, g in enumerate(group_of)]
    everything = [*shared, *(y for some in (*of_group, *of_target) for y in some)]
    h = []
    for t, g in enumerate(group_of):
        seen = [*shared, *of_group[g], *of_target[t]] if mask else everything
        h.append([])
        for b in range(len(x_B)):
            u_D = torch.cat([z[g][b], z[2][b]])
            own_u = u_D if self_gate_input == "gate" else z[g][b]
            h[t].append(output(second.gates[t], u_D, [y[b] for y in seen], [y[b] for y in of_target[t]], own_u))
    return h
