"""The layer on the path for accelerators, without one: same results, and the host looks at nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_moe.experts import DenseReLUBank, ExpertBank, FeedForwardBank
from dist_moe.gates import Comet, Gate, HashRouting, TopK
from dist_moe.layer import MoE
from dist_moe.parallel import EmulatedWorld, Placement, World, experts_of_rank, plan_dispatch
from dist_moe.routing import Route
from tests.gates.cases import VARIANTS, build, ids, loss_of, tokens
from tests.helpers.device_path import device_path_forced
from tests.helpers.host import HostLooked, NoAtomicSums, NoLook
from tests.helpers.oracle import assert_all_same, assert_same, gradients

WIDTH, HIDDEN, EXPERTS, TOKENS = 6, 5, 8, 30
BALANCED = {"balance_weight": 0.1, "z_loss_weight": 0.1, "bias_update_rate": 0.01}


@pytest.fixture
def _on_path() -> Iterator[None]:
    with device_path_forced():
        yield


def make_gate(name: str) -> Gate:
    torch.manual_seed(3)
    if name == "hash":
        return HashRouting(WIDTH, EXPERTS, torch.ones(50, dtype=torch.int64))
    if name == "comet":
        return Comet(WIDTH, EXPERTS, k=2, gamma=1.0, entropy_weight=0.1)
    scores = name.removeprefix("top_k_")
    return TopK(WIDTH, EXPERTS, k=3, scores=scores, **BALANCED)  # type: ignore[arg-type]


def make_bank(name: str, expert_ids: range = range(EXPERTS)) -> ExpertBank:
    torch.manual_seed(4)
    if name == "feed_forward":
        return FeedForwardBank(WIDTH, HIDDEN, EXPERTS, expert_ids, activation="silu", gated=True, bias=True)
    return DenseReLUBank(WIDTH, HIDDEN, EXPERTS, expert_ids)


def step_of(moe: MoE, tokens: int = TOKENS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What one training step gives: output and losses; gradients by name."""
    generator = torch.Generator().manual_seed(5)
    x_TD = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    moe.begin_step(0)
    output = moe(x_TD, torch.randint(50, (tokens,), generator=generator))
    cotangent = torch.randn(output.outputs[0].shape, generator=generator, dtype=torch.float64)
    loss = torch.stack([(output.outputs[0] * cotangent).sum(), *output.aux.values()]).sum()
    grads = gradients(loss, dict(moe.named_parameters()) | {"x": x_TD})
    moe.end_step()
    pairs = output.pairs
    found = {"y": output.outputs[0], "weights": pairs.weight_GN, "tokens": pairs.token_N, "experts": pairs.expert_N}
    return found | {"counts": pairs.rows_per_expert_E} | output.aux | dict(moe.named_buffers()), grads


GATES = ["top_k_softmax_after", "top_k_softmax_before", "top_k_sigmoid", "hash", "comet"]


@pytest.mark.parametrize("tokens", [TOKENS, 0])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bank", ["feed_forward", "dense_relu"])
def test_equals_the_path_of_cpus(gate: str, bank: str, tokens: int) -> None:
    expected, expected_grads = step_of(MoE(make_gate(gate), make_bank(bank)).double(), tokens)
    with device_path_forced():
        actual, actual_grads = step_of(MoE(make_gate(gate), make_bank(bank)).double(), tokens)
    for name in expected:
        assert_same(actual[name].double(), expected[name].double(), 1e-12, name)
    assert_all_same(actual_grads, expected_grads, 1e-12)


@pytest.mark.usefixtures("_on_path")
def test_experts_that_are_computed_again_give_the_same() -> None:
    kept, again = (
        step_of(MoE(make_gate("comet"), make_bank("feed_forward"), recompute_experts=recompute).double())
        for recompute in (False, True)
    )
    assert_same(again[0]["y"], kept[0]["y"], 0)
    assert_all_same(again[1], kept[1], 1e-14)


@pytest.mark.usefixtures("_on_path")
@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "comet"])
@pytest.mark.parametrize("placed", [False, True])
def test_the_host_looks_at_nothing_where_every_token_has_k_experts(gate: str, placed: bool) -> None:
    placement = Placement(tuple(reversed(range(EXPERTS))), 1)
    bank = make_bank("feed_forward")
    moe = MoE(make_gate(gate), bank).double()
    if placed:
        moe.place(placement)
    with NoLook():
        step_of(moe)


@pytest.mark.usefixtures("_on_path")
def test_the_host_looks_once_where_the_number_of_experts_varies() -> None:
    moe = MoE(make_gate("comet"), make_bank("feed_forward")).double()
    with pytest.raises(HostLooked, match="nonzero"), NoLook():
        step_of(moe)
    with NoLook("nonzero"):
        step_of(moe)


@pytest.mark.usefixtures("_on_path")
def test_the_host_looks_once_for_the_union_of_several_gates() -> None:
    moe = MoE([make_gate(GATES[0]), make_gate(GATES[1])], make_bank("feed_forward")).double()
    with pytest.raises(HostLooked, match="unique"), NoLook():
        step_of(moe)
    with NoLook("_unique2"):
        step_of(moe)


def test_the_path_of_cpus_looks() -> None:
    moe = MoE(make_gate("top_k_sigmoid"), make_bank("feed_forward")).double()
    with pytest.raises(HostLooked), NoLook():
        step_of(moe)


@pytest.mark.usefixtures("_on_path")
def test_a_step_of_the_size_of_a_language_model_runs_on_tensors_without_values() -> None:
    """Whatever needs a value raises here, and all shapes are worked out by the host alone."""
    with FakeTensorMode():
        gate = TopK(2048, 64, k=8, **BALANCED)  # type: ignore[arg-type]
        moe = MoE(gate, _FakeBank(2048, 2048, 64, range(64)))
        x_TD = torch.empty(16384, 2048, dtype=torch.bfloat16, requires_grad=True)
        moe.begin_step(0)
        output = moe(x_TD)
        torch.stack([output.outputs[0].sum(), *output.aux.values()]).sum().backward()
        moe.end_step()
        assert x_TD.grad is not None
        assert x_TD.grad.shape == x_TD.shape
        assert output.rows_computed == 8 * 16384


class _FakeBank(FeedForwardBank):
    """Of 4096 hidden units, whose weights are not drawn."""

    def __init__(self, dim: int, out_dim: int, num_experts: int, expert_ids: range) -> None:
        ExpertBank.__init__(self, dim, out_dim, num_experts, expert_ids)
        self.activation = "silu"
        self.up, self.gate = (nn.Parameter(torch.empty(64, dim, 4096, dtype=torch.bfloat16)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(64, 4096, out_dim, dtype=torch.bfloat16))
        self.up_bias = self.down_bias = None


@pytest.mark.usefixtures("_on_path")
@pytest.mark.parametrize("bank", ["feed_forward", "dense_relu"])
def test_the_experts_compile_without_graph_breaks(bank: str) -> None:
    torch._dynamo.reset()
    experts, counts_E = make_bank(bank), torch.tensor([4, 0, 9, 1, 0, 0, 2, 7])
    x_ND = torch.randn(23, WIDTH, requires_grad=True)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    actual, expected = (
        torch.autograd.grad(function(x_ND, counts_E).square().sum(), [x_ND, *experts.parameters()])
        for function in (compiled, experts)
    )
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("_on_path")
def test_the_layer_of_one_rank_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    moe = MoE(TopK(WIDTH, EXPERTS, k=3), make_bank("feed_forward"))
    compiled = torch.compile(lambda x_TD: moe(x_TD).outputs[0], fullgraph=True, backend="aot_eager")
    x_TD = torch.randn(TOKENS, WIDTH)
    torch.testing.assert_close(compiled(x_TD), moe(x_TD).outputs[0])


@pytest.mark.usefixtures("_on_path")
def test_several_ranks_keep_the_experts_counts_on_the_device_and_agree_with_one() -> None:
    def on_rank(world: World) -> tuple[Tensor, bool]:
        torch.manual_seed(4)
        bank = DenseReLUBank(WIDTH, HIDDEN, EXPERTS, experts_of_rank(EXPERTS, world)).double()
        moe = MoE(make_gate("top_k_sigmoid"), bank, world=world).double()
        x_TD = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(world.rank), dtype=torch.float64)
        output = moe(x_TD)
        plan = plan_dispatch(output.pairs.rows_per_expert_E, world, output.pairs.num_pairs)
        return output.outputs[0], isinstance(plan.rows_per_local_expert, Tensor)

    alone = MoE(make_gate("top_k_sigmoid"), make_bank("dense_relu")).double()
    for rank, (y_TF, on_device) in enumerate(EmulatedWorld(2).run(on_rank)):
        x_TD = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        assert_same(y_TF, alone(x_TD).outputs[0], 1e-12)
        assert on_device


@pytest.mark.usefixtures("_on_path")
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gate_adds_numbers_in_whatever_order_they_come(variant: str) -> None:
    gate, x_TD = build(variant, EXPERTS, 2), tokens(TOKENS)
    with NoAtomicSums():
        route = gate(x_TD, ids(TOKENS))
        if route.weight_N.requires_grad:
            loss_of(route.dense(), route.aux).backward()


@pytest.mark.usefixtures("_on_path")
def test_ids_out_of_range_are_refused_on_the_path() -> None:
    with pytest.raises(RuntimeError):
        make_gate("hash")(torch.zeros(2, WIDTH), torch.tensor([3, 50]))


def test_choices_in_any_order_make_the_route_of_the_dense_mixture() -> None:
    slot_TK = torch.tensor([[3, 0], [1, 2], [0, 3]])
    weight_TK = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 2.0]], requires_grad=True)
    dense_TS = torch.zeros(3, 4).scatter(1, slot_TK, weight_TK)
    actual, expected = Route.from_choices(slot_TK, weight_TK, 4), Route.from_dense(dense_TS)
    for name in ("token_N", "slot_N", "weight_N"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    (grad_TK,) = torch.autograd.grad((actual.weight_N * torch.arange(6)).sum(), weight_TK)
    assert grad_TK.tolist() == [[1, 0], [2, 3], [4, 5]]
