"""What is not a number comes out as such: in every gate, on both paths, from tokens and from parameters."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from torch import Tensor

from dist_moe.gates import HashRouting
from tests.gates.cases import SATURATED, VARIANTS, build, ids, tokens
from tests.helpers.device_path import device_path_forced

TOKENS, SLOTS, K = 12, 8, 2
NAN = float("nan")


def total_T(variant: str, poison: str | None, hardness: float, on_path: bool, place: int = 0) -> Tensor:
    """The sum of each token's weights, with a NaN in a tensor of the gate, or (None) in token 3."""
    gate = build(variant, SLOTS, K, hardness)
    x_TD = tokens(TOKENS).detach()
    if poison is None:
        x_TD[3, place % x_TD.shape[1]] = NAN
    else:
        gate.get_parameter(poison).data.flatten()[place] = NAN
    with device_path_forced() if on_path else nullcontext():
        route = gate(x_TD, ids(TOKENS))
    return route.weight_N.new_zeros(TOKENS).index_add(0, route.token_N, route.weight_N).detach()


def sees_tokens(variant: str) -> bool:
    gate = build(variant, SLOTS, K)
    return not isinstance(gate, HashRouting) and "static" not in variant and variant != "softmax"


@pytest.mark.parametrize("on_path", [False, True])
@pytest.mark.parametrize("hardness", [0.1, 0.6, SATURATED])
@pytest.mark.parametrize("variant", list(filter(sees_tokens, VARIANTS)))
def test_a_token_that_is_not_a_number_has_weights_that_are_none(variant: str, hardness: float, on_path: bool) -> None:
    for place in range(3):
        found_T = total_T(variant, None, hardness, on_path, place)
        assert found_T.isnan().nonzero().flatten().tolist() == [3], found_T


@pytest.mark.parametrize("on_path", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_parameter_that_is_not_a_number_is_seen_in_the_weights_that_it_takes_part_in(
    variant: str, on_path: bool
) -> None:
    """Each element of each parameter in turn, in trees that reach all of their leaves with every token."""
    for name, parameter in build(variant, SLOTS, K, 0.01).named_parameters():
        for place in range(parameter.numel()):
            found_T = total_T(variant, name, 0.01, on_path, place)
            assert found_T.isnan().any(), (name, place)
