"""The learning stage: its schedule, what training and evaluation use, and that it ends for good."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.gates import TopK
from dist_moe.routing import HardMap, Route, SoftPermutation
from dist_moe.search import PermutationSearch, PermutationSearchConfig
from dist_moe.search import permutation as module
from dist_moe.search.agreement import round_to_table
from dist_moe.search.permutation import SCHEDULES
from dist_moe.search.sinkhorn import permutation_entropy
from tests.helpers.branches import naive_branch_mix, naive_branch_relabel
from tests.helpers.clusters import Mixture, make_gate, make_tokens
from tests.helpers.oracle import assert_same, naive_sinkhorn

STAGE = 6
WARM = {"temperature": (1e-1, 1e-2), "iterations": (3, 7)}


def make_search(n: int = 5, stage: int = STAGE, seed: int = 0, **options: Any) -> PermutationSearch:
    torch.manual_seed(seed)
    return PermutationSearch(n, stage, **(WARM | options))


def train_steps(search: PermutationSearch, steps: int) -> None:
    """What a training step does: begin, forward, and a change of R."""
    for _ in range(steps):
        search.begin_step()
        search.train()()
        with torch.no_grad():
            search.relaxed.add_(torch.randn_like(search.relaxed), alpha=0.1)


def sinkhorn_arguments(search: PermutationSearch, monkeypatch: pytest.MonkeyPatch) -> tuple[float, int]:
    """(temperature, iterations) that the search uses now."""
    seen: list[tuple[Tensor, int]] = []

    def spy(logits: Tensor, iterations: int) -> Tensor:
        seen.append((logits.detach(), iterations))
        return logits.exp()

    monkeypatch.setattr(module, "sinkhorn", spy)
    search.soft_matrix()
    ((logits, iterations),) = seen
    temperatures = search.relaxed.detach() / logits
    assert_same(temperatures / temperatures.mean(), torch.ones_like(temperatures), 1e-12)
    return temperatures.mean().item(), iterations


@pytest.mark.parametrize(
    ("step", "stage", "temperature", "iterations"),
    [
        (0, 10, 1e-3, 20),
        (1, 10, 10**-3.4, 33),
        (5, 10, 1e-5, 85),
        (10, 10, 1e-7, 150),
        (95, 10, 1e-7, 150),
        (3, 7, 10 ** (-3 - 12 / 7), 75),  # 20 + 55.7
    ],
)
def test_schedule_is_the_paper_code_s(
    step: int, stage: int, temperature: float, iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """log10 tau = -3 - 4 t/T and N = floor(20 + 130 t/T); never beyond their last values."""
    search = PermutationSearch(4, stage_steps=stage, **SCHEDULES["paper"]._asdict()).double()
    search.step.fill_(step)
    actual_temperature, actual_iterations = sinkhorn_arguments(search, monkeypatch)
    assert actual_temperature == pytest.approx(temperature, rel=1e-12)
    assert actual_iterations == iterations


def test_steps_count_from_one() -> None:
    search = make_search(stage=2)
    assert int(search.step) == 0
    search.begin_step()
    assert (int(search.step), search.learning) == (1, True)
    search.begin_step()
    assert (int(search.step), search.learning) == (2, False)


def test_training_in_the_stage_mixes_with_the_sinkhorn_matrix() -> None:
    search = make_search().double()
    search.begin_step()
    (permutation,), aux = search.train()()
    assert isinstance(permutation, SoftPermutation)
    expected = naive_sinkhorn(search.relaxed[0, 0] / 10 ** (-1 - 1 / STAGE), 3)
    assert_same(permutation.matrix_KEE, expected.unsqueeze(0), 1e-12)
    assert torch.equal(search.soft[0], permutation.matrix_KEE.detach())
    assert torch.equal(aux["permutation"], 1e-4 * permutation_entropy(permutation.matrix_KEE))
    mixture_TS = torch.rand(3, 5, dtype=torch.float64)
    assert_same(
        permutation.apply(Route.from_dense(mixture_TS)).dense(),
        naive_branch_mix(mixture_TS, expected.unsqueeze(0)),
        1e-12,
    )
    (grad,) = torch.autograd.grad(aux["permutation"] + permutation.matrix_KEE[0, 0, 0], search.relaxed)
    assert grad.abs().max() > 0


def test_penalty_carries_its_coefficient() -> None:
    light, heavy = make_search(entropy_weight=1e-4), make_search(entropy_weight=1e-3)
    for search in (light, heavy):
        search.begin_step()
    assert heavy()[1]["permutation"].item() == pytest.approx(10 * light()[1]["permutation"].item(), rel=1e-5)


def test_stage_ends_with_the_rounding_of_the_last_soft_matrix() -> None:
    search = make_search()
    train_steps(search, STAGE - 1)
    last_soft = search.soft.clone()
    train_steps(search, 1)
    assert torch.equal(search.table, round_to_table(last_soft[0, 0]).view(1, 1, 5))
    assert torch.equal(search.soft, last_soft)
    assert search.table.tolist() != [[list(range(5))]]
    (permutation,), _ = search.train()()
    assert isinstance(permutation, HardMap)
    mixture_TS = torch.rand(3, 5)
    relabelled = permutation.apply(Route.from_dense(mixture_TS)).dense()
    assert torch.equal(relabelled, naive_branch_relabel(mixture_TS, search.table[0]))


def test_a_stage_of_one_step_is_the_identity() -> None:
    search = make_search(stage=1)
    train_steps(search, 3)
    assert search.table.tolist() == [[[0, 1, 2, 3, 4]]]


def test_frozen_for_ever_after_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("the table was decided again")

    search = make_search()
    train_steps(search, STAGE)
    monkeypatch.setattr(module, "agree_on_tables", refuse)
    table, soft = search.table.clone(), search.soft.clone()
    with torch.no_grad():
        search.relaxed.copy_(-100 * torch.eye(5)[table])
    train_steps(search, 20 * STAGE)
    search.begin_evaluation()
    for training in (True, False):
        (permutation,), _ = search.train(training)()
        assert isinstance(permutation, HardMap)
        assert torch.equal(permutation.table_KS, table[0])
    assert torch.equal(search.table, table)
    assert torch.equal(search.soft, soft)


def test_after_the_stage_the_relaxed_gradient_is_zero_not_none() -> None:
    search = make_search()
    train_steps(search, STAGE + 1)
    _, aux = search.train()()
    assert aux["permutation"].item() == 0
    aux["permutation"].backward()
    assert search.relaxed.grad is not None
    assert not search.relaxed.grad.any()


def test_evaluation_in_the_stage_uses_the_rounding_of_the_last_soft_matrix() -> None:
    search = make_search()
    train_steps(search, 2)
    first, soft = round_to_table(search.soft[0, 0]), search.soft.clone()
    search.begin_evaluation()
    (permutation,), aux = search.eval()()
    assert int(search.step) == 2
    assert torch.equal(search.soft, soft)
    assert isinstance(permutation, HardMap)
    assert torch.equal(permutation.table_KS[0], first)
    assert aux == {}
    with torch.no_grad():
        search.relaxed.copy_(torch.eye(5).roll(1, 0))
    train_steps(search, 1)
    search.begin_evaluation()
    (permutation,), _ = search.eval()()
    assert isinstance(permutation, HardMap)
    assert torch.equal(permutation.table_KS[0], round_to_table(search.soft[0, 0]))
    assert not torch.equal(search.table[0, 0], first)
    assert isinstance(search.train()()[0][0], SoftPermutation)


def test_evaluation_before_any_step_is_the_identity() -> None:
    search = make_search()
    search.begin_evaluation()
    (permutation,), _ = search.eval()()
    assert isinstance(permutation, HardMap)
    assert permutation.table_KS.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("steps", [3, STAGE - 1, STAGE, STAGE + 2])
def test_state_dict_resumes_where_it_stopped(steps: int) -> None:
    search = make_search()
    train_steps(search, steps)
    state = search.state_dict()
    assert set(state) == {"relaxed", "step", "soft", "table", "start"}
    resumed = make_search(seed=1)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    assert resumed.learning == search.learning
    for each in (search, resumed):
        torch.manual_seed(5)
        train_steps(each, STAGE)
    for name, tensor in search.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_stays_finite_far_beyond_the_stage() -> None:
    """The official PyTorch port overflows at nine stages."""
    search = PermutationSearch(8, stage_steps=4)
    search.step.fill_(4 * 100)
    assert search.soft_matrix().isfinite().all()
    train_steps(search, 10)
    assert search.soft.isfinite().all()


def test_nan_is_refused_at_the_end_of_the_stage_and_at_evaluation() -> None:
    search = make_search()
    train_steps(search, 1)
    search.soft[0, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        search.begin_evaluation()
    search.step.fill_(STAGE - 1)
    with pytest.raises(FloatingPointError, match="NaN"):
        search.begin_step()


def test_current_matrix_is_soft_then_hard() -> None:
    search = make_search()
    train_steps(search, 2)
    assert torch.equal(search.current_matrix(), search.soft)
    train_steps(search, STAGE)
    hard = search.current_matrix()
    assert hard.shape == (1, 1, 5, 5)
    assert [(s, e) for s, e in hard[0, 0].nonzero().tolist()] == list(enumerate(search.table[0, 0].tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_no_bit_of_sinkhorn_and_entropy(dtype: torch.dtype) -> None:
    search = make_search(n=9)
    search.relaxed.data = search.relaxed.data.to(dtype)
    search.begin_step()
    (permutation,), aux = search()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (under_permutation,), under_aux = search()
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert isinstance(permutation, SoftPermutation)
    assert isinstance(under_permutation, SoftPermutation)
    assert under_permutation.matrix_KEE.dtype == under_aux["permutation"].dtype == wanted
    assert torch.equal(under_permutation.matrix_KEE, permutation.matrix_KEE)
    assert torch.equal(under_aux["permutation"], aux["permutation"])


def test_sinkhorn_and_entropy_run_outside_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU autocast leaves their operations alone; elsewhere it does not."""
    seen: list[bool] = []

    def spy(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*arguments: Any) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return function(*arguments)

        return wrapped

    for name in ("sinkhorn", "permutation_entropy"):
        monkeypatch.setattr(module, name, spy(getattr(module, name)))
    search = make_search()
    search.begin_step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        search()
    assert seen == [False, False]


def test_initial_range_and_single_parameter() -> None:
    torch.manual_seed(0)
    search = PermutationSearch(32, 10)
    assert {name: tuple(p.shape) for name, p in search.named_parameters()} == {"relaxed": (1, 1, 32, 32)}
    assert -0.05 <= search.relaxed.min() < -0.049
    assert 0.049 < search.relaxed.max() <= 0.05


@pytest.mark.parametrize(("epochs", "steps_per_epoch", "stage"), [(0.1, 1000, 100), (2.0, 30, 60), (0.001, 10, 1)])
def test_config_measures_the_stage_in_epochs(epochs: float, steps_per_epoch: int, stage: int) -> None:
    search = PermutationSearchConfig(epochs=epochs).build([TopK(3, 4)], steps_per_epoch)
    assert search.stage_steps == stage
    assert search.entropy_weight == 1e-4


@pytest.mark.parametrize(
    ("options", "temperature", "iterations"),
    [
        ({}, (1e-1, 1e-3), (20, 20)),
        ({"schedule": "paper"}, (1e-3, 1e-7), (20, 150)),
        ({"schedule": "paper", "temperature": (1.0, 0.5)}, (1.0, 0.5), (20, 150)),
        ({"iterations": (3, 9)}, (1e-1, 1e-3), (3, 9)),
    ],
)
def test_schedules_and_what_overrides_them(options: Any, temperature: Any, iterations: Any) -> None:
    search = PermutationSearchConfig(**options).build([TopK(3, 4)], 10)
    assert (search.temperature, search.iterations) == (temperature, iterations)


def rows_moved(**schedule: Any) -> int:
    """Rows changed by a short stage at a low rate, 50 steps of a mixture that learns clusters."""
    torch.manual_seed(0)
    model, tokens = Mixture(make_gate("top_k", 8), 8), make_tokens(8, 128, seed=1)
    search = PermutationSearch(8, 50, **schedule)
    model.moe.slot_map = search
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    for _ in range(50):
        search.begin_step()
        optimizer.zero_grad()
        output = model.moe(tokens.x_TD, tokens.id_T)
        loss = F.mse_loss(model.head(output.outputs[0]), tokens.y_TF) + output.aux["permutation"]
        loss.backward()
        optimizer.step()
    return search.rows_changed()


def test_the_hot_schedule_moves_rows_where_the_paper_s_moves_none() -> None:
    assert rows_moved(**SCHEDULES["paper"]._asdict()) == 0
    assert rows_moved(**SCHEDULES["hot"]._asdict()) > 0


def test_rows_changed_and_entropy() -> None:
    search = make_search(n=4)
    search.begin_step()
    search.train()()
    assert search.rows_changed() == 0
    with torch.no_grad():
        search.relaxed.copy_(10 * torch.eye(4)[search.start][..., [1, 0, 3, 2]])
    assert search.rows_changed() == 4
    search.soft.fill_(0.25)
    assert search.row_entropy() == pytest.approx(math.log(4))
    search.soft.copy_(torch.eye(4))
    assert search.row_entropy() == pytest.approx(0)


@pytest.mark.parametrize("control", ["random", "identity"])
def test_controls_hold_r_still_and_harden_all_the_same(control: Any) -> None:
    torch.manual_seed(0)
    search = PermutationSearch(8, 20, control=control)
    assert list(search.parameters()) == []
    relaxed, entropies = search.relaxed.clone(), []
    for _ in range(25):
        search.begin_step()
        maps, aux = search.train()()
        entropies.append(search.row_entropy())
        assert aux == {}
    assert isinstance(maps[0], HardMap)
    assert torch.equal(search.relaxed, relaxed)
    assert entropies[0] > 0.9 * math.log(8)
    assert entropies[-1] < 0.2
    identity = list(range(8))
    assert (search.start.flatten().tolist() == identity) == (control == "identity")
    if control == "identity":
        assert search.table.flatten().tolist() == identity


def test_the_host_reads_the_step_only_when_somebody_else_has_written_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would wait for the device in every step of the run, long after the stage."""
    reads: list[int] = []
    read = torch.Tensor.__int__

    def spy(tensor: Tensor) -> int:
        reads.append(read(tensor))
        return reads[-1]

    monkeypatch.setattr(torch.Tensor, "__int__", spy)
    search = make_search()
    train_steps(search, 3 * STAGE)
    assert reads == [0]
    assert not search.learning
    search.load_state_dict(search.state_dict() | {"step": torch.tensor(2)})
    assert search.learning
    train_steps(search, 1)
    assert search.count == 3
    assert reads == [0, 2]


def test_searches_of_one_size_are_relaxed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients as if each had been alone, for two micro-batches of a step; one computation per size."""
    searches = [make_search(seed=0), make_search(seed=1, num_gates=2, per_gate=True), make_search(n=3, seed=2)]
    alone = copy.deepcopy(searches)
    calls: list[torch.Size] = []
    relax = module.sinkhorn

    def spy(logits: Tensor, iterations: int) -> Tensor:
        calls.append(logits.shape)
        return relax(logits, iterations)

    monkeypatch.setattr(module, "sinkhorn", spy)
    for search in (*searches, *alone):
        search.train().begin_step()
    for _ in range(2):
        calls.clear()
        module.relax_together([*searches, None])
        losses = [sum(aux.sum() for aux in search()[1].values()) for search in searches]
        assert calls == [(3, 5, 5), (1, 1, 3, 3)]
        sum(losses).backward()
        sum(sum(aux.sum() for aux in search()[1].values()) for search in alone).backward()
    for ours, theirs in zip(searches, alone, strict=True):
        assert torch.equal(ours.soft, theirs.soft)
        assert ours.relaxed.grad is not None
        assert_same(ours.relaxed.grad, theirs.relaxed.grad, 1e-6)


def test_fp32_suffices_at_the_temperatures_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    search, cotangent = PermutationSearch(16, 10, temperature=(module.FP32_ABOVE, 1e-3)), torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        search.relaxed.mul_(10)
    grads = []
    for above in (module.FP32_ABOVE, math.inf):
        monkeypatch.setattr(module, "FP32_ABOVE", above)
        grads += torch.autograd.grad((search.soft_matrix() * cotangent).sum(), search.relaxed)
    assert not torch.equal(*grads)
    assert_same(*grads, 1e-5)
