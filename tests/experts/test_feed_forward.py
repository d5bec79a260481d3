"""The feed-forward bank: weights by global id, in every form; what it refuses."""

from __future__ import annotations

import pytest
import torch

from dist_moe.experts import FeedForwardBank

LAYOUTS = [range(8), range(4, 8), [5], [6, 0, 3]]


def seeded_bank(expert_ids: list[int] | range) -> FeedForwardBank:
    torch.manual_seed(11)
    return FeedForwardBank(6, 5, 8, expert_ids, activation="silu", gated=True, bias=True)


@pytest.mark.parametrize("expert_ids", LAYOUTS, ids=str)
def test_an_expert_has_the_same_weights_wherever_it_lives(expert_ids: list[int] | range) -> None:
    whole, share = (dict(seeded_bank(ids).named_parameters()) for ids in (range(8), expert_ids))
    assert whole.keys() == {"up", "gate", "down", "up_bias", "down_bias"}
    for name, parameter in share.items():
        assert torch.equal(parameter, whole[name][list(expert_ids)])


def test_no_two_matrices_are_alike() -> None:
    bank = seeded_bank(range(8))
    assert bank.gate is not None
    matrices = [*bank.up, *bank.gate]
    assert all(not torch.equal(matrices[i], matrices[j]) for i in range(16) for j in range(i))


def test_a_bank_has_the_parameters_of_its_form_only() -> None:
    plain = FeedForwardBank(6, 5, 8, [1, 2], out_dim=3)
    assert {name: tuple(p.shape) for name, p in plain.named_parameters()} == {"up": (2, 6, 5), "down": (2, 5, 3)}


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of \['gelu', 'relu', 'silu'\], got 'tanh'"):
        FeedForwardBank(6, 5, 8, [0], activation="tanh")


def test_normal_weights_have_the_deviations_asked_for() -> None:
    torch.manual_seed(0)
    bank = FeedForwardBank(50, 60, 4, range(4), gated=True, activation="silu", init_stds=(0.02, 0.004))
    deviations = {name: parameter.std().item() for name, parameter in bank.named_parameters()}
    assert deviations == pytest.approx({"up": 0.02, "gate": 0.02, "down": 0.004}, rel=0.05)
    torch.manual_seed(0)
    share = FeedForwardBank(50, 60, 4, [2], gated=True, activation="silu", init_stds=(0.02, 0.004))
    assert torch.equal(share.down[0], bank.down[2])
