"""The expert type of docs/extending/expert.md: one class of settings, one bank, one registration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dist_moe.config.listing import field_listing
from dist_moe.errors import UserError
from dist_moe.experts import EXPERTS
from dist_moe.gates import TopKConfig
from dist_moe.models import Recommender, RecommenderConfig, RunShape, TransformerConfig
from dist_moe.parallel import SingleWorld, World
from dist_moe.recipes.supervised.config import SupervisedConfig
from tests.helpers.commands import REPOSITORY, example_of
from tests.helpers.held import plan_of
from tests.helpers.oracle import assert_same, naive_gate
from tests.helpers.runs import write_config
from tests.helpers.worlds import emulate

USERS, ITEMS, EXPERTS_OF_LAYER, WIDTH, PAIRS, STEPS = 9, 7, 4, 3, 12, 3


example = compile(example_of(REPOSITORY / "docs/extending/expert.md"), "tanh_experts.py", "exec", dont_inherit=True)
exec(example, {"__name__": "tanh_experts"})
TanhConfig = EXPERTS.by_name["tanh"]


def build(world: World) -> Recommender:
    torch.manual_seed(0)
    section = {"num_experts": EXPERTS_OF_LAYER, "experts": {"name": "tanh", "width": WIDTH}, "embedding_dim": 2}
    config = RecommenderConfig.model_validate(section | {"tower_units": 5, "gate": TopKConfig(k=2)})
    return config.build(USERS, ITEMS, RunShape(world, 10)).double()


def pairs_of(step: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(step)
    return torch.randint(USERS, (PAIRS,), generator=drawn), torch.randint(ITEMS, (PAIRS,), generator=drawn)


def trained(world: World) -> dict[str, Tensor]:
    """Parameters after some steps of gradient descent; each rank has its share of the pairs."""
    model = build(world)
    rank = range(world.rank, PAIRS, world.size)
    for step in range(STEPS):
        user_B, item_B = (column[list(rank)] for column in pairs_of(step))
        loss = torch.stack([p.square().sum() for p in model(user_B, item_B).predictions]).sum()
        for (name, parameter), gradient in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            summed = gradient if ".experts." in name else torch.stack(world.gather(gradient)).sum(0)
            parameter.data -= 0.1 * summed
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def naive_trained() -> dict[str, Tensor]:
    """Every pair, target and expert one by one."""
    model = build(SingleWorld())
    bank = model.moe.experts
    for step in range(STEPS):
        loss = torch.zeros((), dtype=torch.float64)
        for user, item in zip(*pairs_of(step), strict=True):
            x_D = torch.cat([model.user_embedding.weight[user], model.item_embedding.weight[item]])
            for gate, tower in zip(model.moe.gates, model.towers, strict=True):
                weight_E = naive_gate(gate, x_D.unsqueeze(0))[0][0]
                y_F = torch.zeros(WIDTH, dtype=torch.float64)
                for weight, scale_D, w_DF in zip(weight_E, bank.scale, bank.weight, strict=True):
                    y_F = y_F + weight * (torch.tanh(x_D * scale_D) @ w_DF)
                loss = loss + tower(y_F).square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.data -= 0.1 * gradient
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_trained_on_any_number_of_ranks_as_by_a_naive_loop(ranks: int) -> None:
    expected, local = naive_trained(), EXPERTS_OF_LAYER // ranks
    for rank, parameters in enumerate(emulate(ranks, trained)):
        for name, parameter in parameters.items():
            share = slice(rank * local, (rank + 1) * local) if ".experts." in name else slice(None)
            assert_same(parameter, expected[name][share], name=name)


def test_it_is_planned_and_listed(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    section = {"experts": {"name": "tanh", "width": WIDTH}, "embedding_dim": 6}
    plan = plan_of(write_config(tmp_path, tiny_data, model=section), 2, "parallel.expert_parallel_size=2")
    assert plan.state.expert_parameters == 2 * 12 * (WIDTH + 1) * 4  # on a rank: experts, their numbers, fp32
    assert plan.loads[0].activations > 0
    (line, _) = field_listing([SupervisedConfig], "model.experts.width").splitlines()
    assert line == "model.experts.width: int >= 1, default 64  [tanh]"


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValidationError, match=r"name='tan' is not a type of expert; did you mean tanh\?"):
        RecommenderConfig.model_validate({"experts": {"name": "tan"}})
    config = TransformerConfig(dim=8, experts=TanhConfig(width=6))
    with pytest.raises(UserError, match=r"model\.experts\.name=tanh: gives rows of width 6, .*model\.dim=8"):
        config.build(9, RunShape(SingleWorld(), 10))
