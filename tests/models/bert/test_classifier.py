"""BERT with experts: the naive mixture in each layer, who is routed, tables of hashes, ranks, and sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dist_moe.errors import UserError
from dist_moe.gates import AdaMoEConfig, CometConfig, GateContext, HashRoutingConfig, TopKConfig
from dist_moe.models import BertClassifier, BertClassifierConfig, BertShape, RunShape
from dist_moe.models.bert.encoder import DenseFeedForward, ExpertFeedForward
from dist_moe.parallel import EmulatedWorld, SingleWorld, World
from dist_moe.search import PermutationSearchConfig
from tests.experts.naive_banks import naive_expert
from tests.helpers.berts import LENGTHS, NUM_LABELS, SHAPE, build, share_of, texts
from tests.helpers.oracle import assert_all_same, assert_same, gradients, naive_gate, naive_gradients
from tests.models.shares import joined

TOKENS = sum(LENGTHS)
GATES = [CometConfig(k=2, gamma=1.0), TopKConfig(k=1, scores="softmax_before"), HashRoutingConfig()]
FORMS = ["block", "network"]


def test_which_layers_have_experts() -> None:
    shape = BertShape(vocab=9, width=4, layers=5, heads=2, hidden=8, positions=4)
    for every, expected in {0: [], 1: [0, 1, 2, 3, 4], 2: [1, 3], 5: [4]}.items():
        model = build(moe_every=every, shape=shape)
        assert [layer for layer in range(5) if layer not in model.dense_layers()] == expected
        assert list(model.moe_layers) == [f"encoder.layers.{layer}.feed_forward.moe" for layer in expected]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_every_layer_is_the_naive_mixture_of_its_experts(gate: Any, form: str) -> None:
    model = build(gate=gate, expert_form=form)
    token_BS, length_B = texts((3, 1, 2))
    token_T = torch.cat([tokens[:length] for tokens, length in zip(token_BS, length_B, strict=True)])
    seen: list[tuple[ExpertFeedForward, Tensor, Tensor]] = []
    for layer in model.encoder.layers:
        layer.feed_forward.register_forward_hook(lambda block, args, result: seen.append((block, args[0], result[0])))
    output = model(token_BS, length_B)
    assert len(seen) == len(output.layers) == SHAPE.layers
    for block, x_TD, y_TD in seen:
        expected_TD = naive_block(block, x_TD, token_T)
        assert_same(y_TD, expected_TD)
        cotangent, leaves = torch.randn_like(y_TD), {"x": x_TD} | dict(block.named_parameters())
        actual = naive_gradients((y_TD * cotangent).sum(), leaves)
        assert_all_same(actual, naive_gradients((expected_TD * cotangent).sum(), leaves))
        assert actual["moe.experts.down"].any()


def naive_block(block: ExpertFeedForward, x_TD: Tensor, token_T: Tensor) -> Tensor:
    bank = block.moe.experts
    mixture_TE, _ = naive_gate(block.moe.gates[0], x_TD, token_T)
    rows = [
        sum(g * naive_expert(bank, e, x) for e, g in enumerate(g_E)) for g_E, x in zip(mixture_TE, x_TD, strict=True)
    ]
    mixed_TD = torch.stack(rows)
    if block.norm is None:
        return mixed_TD
    sum_TD = x_TD + mixed_TD
    centred = sum_TD - sum_TD.mean(1, keepdim=True)
    return (
        centred / (centred.square().mean(1, keepdim=True) + SHAPE.norm_eps).sqrt() * block.norm.weight + block.norm.bias
    )


def test_padding_is_not_routed_nor_counted() -> None:
    model = build(gate=CometConfig(k=2, gamma=0.1, entropy_weight=1.0))
    token_BS, length_B = texts()
    narrow = model(token_BS, length_B)
    wide = model(torch.nn.functional.pad(token_BS, (0, 3)), length_B)
    for output in (narrow, wide):
        assert [layer.routes[0].num_tokens for layer in output.layers] == [TOKENS] * SHAPE.layers
        assert [layer.pairs.num_tokens for layer in output.layers] == [TOKENS] * SHAPE.layers
    assert_all_same(wide.aux, narrow.aux, 1e-13)
    assert_same(wide.predictions[0], narrow.predictions[0], 1e-13)


def test_a_token_goes_to_the_expert_of_its_id_in_every_batch() -> None:
    model = build(gate=HashRoutingConfig(seed=2))
    experts_of: dict[tuple[int, int], set[int]] = {}
    for seed in range(3):
        token_BS, length_B = (x[seed:] for x in texts(seed=seed))
        token_T = torch.cat([tokens[:length] for tokens, length in zip(token_BS, length_B, strict=True)])
        for number, layer in enumerate(model(token_BS, length_B).layers):
            for token, expert in zip(token_T.tolist(), layer.routes[0].slot_N.tolist(), strict=True):
                experts_of.setdefault((number, token), set()).add(expert)
    assert len(experts_of) > SHAPE.layers * 20
    assert all(len(experts) == 1 for experts in experts_of.values())


def test_hash_tables_differ_between_layers_and_are_in_the_checkpoint() -> None:
    model, other = build(gate=HashRoutingConfig(seed=2)), build(gate=HashRoutingConfig(seed=3))
    tables = [layer.gates[0].table for layer in model.moe_layers.values()]
    assert all(not torch.equal(tables[i], tables[j]) for i in range(SHAPE.layers) for j in range(i))
    inputs = texts()
    assert not torch.equal(other(*inputs).predictions[0], model(*inputs).predictions[0])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*inputs).predictions[0], model(*inputs).predictions[0])


def run_of_rank(whole: BertClassifier, world: World, options: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    share = share_of(whole, world, **options)
    rows = slice(0, 1) if world.rank == 0 else slice(1, None)
    token_BS, length_B = texts()
    output = share(token_BS[rows], length_B[rows])
    loss = (output.predictions[0] * cotangent()[rows]).sum()
    return output, gradients(loss, dict(share.named_parameters()))


def cotangent() -> Tensor:
    return torch.linspace(-1, 1, len(LENGTHS) * NUM_LABELS, dtype=torch.float64).view(len(LENGTHS), NUM_LABELS).sin()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_two_ranks_equal_one_process(gate: Any, form: str) -> None:
    options = {"gate": gate, "expert_form": form}
    whole = build(**options)
    results = EmulatedWorld(2).run(lambda world: run_of_rank(whole, world, options))
    output = whole(*texts())
    assert_same(torch.cat([result.predictions[0] for result, _ in results]), output.predictions[0])
    for layer, *of_ranks in zip(output.layers, *(result.layers for result, _ in results), strict=True):
        slots = torch.cat([mine.routes[0].slot_N for mine in of_ranks])
        assert torch.equal(slots, layer.routes[0].slot_N)
    expected = gradients((output.predictions[0] * cotangent()).sum(), dict(whole.named_parameters()))
    assert_all_same(joined([grads for _, grads in results]), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [(), (1,), LENGTHS], ids=str)
def test_every_parameter_has_a_gradient_for_any_batch(lengths: tuple[int, ...], form: str) -> None:
    model = build(gate=TopKConfig(k=2), expert_form=form, permutation=PermutationSearchConfig(epochs=1), dropout=0.1)
    model.begin_step(0)
    output = model(*texts(lengths))
    torch.stack([output.predictions[0].sum(), *output.aux.values()]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_auxiliary_losses_are_summed_over_layers() -> None:
    model = build(gate=CometConfig(k=2, gamma=0.1, entropy_weight=1.0))
    output = model(*texts())
    entropies = [layer.aux["entropy"] for layer in output.layers]
    assert_same(output.aux["entropy"], sum(entropies, torch.zeros((), dtype=torch.float64)))
    assert len({entropy.item() for entropy in entropies}) == SHAPE.layers


@pytest.mark.parametrize("form", FORMS)
def test_effective_parameters_of_bert_base_are_66_millions(form: str) -> None:
    config = BertClassifierConfig(gate=HashRoutingConfig(), expert_form=form)
    counts_V = torch.ones(BertShape().vocab, dtype=torch.int64)
    with torch.device("meta"):
        run = RunShape(SingleWorld(), 1, GateContext(counts_V))
        model = config.build(BertShape(), 2, run)
        teacher = BertClassifierConfig(moe_every=0).build(BertShape(), 2, run)
    width, experts = 768, 12 * 4
    embeddings = (30_522 + 512 + 2) * width + 2 * width
    attention = 12 * (4 * (width * width + width) + 2 * width)
    network = 2 * width * 768 + 768 + width
    norms = 2 * width
    heads = width * width + width + 2 * width + 2
    assert teacher.num_parameters() == embeddings + attention + 12 * (2 * width * 3072 + 3072 + width + norms) + heads
    assert teacher.num_parameters() == sum(p.numel() for p in teacher.parameters()) == 109_483_778
    once, each = (0, norms) if form == "block" else (norms, 0)
    assert model.num_parameters() == embeddings + attention + 12 * once + experts * (network + each) + heads
    assert model.num_parameters(1) == embeddings + attention + 12 * (network + norms) + heads
    assert round((model.num_parameters(1) - heads) / 1e6) == 66


def test_width_of_experts() -> None:
    experts = [layer.experts.up.shape for layer in build(num_experts=8).moe_layers.values()]
    assert experts == [(8, 12, 2)] * 3
    assert build(expert_hidden=7).moe_layers["encoder.layers.0.feed_forward.moe"].experts.up.shape == (4, 12, 7)
    mixed = build(moe_every=2, hidden=9)
    assert isinstance(mixed.encoder.layers[0].feed_forward, DenseFeedForward)
    assert mixed.encoder.layers[0].feed_forward.up.out_features == 9
    assert mixed.moe_layers["encoder.layers.1.feed_forward.moe"].experts.up.shape == (4, 12, 4)
    with pytest.raises(UserError, match=r"model\.num_experts=3: the feed-forward width 16 cannot be divided"):
        build(num_experts=3)
    with pytest.raises(UserError, match=r"model\.moe_every=4 exceeds layers=3; .*encoder"):
        build(moe_every=4)


def test_null_slots_need_a_residual_around_the_experts() -> None:
    with pytest.raises(ValidationError, match=r"gate\.null_slots=2: a token without experts.*use expert_form=network"):
        BertClassifierConfig(gate=AdaMoEConfig(null_slots=2))
    gate = AdaMoEConfig(k=1, null_slots=3)
    model = build(gate=gate, expert_form="network")
    seen: list[tuple[Tensor, Tensor]] = []
    block = model.encoder.layers[0].feed_forward
    block.register_forward_hook(lambda _block, args, result: seen.append((args[0], result[0])))
    route = model(*texts()).layers[0].routes[0]
    alone_T = ~torch.isin(torch.arange(TOKENS), route.token_N)
    assert 0 < alone_T.sum() < TOKENS
    x_TD, y_TD = seen[0]
    assert_same(y_TD[alone_T], block.norm(x_TD[alone_T]))


def test_configuration_survives_a_round_trip() -> None:
    config = BertClassifierConfig(num_experts=8, gate=TopKConfig(k=3), expert_form="network", moe_every=2, hidden=64)
    assert BertClassifierConfig(**config.model_dump(mode="json")) == config
