"""Banks of every type: values and gradients as the naive experts', by their rows and by every row; first weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from dist_moe.experts import BertFeedForwardBank, ConvBank, DenseReLUBank, ExpertBank, FeedForwardBank
from tests.experts.naive_banks import BANKS, leaves_of, naive_expert, small_bank
from tests.helpers.device_path import device_path_forced
from tests.helpers.oracle import assert_all_same, assert_same, gradients, naive_gradients

every_bank = pytest.mark.parametrize("name", BANKS)
LAYOUTS = [range(8), range(4, 8), [5], [6, 0, 3]]


def on_device(bank: ExpertBank, x_ND: Tensor, counts: list[int]) -> Tensor:
    with device_path_forced():
        return bank(x_ND, torch.tensor(counts))


@pytest.mark.parametrize("forward", [ExpertBank.__call__, on_device], ids=["host", "device"])
@pytest.mark.parametrize("counts", [[2, 0, 3], [1, 1, 1], [0, 0, 4], [0, 0, 0]], ids=str)
@every_bank
def test_rows_by_expert_equal_naive(name: str, counts: list[int], forward: Callable[..., Tensor]) -> None:
    bank = small_bank(name)
    x_ND = torch.randn(sum(counts), bank.dim, dtype=torch.float64, requires_grad=True)
    expert_N = [expert for expert, rows in enumerate(counts) for _ in range(rows)]
    rows = [naive_expert(bank, expert, x) for expert, x in zip(expert_N, x_ND, strict=True)]
    expected = torch.stack(rows) if rows else x_ND.new_zeros(0, bank.out_dim)
    actual = forward(bank, x_ND, counts)
    assert bool(expected.any()) == bool(rows)
    assert_same(actual, expected)
    cotangent, leaves = torch.randn_like(expected), leaves_of(bank, x_ND)
    assert_all_same(
        gradients((actual * cotangent).sum(), leaves), naive_gradients((expected * cotangent).sum(), leaves)
    )


@pytest.mark.parametrize(
    "all_experts", [lambda bank, x: bank.all_experts(x), ExpertBank.all_experts], ids=["own", "default"]
)
@pytest.mark.parametrize("rows", [0, 2])
@every_bank
def test_all_experts_equal_naive(name: str, rows: int, all_experts: Callable[[ExpertBank, Tensor], Tensor]) -> None:
    bank = small_bank(name)
    x_TD = torch.rand(rows, bank.dim, dtype=torch.float64, requires_grad=True)
    expected = bank(torch.zeros(0, bank.dim, dtype=torch.float64), [0, 0, 0]).expand(3, 0, bank.out_dim)
    if rows:
        expected = torch.stack([torch.stack([naive_expert(bank, e, x) for x in x_TD]) for e in range(3)])
        assert all(expert.any() for expert in expected)
    actual = all_experts(bank, x_TD)
    assert actual.shape == (3, rows, bank.out_dim)
    assert_same(actual, expected)
    cotangent, leaves = torch.randn_like(expected), leaves_of(bank, x_TD)
    assert_all_same(
        gradients((actual * cotangent).sum(), leaves), naive_gradients((expected * cotangent).sum(), leaves)
    )


class Dense(nn.Module):
    """``all_experts`` as a forward, which is what ``functional_call`` calls."""

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.bank.all_experts(x_TD)


@pytest.mark.filterwarnings("error")  # vmap warns where it falls back to a loop
@pytest.mark.parametrize("each_its_rows", [False, True])
@every_bank
def test_vmap_over_stacked_banks_equals_one_bank_after_another(name: str, each_its_rows: bool) -> None:
    banks = [Dense(small_bank(name)) for _ in range(4)]
    for bank in banks:
        for parameter in bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    stacked, _ = torch.func.stack_module_state(banks)
    x_VTD = torch.rand(4, 3, banks[0].bank.dim, dtype=torch.float64)
    rows = x_VTD if each_its_rows else x_VTD[0]

    def loss(parameters: dict[str, Tensor], x_TD: Tensor) -> Tensor:
        return torch.func.functional_call(banks[0], parameters, (x_TD,)).square().sum()

    grads, losses = torch.vmap(torch.func.grad_and_value(loss), in_dims=(0, 0 if each_its_rows else None))(
        stacked, rows
    )
    for v, bank in enumerate(banks):
        expected = bank(x_VTD[v if each_its_rows else 0]).square().sum()
        assert expected > 0
        assert_same(losses[v], expected)
        assert_all_same(
            {name: grad[v] for name, grad in grads.items()}, gradients(expected, dict(bank.named_parameters()))
        )


@pytest.mark.parametrize("every", [False, True])
def test_dropout_acts_in_training_only_and_scales_what_it_keeps(every: bool) -> None:
    torch.manual_seed(0)
    bank = DenseReLUBank(40, 50, 2, range(2), dropout=0.5).double()
    x_TD = torch.rand(200, 40, dtype=torch.float64)
    kept, plain = (
        bank.train(training).all_experts(x_TD)[1] if every else bank.train(training)(x_TD, [0, 200])
        for training in (True, False)
    )
    positive = plain > 0
    assert 0.45 < (kept[positive] == 0).double().mean() < 0.55
    torch.testing.assert_close(kept[kept != 0], 2 * plain[kept != 0])


@pytest.mark.filterwarnings("error")
def test_every_bank_of_a_vmap_drops_its_own_elements() -> None:
    module = Dense(DenseReLUBank(400, 5, 3, range(3), dropout=0.5).double())
    stacked = {name: torch.stack([p.detach()] * 3) for name, p in module.named_parameters()}
    x_TD = torch.rand(100, 400, dtype=torch.float64)

    def results(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x_TD,))

    kept_VETF = torch.vmap(results, randomness="different")(stacked)
    plain_ETF = module.eval()(x_TD)
    positive = plain_ETF > 0
    for v in range(3):
        dropped = kept_VETF[v][positive] == 0
        assert 0.4 < dropped.double().mean() < 0.6
        both = dropped & (kept_VETF[v - 1][positive] == 0)
        assert 0.15 < both.double().mean() < 0.35
        assert_same(kept_VETF[v][positive][~dropped], 2 * plain_ETF[positive][~dropped])


@pytest.mark.parametrize("every", [False, True])
def test_dropout_is_on_what_the_network_gives_and_not_on_the_residual(every: bool) -> None:
    bank = BertFeedForwardBank(200, 5, 2, range(2), dropout=0.25).double()
    torch.nn.init.constant_(bank.down_bias, 10.0)
    torch.nn.init.zeros_(bank.down)
    x_ND = torch.zeros(60, 200, dtype=torch.float64)
    dropped_ND = bank.all_experts(x_ND)[1] if every else bank(x_ND, [0, 60])
    low_ND = dropped_ND < 0  # the network gives 10 everywhere: what stays is above the row's mean, the rest below
    assert 0.23 < low_ND.double().mean() < 0.27
    x_ND[:, 0] = 1000.0  # so large a residual stands out whatever is dropped
    kept = bank.all_experts(x_ND)[1] if every else bank(x_ND, [0, 60])
    assert (kept[:, 0] > 10).all()
    plain = bank.eval()(x_ND, [0, 60])
    assert torch.equal(plain, bank(x_ND, [0, 60]))


@pytest.mark.parametrize("expert_ids", LAYOUTS, ids=str)
@every_bank
def test_first_weights_and_what_is_drawn_after_them_do_not_depend_on_the_layout(
    name: str, expert_ids: Sequence[int]
) -> None:
    drawn, after = [], []
    for ids in (range(8), expert_ids):
        torch.manual_seed(11)
        drawn.append(dict(BANKS[name](ids).named_parameters()))
        after.append(torch.rand(3))
    for parameter, share in drawn[1].items():
        assert torch.equal(share, drawn[0][parameter][list(expert_ids)]), parameter
    assert torch.equal(*after)


@every_bank
def test_experts_matrices_and_banks_differ_from_each_other(name: str) -> None:
    parameters = [
        parameter
        for _ in range(2)
        for parameter in BANKS[name](range(8)).parameters()
        if parameter.dim() > 2 and parameter.any()
    ]
    matrices = [matrix for parameter in parameters for matrix in parameter]
    assert not any(torch.equal(matrices[i], matrices[j]) for i in range(len(matrices)) for j in range(i))


@pytest.mark.parametrize(
    ("name", "fans"),
    [("conv1_weight", 275), ("conv2_weight", 750), ("dense1_weight", 770), ("dense2_weight", 100), ("weight", 100)],
)
def test_weights_are_glorot_uniform_and_biases_zero(name: str, fans: int) -> None:
    torch.manual_seed(11)
    bank = DenseReLUBank(60, 40, 2, range(2)) if name == "weight" else ConvBank(36, 5, range(5))
    bound = (6 / fans) ** 0.5
    for weight in bank.get_parameter(name):
        assert 0.97 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert weight.mean().item() == pytest.approx(0, abs=5 * bound / weight.numel() ** 0.5)
    assert not any(parameter.any() for each, parameter in bank.named_parameters() if each.endswith("bias"))


@pytest.mark.parametrize("expert_ids", [[], [0, 0], [1, 0, 1], [0, -1], [8, 7]])
def test_impossible_expert_ids_are_refused(expert_ids: list[int]) -> None:
    with pytest.raises(ValueError, match="expert_ids must"):
        DenseReLUBank(6, 5, 8, expert_ids)


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
