"""Activation checkpointing of the experts: the same gradients, fewer activations, the exchange done again.

That the gradients are those of the oracle, also with ranks and experts without rows: tests/layer/test_moe_ranks.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import TopK
from dist_moe.layer import MoE
from tests.layer.cases import Case
from tests.layer.test_moe_ranks import RankResult, run_case

WIDTH, TOKENS, K = 16, 32, 2


def layer(recompute: bool) -> MoE:
    torch.manual_seed(0)
    experts = DenseReLUBank(WIDTH, WIDTH, 4, range(4), dropout=0.5)
    return MoE(TopK(WIDTH, 4, K), experts, recompute_experts=recompute)


def kept_bytes_and_gradients(recompute: bool) -> tuple[int, dict[str, Tensor]]:
    """What autograd keeps from the forward to the backward pass of a layer with dropout."""
    moe, kept = layer(recompute), dict[int, int]()
    x_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = moe(x_TD.requires_grad_())
        loss = output.outputs[0].square().sum() + sum(output.aux.values())
    torch.manual_seed(3)  # the dropout of the backward pass must not depend on where the generator is by now
    loss.backward()
    gradients = {name: p.grad for name, p in [*moe.named_parameters(), ("x", x_TD)] if p.grad is not None}
    return sum(kept.values()), gradients


def test_same_gradients_from_fewer_activations() -> None:
    """Of the rows kept for the backward pass only those that the combination needs remain."""
    kept, gradients = kept_bytes_and_gradients(recompute=False)
    kept_with, gradients_with = kept_bytes_and_gradients(recompute=True)
    assert gradients.keys() == gradients_with.keys() >= {"x", "experts.weight", "gates.0.weight"}
    for name, gradient in gradients.items():
        assert torch.equal(gradients_with[name], gradient), name
    one_activation = TOKENS * K * WIDTH * 4
    assert kept_with <= kept - 2.5 * one_activation


def test_the_rows_travel_once_more() -> None:
    """Dispatch and combine, both forward and backward, and the dispatch of the repetition."""
    tokens = [5, 0, 3, 4]

    def rows_of(results: list[RankResult]) -> list[tuple[int, int]]:
        return [(result.forward_traffic.rows, result.traffic.rows) for result in results]

    plain = rows_of(run_case(Case(), tokens))
    again = rows_of(run_case(Case(recompute=True), tokens))
    assert [forward for forward, _ in again] == [forward for forward, _ in plain]
    sent = [more - once for (_, once), (_, more) in zip(plain, again, strict=True)]
    assert sent[1] == 0 < min(sent[0], sent[2], sent[3])
    assert sum(sent) == sum(forward for forward, _ in plain) / 2


def test_nothing_is_repeated_without_gradients() -> None:
    moe = layer(recompute=True).eval()
    x_TD = torch.randn(TOKENS, WIDTH)
    with torch.no_grad():
        outputs = moe(x_TD).outputs
    assert torch.equal(outputs[0], layer(recompute=False).eval()(x_TD).outputs[0])
