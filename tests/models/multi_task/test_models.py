"""Shared-bottom, MMoE, PLE and HoME as naive loops, values and all gradients; what configurations say of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.errors import UserError
from dist_moe.experts import MlpConfig
from dist_moe.gates import GateContext
from dist_moe.models import MODELS, HomeConfig, RunShape, TableFeatures
from dist_moe.models.multi_task.levels import through
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.recipe import validate_config
from tests.helpers.oracle import assert_all_same, assert_same, gradients, naive_gradients
from tests.models.multi_task.naive import (
    EXPERTS,
    FEATURES,
    GROUPS,
    SMALL,
    TARGETS,
    batch_of,
    naive_predictions,
    small_model,
)

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("shared_bottom", {}, {}),
    ("mmoe", {}, {}),
    ("mmoe", {"experts": {"units": [4], "activation": "relu"}}, {}),
    ("mmoe", {"gate": {"name": "top_k", "k": 1}}, {}),
    ("ple", {}, {}),
    ("ple", {"gate": {"name": "top_k", "k": 2}, "experts": {"units": [5, 4]}}, {}),
    ("home", {}, {}),
    ("home", {"experts": EXPERTS | {"feature_gate": {"rank": 3, "mix": "before"}}}, {}),
    ("home", {"experts": EXPERTS | {"feature_gate": None}}, {}),
    ("home", {"experts": EXPERTS | {"batch_norm": False}}, {}),
    *(("home", option, option) for option in ({"self_gate": False}, {"mask": False}, {"self_gate_input": "experts"})),
]


@pytest.mark.parametrize(("name", "options", "naive"), CASES, ids=str)
def test_equals_a_loop_over_rows(name: str, options: dict[str, Any], naive: dict[str, Any]) -> None:
    model, batch = small_model(name, **options), batch_of(5)
    expected = naive_predictions(model, name, batch, **naive)
    actual = model(*batch).predictions
    leaves = dict(model.named_parameters())
    cotangents = [torch.randn(5, dtype=torch.float64) for _ in actual]
    for found, wanted in zip(actual, expected, strict=True):
        assert_same(found, wanted)
    loss, naive_loss = (sum((p * c).sum() for p, c in zip(ps, cotangents, strict=True)) for ps in (actual, expected))
    wanted_gradients = naive_gradients(naive_loss, leaves)
    assert_all_same(gradients(loss, leaves), wanted_gradients, 1e-9)
    if "gate" not in options:
        assert {leaf for leaf, gradient in wanted_gradients.items() if not gradient.abs().max() > 1e-12} == set()


def without_gates(model: Any, name: str, **options: Any) -> Any:
    """The model without feature gates, its other parameters those of ``model``."""
    plain = small_model(name, experts=EXPERTS | {"feature_gate": None}, **options)
    with torch.no_grad():
        for leaf, parameter in plain.named_parameters():
            parameter.copy_(model.get_parameter(leaf))
    return plain


@pytest.mark.parametrize("mix", ["after", "before"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_feature_gate_without_a_map_is_neutral(number: int, mix: str) -> None:
    model = small_model("home", experts=EXPERTS | {"feature_gate": {"number": number, "mix": mix}})
    plain, batch = without_gates(model, "home"), batch_of(7)
    wanted = plain(*batch).predictions
    assert not torch.allclose(torch.stack(model(*batch).predictions), torch.stack(wanted))
    for level in model.levels:
        nn.init.zeros_(level.experts.back)
    assert_same(torch.stack(model(*batch).predictions), torch.stack(wanted), 1e-13)


def test_feature_gates_begin_neutral_and_learn() -> None:
    bank = MlpConfig.model_validate(EXPERTS).build(8, 4, range(4)).double()
    assert not bank.back.any()
    bank(torch.randn(12, 8, dtype=torch.float64), [3, 3, 3, 3]).square().sum().backward()
    assert all(of_expert.any() for of_expert in bank.back.grad)


def meta_level(model: Any, batch: Any) -> tuple[Tensor, ...]:
    return through(model.levels[0], [model.front(*batch)], None)[0]


def test_a_group_reaches_the_experts_of_another_by_the_shared_representation_alone() -> None:
    model, batch = small_model("home"), batch_of(6)
    experts = model.levels[0].experts
    watch, interact, shared = meta_level(model, batch)

    def reaches(loss: Tensor, expert: int) -> bool:
        parts = torch.autograd.grad(loss, list(experts.parameters()), retain_graph=True, allow_unused=True)
        return any(bool(part is not None and part[expert].any()) for part in parts)

    assert [reaches(watch.sum(), e) for e in range(4)] == [True, True, True, False]
    assert [reaches(interact.sum(), e) for e in range(4)] == [True, True, False, True]
    assert [reaches(shared.sum(), e) for e in range(4)] == [True] * 4
    open_watch, *_ = meta_level(model := small_model("home", mask=False), batch)
    experts = model.levels[0].experts
    assert reaches(open_watch.sum(), 3)

    model = small_model("home")
    experts = model.levels[0].experts
    for detached in (False, True):
        watch, interact, shared = meta_level(model, batch)
        streams = [watch, interact, shared.detach() if detached else shared]
        h_TBF, _ = through(model.levels[1], streams, None)
        predictions = model.predictions(h_TBF)
        assert reaches(predictions[0].sum(), 3) == (not detached)  # "long_view" watches, expert 3 interacts
        assert reaches(predictions[1].sum(), 2) == (not detached)
        assert reaches(predictions[1].sum(), 3)


@pytest.mark.parametrize("self_gate", [True, False])
def test_own_experts_of_a_starved_output_learn_by_the_self_gate(self_gate: bool) -> None:
    model, batch = small_model("home", self_gate=self_gate), batch_of(6)
    with torch.no_grad():
        for level in model.levels:
            for gate in level.gates:
                gate.main.weight.zero_()
                gate.main.bias.copy_(torch.tensor([1e4] + [0.0] * (len(gate.main.bias) - 1)))
    sum(p.sum() for p in model(*batch).predictions).backward()
    for level, own in zip(model.levels, (range(2, 4), range(4, 16)), strict=True):
        for leaf in ("weight0", "weight1", "into", "norm_weight"):
            gradient = level.experts.get_parameter(leaf).grad
            assert [bool(gradient[e].any()) for e in own] == [self_gate] * len(own)


def test_normalised_swish_does_not_collapse_as_relu_does() -> None:
    """At first weights: mean 0 and deviation 1 before Swish, no zero behind it; ReLU alone is 0 for half and more."""
    batch, zeros = batch_of(200), {}
    for activation, batch_norm in (("silu", True), ("relu", False)):
        model = small_model("home", experts=EXPERTS | {"activation": activation, "batch_norm": batch_norm})
        for level in model.levels:
            nn.init.zeros_(level.experts.norm_bias if batch_norm else level.experts.bias1)
            if batch_norm:
                nn.init.ones_(level.experts.norm_weight)
        seen: list[tuple[Any, Tensor]] = []
        for level in model.levels:
            part = level.experts.norm if batch_norm else level.experts
            part.register_forward_hook(lambda _, inputs, y_NF, seen=seen: seen.append((inputs[1], y_NF)))
        output = model(*batch)
        if batch_norm:
            for expert_N, y_NF in seen:
                for e in expert_N.unique():
                    assert_same(y_NF[expert_N == e].mean(dim=0), torch.zeros(4, dtype=torch.float64), 1e-9)
                    assert_same(y_NF[expert_N == e].std(dim=0, correction=0), torch.ones(4, dtype=torch.float64), 0.01)
        results = [(y_NF * y_NF.sigmoid() if batch_norm else y_NF) for _, y_NF in seen]
        assert [len(y_NF) for y_NF in results] == [layer.rows_computed for layer in output.layers]
        zeros[activation] = sum((y_NF == 0).double().mean() for y_NF in results) / 2
    assert zeros["silu"] == 0
    assert zeros["relu"] > 0.1


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("home", {"num_experts": 8}, "num_experts=8: name=home counts its experts by other fields; leave it out"),
        ("ple", {"num_slots": 4}, "num_slots: the gates of name=ple choose among experts, not slots"),
        ("ple", {"permutation": {}}, "permutation: the gates of name=ple choose among experts, not slots"),
        ("ple", {"gate": {"name": "top_k", "k": 5}}, "gate.k=5 exceeds the experts that an output may see, 4; allowed"),
        ("home", {"activation_checkpointing": True}, "activation_checkpointing=true: experts with batch normalisation"),
        ("mmoe", {"activation_checkpointing": True}, "activation_checkpointing=true: experts with batch normalisation"),
    ],
)
def test_what_does_not_fit_is_named(name: str, options: dict[str, Any], sentence: str) -> None:
    config = MODELS.by_name[name].model_validate(SMALL[name] | options)
    error, *_ = [*config.validation_errors(), *config.gate_errors()]
    assert error.startswith(sentence)


@pytest.mark.parametrize(
    "groups", [{"watch": ["like"]}, {"a": ["like", "finish"], "b": ["like", "long_view"]}, {"a": TARGETS, "b": []}]
)
def test_groups_hold_each_target_once(groups: dict[str, Any]) -> None:
    config = HomeConfig.model_validate({"groups": groups})
    with pytest.raises(
        UserError, match=r"model\.groups=.*: each of the targets long_view, like, finish must be in one"
    ):
        config.expert_counts(TARGETS)


@pytest.mark.parametrize(
    ("name", "sections", "sentence"),
    [
        (
            "home",
            {},
            r"=4 does not divide the 6 experts of level 1 \(model\.shared_experts=2, model\.group_",
        ),
        ("home", {"model": {"group_experts": 1}}, r"does not divide the 10 experts of level 2 .*; allowed: 1, 2$"),
        ("ple", {"swap_search": {}}, r"swap_search: model\.name=ple has no slot -> expert table; set it to null"),
        (
            "shared_bottom",
            {"placement": {}},
            r"placement needs experts, and model\.name=shared_bottom has none; set it",
        ),
        (
            "shared_bottom",
            {},
            r"parallel_size=4 needs experts, and model\.name=shared_bottom has none; set",
        ),
    ],
)
def test_configurations_are_refused_before_anything_runs(name: str, sections: dict[str, Any], sentence: str) -> None:
    columns, targets = {"user": {"type": "categorical"}}, {target: {"type": "binary"} for target in TARGETS}
    data = {"name": "table", "files": "rows.csv", "columns": columns, "targets": targets}
    groups = {"groups": GROUPS} if name == "home" else {}
    model = {"name": name} | groups | sections.get("model", {})
    content = {"parallel": {"expert_parallel_size": 4}} | sections | {"data": data, "model": model}
    with pytest.raises(UserError, match=sentence):
        validate_config(content).check(4)


def test_experts_that_cannot_take_the_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.experts\.name=conv: rows of 8 numbers are no square image"):
        small_model("mmoe", experts={"name": "conv"})
    with pytest.raises(ValueError, match="at least one column"):
        small_model("mmoe", features=TableFeatures(()))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "features", [TableFeatures((5,)), TableFeatures((), 2), TableFeatures((), 0, ((6, 2),))], ids=str
)
def test_columns_of_one_kind_and_no_rows(name: str, features: TableFeatures) -> None:
    model = small_model(name, features=features)
    assert all(parameter.numel() for parameter in model.parameters())
    rows = (
        torch.zeros(0, len(features.sizes)).long(),
        torch.zeros(0, features.numeric),
        torch.zeros(0, 2 * len(features.lists)).long(),
    )
    output = model(*rows)
    assert [prediction.shape for prediction in output.predictions] == [(0,)] * 3
    sum(prediction.sum() for prediction in output.predictions).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_gates_that_route_by_identity_see_the_first_column() -> None:
    model = MODELS.by_name["home"].model_validate(SMALL["home"] | {"gate": "hash"})
    run = RunShape(SingleWorld(), 9, GateContext(id_counts=torch.ones(5, dtype=torch.int64)))
    built = model.build(features=FEATURES, targets=TARGETS, run=run)
    batch = batch_of(20)
    route = built(*batch).layers[0].routes[0]
    own = route.slot_N == 2
    gate = built.levels[0].gates[0]
    expected_B = gate.expert_A[gate.main.table[batch[0][:, 0]]]
    chosen = {(int(b), int(e)) for b, e in zip(route.token_N[~own], route.slot_N[~own], strict=True)}
    assert chosen == {(b, int(e)) for b, e in enumerate(expected_B) if e != 2}
