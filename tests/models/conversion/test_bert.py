"""Dense BERT to BERT with experts: where it must be the dense model, and that all gates start alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.errors import UserError
from dist_moe.gates import CometConfig, HashRoutingConfig, SMoEDropoutConfig, SoftmaxConfig, TopKConfig
from dist_moe.models import BertClassifier, BertClassifierConfig, RunShape
from dist_moe.models.conversion import BertConversionConfig, convert_bert, partition, place_converted, ranked
from dist_moe.parallel import EmulatedWorld, SingleWorld, World
from tests.helpers.berts import SHAPE, build, dense, texts
from tests.helpers.oracle import assert_same
from tests.models.shares import assert_shares

GATES = [HashRoutingConfig(), TopKConfig(k=1), CometConfig(k=1), SoftmaxConfig()]
gates = pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)


def importance() -> Tensor:
    return torch.rand(SHAPE.layers, SHAPE.hidden, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def converted(
    teacher: BertClassifier, conversion: dict[str, Any], world: World | None = None, **options: Any
) -> BertClassifier:
    config = BertClassifierConfig(**options)
    weights = dict(teacher.named_parameters())
    made = convert_bert(weights, teacher.shape, config, BertConversionConfig(**conversion), importance())
    student = build(world, **options)
    place_converted(student, made)
    return student.eval()


def assert_same_function(student: BertClassifier, teacher: BertClassifier, tolerance: float) -> None:
    ours, theirs = (model.eval()(*texts(), hidden_states=True) for model in (student, teacher))
    assert_same(ours.predictions[0], theirs.predictions[0], tolerance)
    for ours_BSD, theirs_BSD in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_same(ours_BSD, theirs_BSD, tolerance)


@gates
@pytest.mark.parametrize("form", ["block", "network"])
def test_experts_with_all_neurons_are_the_dense_model(gate: Any, form: str) -> None:
    teacher, options = dense(), {"gate": gate, "expert_form": form, "expert_hidden": SHAPE.hidden}
    assert_same_function(converted(teacher, {"shared": SHAPE.hidden}, **options), teacher, 1e-12)
    assert_same_function(converted(teacher, {"method": "copies"}, **options), teacher, 1e-12)
    noisy = converted(teacher, {"method": "copies", "noise": 0.1}, **options)
    assert (noisy(*texts()).predictions[0] - teacher(*texts()).predictions[0]).abs().max() > 1e-3


def test_split_under_uniform_weights_is_the_dense_model() -> None:
    teacher = dense()
    options: dict[str, Any] = {"gate": SMoEDropoutConfig(), "expert_form": "network", "num_experts": 8}
    student = converted(teacher, {"method": "split"}, **options)
    for layer in student.moe_layers.values():
        torch.nn.init.zeros_(layer.gates[0].weight)
        torch.nn.init.zeros_(layer.gates[0].bias)
        layer.gates[0].evaluation_k = 8
    assert_same_function(student, teacher, 1e-12)


@gates
def test_partition_gives_each_expert_the_neurons_it_shall_have(gate: Any) -> None:
    teacher = dense()
    student = converted(teacher, {"shared": 2}, gate=gate)
    for number, layer in enumerate(student.moe_layers.values()):
        block = teacher.dense_layers()[number]
        neurons_EW = partition(ranked(importance()[number]), 4, 4, 2)
        bank = layer.experts
        for expert, neurons_W in enumerate(neurons_EW):
            assert torch.equal(bank.up[expert], block.up.weight[neurons_W].T)
            assert torch.equal(bank.up_bias[expert], block.up.bias[neurons_W])
            assert torch.equal(bank.down[expert], block.down.weight[:, neurons_W].T)
            assert torch.equal(bank.down_bias[expert], block.down.bias)
            assert torch.equal(bank.norm_weight[expert], block.norm.weight)
            assert torch.equal(bank.norm_bias[expert], block.norm.bias)


def test_all_gates_start_alike_and_keep_their_own_weights() -> None:
    teacher = dense()
    students = [converted(teacher, {}, gate=gate) for gate in GATES]
    names = {name for name, _ in students[0].named_parameters()}  # hashing has no parameters
    for student, gate in zip(students, GATES, strict=True):
        parameters = dict(student.named_parameters())
        assert all(torch.equal(parameters[name], students[0].get_parameter(name)) for name in names)
        rest = {name: value for name, value in parameters.items() if name not in names}
        drawn = dict(build(gate=gate).named_parameters())
        assert bool(rest) == (gate.name != "hash")
        assert all(".gates." in name and torch.equal(value, drawn[name]) for name, value in rest.items())


def test_a_plan_converts_too_and_holds_nothing() -> None:
    weights, config, scores = dict(dense().named_parameters()), BertClassifierConfig(), importance()
    expected = convert_bert(weights, SHAPE, config, BertConversionConfig(), scores)
    with torch.device("meta"):
        made = convert_bert(weights, SHAPE, config, BertConversionConfig(), scores)
        planned = config.build(SHAPE, 3, RunShape(SingleWorld(), 10))
        place_converted(planned, made)
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert all(parameter.is_meta for parameter in planned.parameters())


def test_every_rank_gets_its_experts() -> None:
    teacher, whole = dense(), converted(dense(), {})
    shares = EmulatedWorld(2).run(lambda world: converted(teacher, {}, world))
    assert_shares(shares, whole)


def test_a_narrower_dense_student_keeps_the_most_important_neurons() -> None:
    teacher = dense()
    student = converted(teacher, {}, moe_every=0, hidden=5)
    assert student.shape == replace(SHAPE, hidden=5)
    dropped = converted(teacher, {}, moe_every=0)
    assert_same_function(dropped, teacher, 1e-14)
    with torch.no_grad():
        for number, block in dropped.dense_layers().items():
            block.down.weight[:, ranked(importance()[number])[5:]] = 0
    assert_same_function(student, dropped, 1e-12)


def test_layers_between_those_with_experts_stay_as_they_are() -> None:
    teacher = dense()
    student = converted(teacher, {}, moe_every=2)
    assert list(student.dense_layers()) == [0, 2]
    for layer, block in student.dense_layers().items():
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, teacher.dense_layers()[layer].get_parameter(name))


def test_importance_comes_nearer_to_the_dense_model_than_its_inverse() -> None:
    teacher = dense()
    with torch.no_grad():  # few neurons matter
        for layer, block in teacher.dense_layers().items():
            block.down.weight.mul_(importance()[layer] ** 4)
    far = {}
    for order in ("importance", "random", "inverse"):
        student = converted(teacher, {"order": order}, gate=HashRoutingConfig())
        far[order] = (student(*texts()).predictions[0] - teacher(*texts()).predictions[0]).norm().item()
    assert far["importance"] < far["random"] < far["inverse"]


def test_layers_draw_their_own_orders() -> None:
    twins = dense()
    with torch.no_grad():
        first, *others = twins.dense_layers().values()
        for block in others:
            block.load_state_dict(first.state_dict())
    student = converted(twins, {"order": "random", "seed": 1})
    banks = [layer.experts.up for layer in student.moe_layers.values()]
    assert not any(torch.equal(banks[0], bank) for bank in banks[1:])


def test_a_checkpoint_without_classifier_leaves_that_as_it_is() -> None:
    weights = {n: p for n, p in dense().named_parameters() if not n.startswith("classifier")}
    made = convert_bert(weights, SHAPE, BertClassifierConfig(), BertConversionConfig(), importance())
    student = build()
    before = student.classifier.weight.clone()
    place_converted(student, made)
    assert torch.equal(student.classifier.weight, before)
    with pytest.raises(UserError, match=r"it has no pooler\.bias"):
        place_converted(student, {name: tensor for name, tensor in made.items() if name != "pooler.bias"})


@pytest.mark.parametrize(
    ("conversion", "options", "message"),
    [
        ({"method": "split"}, {}, "conversion.method=split: .* use model.expert_form=network"),
        ({"method": "copies"}, {}, "copies makes experts of width 16, .*use model.expert_hidden=16"),
        ({"method": "split"}, {"expert_form": "network", "expert_hidden": 5}, "split makes experts of width 4"),
        ({}, {"moe_every": 0, "hidden": 17}, "model.hidden=17 exceeds the dense model's 16"),
        ({"shared": 5}, {}, "shared=5 neurons do not fit experts of 4"),
        ({"shared": 1}, {"expert_hidden": 6}, "4 experts of 6 neurons, 1 of them shared, take 21 of 16"),
    ],
)
def test_what_does_not_fit_is_refused(conversion: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        converted(dense(), conversion, **options)


def test_importance_is_needed_unless_the_order_is_random() -> None:
    weights, config = dict(dense().named_parameters()), BertClassifierConfig()
    with pytest.raises(UserError, match=r"conversion\.order=importance needs the neurons' importances"):
        convert_bert(weights, SHAPE, config, BertConversionConfig())
    assert convert_bert(weights, SHAPE, config, BertConversionConfig(order="random"))
