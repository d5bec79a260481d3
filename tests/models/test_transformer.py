"""The decoder against loops, its order in time, its shapes; and that a rank's share is that of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.gates import (
    GATES,
    AdaMoEConfig,
    CometConfig,
    HashRoutingConfig,
    ReLUConfig,
    SMoEDropoutConfig,
    TopKConfig,
)
from dist_moe.models import RunShape, Transformer, TransformerConfig
from dist_moe.parallel import EmulatedWorld, SingleWorld, World
from dist_moe.search import PermutationSearchConfig, SlotTable
from tests.helpers.oracle import assert_all_same, assert_same
from tests.helpers.transformers import EACH_GATE, VOCABULARY, make_transformer, naive_transformer, random_tokens
from tests.models.shares import assert_shares, joined

TOP_K = TopKConfig(k=2, balance_weight=0.1, z_loss_weight=0.01)
CASES: dict[str, dict[str, Any]] = {
    "dense": {"moe_every": 0},
    "dense, one key head": {"moe_every": 0, "kv_heads": 1, "tied_embeddings": False, "rope_theta": 7.0},
    "comet": {"gate": CometConfig(k=2, gamma=1.0, entropy_weight=0.1), "kv_heads": None},
    "comet+": {"gate": CometConfig(k=2, gamma=1.0), "permutation": PermutationSearchConfig(epochs=1)},
    "top_k everywhere": {"gate": TOP_K, "moe_every": 1, "tied_embeddings": False},
    "shared expert": {"gate": TOP_K, "shared_hidden": 3},
    "gated shared expert": {"gate": TOP_K, "shared_hidden": 3, "shared_gate": True},
    "queries and keys normalised": {"gate": TOP_K, "qk_norm": "all"},
    "heads normalised, of a width of their own": {"gate": TOP_K, "qk_norm": "head", "head_dim": 6},
    "biases, wide heads, dense": {"moe_every": 0, "qkv_bias": True, "head_dim": 4},
    "every second of three": {"gate": TOP_K, "layers": 3},
    "merged and pruned": {"gate": TOP_K, "layers": 4, "experts_by_layer": (2, 4), "slot_masks": True},
    "ada_moe": {"gate": AdaMoEConfig(k=2, null_slots=3, balance_weight=0.1)},
    "hash": {"gate": HashRoutingConfig(assignment="balanced")},
    "relu": {"gate": ReLUConfig(k=2, l1_weight=0.1)},
    "smoe_dropout": {"gate": SMoEDropoutConfig(k_min=1, k_max=4)},
}


def gradients(model: Transformer, logits: Tensor, aux: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a random function of the logits plus the auxiliary losses, for every parameter."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    total = (logits * weight).sum() + sum(aux.values())
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_naive_model(case: str) -> None:
    model = make_transformer(**CASES[case]).double()
    model.begin_step(3)
    token_BS = random_tokens(2, 4)
    output = model(token_BS)
    logits, aux = naive_transformer(model, token_BS)
    assert logits.shape == (2, 4, VOCABULARY)
    assert_same(output.predictions[0], logits)
    assert_all_same(output.aux, aux)
    assert_all_same(gradients(model, output.predictions[0], output.aux), gradients(model, logits, aux))


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_learns_something(case: str) -> None:
    model = make_transformer(**CASES[case])
    model.begin_step(9)
    output = model(random_tokens(6, 9))
    for name, gradient in gradients(model, output.predictions[0], output.aux).items():
        rows = gradient if ".experts." in name else [gradient]
        assert all(row.any() for row in rows), name


def test_every_registered_gate_is_tried() -> None:
    ours = {name for name, settings in GATES.by_name.items() if settings.__module__.startswith("dist_moe.")}
    assert ours == EACH_GATE.keys()


@pytest.mark.parametrize("gate", EACH_GATE)
def test_no_logit_knows_a_later_token(gate: str) -> None:
    model = make_transformer(gate=EACH_GATE[gate], moe_every=1).double().eval()
    token_BS = random_tokens(2, 7)
    before = model(token_BS).predictions[0]
    for position in range(7):
        changed_BS = token_BS.clone()
        changed_BS[:, position] = (changed_BS[:, position] + 1) % VOCABULARY
        after = model(changed_BS).predictions[0]
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-12)
        assert (after[:, position:] - before[:, position:]).abs().amax(dim=-1).gt(1e-6).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1)])
def test_batches_without_sequences_and_of_one_token(case: str, shape: tuple[int, int]) -> None:
    model = make_transformer(**CASES[case])
    model.begin_step(0)
    output = model(random_tokens(*shape))
    assert output.predictions[0].shape == (*shape, VOCABULARY)
    assert len(output.layers) == model.config.num_moe_layers == len(model.moe_layers)
    torch.stack([output.predictions[0].sum(), *output.aux.values()]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_which_layers_are_mixtures() -> None:
    for every, names in [(0, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2]), (5, [4])]:
        model = make_transformer(layers=5, moe_every=every)
        assert list(model.moe_layers) == list(model.tables) == [f"layers.{i}.moe" for i in names]


def test_gates_that_route_by_identity_see_the_tokens() -> None:
    model = make_transformer(gate=HashRoutingConfig())
    token_BS = random_tokens(2, 6)
    (route,) = model(token_BS).layers[0].routes
    assert torch.equal(route.slot_N, model.moe_layers["layers.1.moe"].gates[0].table[token_BS.flatten()])


def test_hashing_draws_another_table_in_each_layer() -> None:
    model = make_transformer(gate=HashRoutingConfig(assignment="random"), moe_every=1)
    one, other = (layer.gates[0].table for layer in model.moe_layers.values())
    assert not torch.equal(one, other)


def test_tied_embeddings_are_one_matrix() -> None:
    tied, untied = make_transformer(), make_transformer(tied_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    counts = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert counts[1] - counts[0] == VOCABULARY * 8


def test_initial_deviations() -> None:
    torch.manual_seed(0)
    sizes = {"layers": 8, "dim": 64, "experts": {"hidden": 256}, "dense_hidden": 256, "tied_embeddings": False}
    config = TransformerConfig(gate=TOP_K, shared_hidden=256, **sizes)
    model = config.build(500, RunShape(SingleWorld(), 10))
    for name, parameter in model.named_parameters():
        if ".gates." in name or "norm" in name:
            continue
        into_residual = name.endswith((".out.weight", ".down.weight", ".down"))
        assert parameter.std().item() == pytest.approx(0.005 if into_residual else 0.02, rel=0.05), name
        assert abs(parameter.mean().item()) < 1e-3, name


def test_share_of_every_rank_is_that_of_one_process() -> None:
    options = {"moe_every": 1, "shared_hidden": 3}
    assert_shares(EmulatedWorld(2).run(lambda world: make_transformer(world, **options)), make_transformer(**options))


@pytest.mark.parametrize("gate", ["ada_moe", "comet", "hash", "top_k"])
def test_two_ranks_compute_what_one_does(gate: str) -> None:
    """Each has half of the sequences and half of the experts."""
    options: dict[str, Any] = {"gate": EACH_GATE[gate], "moe_every": 1}
    token_BS = random_tokens(4, 6)
    whole = make_transformer(**options).double()
    output = whole(token_BS)
    expected = gradients(whole, output.predictions[0], {})

    def on_rank(world: World) -> tuple[Tensor, dict[str, Tensor]]:
        model = make_transformer(world, **options).double()
        mine = slice(2 * world.rank, 2 * world.rank + 2)
        logits = model(token_BS[mine]).predictions[0]
        weight = torch.randn(4, 6, VOCABULARY, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        (logits * weight[mine]).sum().backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    shares = EmulatedWorld(2).run(on_rank)
    assert_same(torch.cat([logits for logits, _ in shares]), output.predictions[0].detach())
    assert_all_same(joined([found for _, found in shares]), expected)


def test_layers_have_tables_of_their_own() -> None:
    model = make_transformer(moe_every=1, gate=TOP_K).eval()
    token_BS = random_tokens(2, 6)
    before = model(token_BS).layers
    table = model.tables["layers.1.moe"]
    assert isinstance(table, SlotTable)
    table.table.copy_(torch.tensor([1, 0, 2, 3]))
    after = model(token_BS).layers
    assert torch.equal(after[0].pairs.rows_per_expert_E, before[0].pairs.rows_per_expert_E)
    assert torch.equal(after[1].pairs.rows_per_expert_E, before[1].pairs.rows_per_expert_E[[1, 0, 2, 3]])


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"dim": 9}, "heads=4 does not divide dim=9"),
        ({"dim": 12}, "heads=4 leaves heads of width 3; allowed: an even width"),
        ({"head_dim": 3}, "head_dim=3; allowed: an even width"),
        (
            {"shared_gate": True},
            "shared_gate=true weighs a shared network, and there is none; set shared_hidden",
        ),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"moe_every": 3}, "moe_every=3 exceeds layers=2; allowed: 0 (dense) to 2"),
        ({"experts": {"name": "dense_relu"}}, "experts.units=256: the model needs results of width 8; use 8"),
    ],
)
def test_faults_of_a_configuration(options: dict[str, Any], fault: str) -> None:
    sizes = {"layers": 2, "dim": 8, "heads": 4}
    assert list(TransformerConfig(**(sizes | options)).validation_errors()) == [fault]
    assert list(TransformerConfig(**sizes).validation_errors()) == []


def test_hidden_states_are_the_embeddings_and_what_each_layer_gives() -> None:
    model, token_BS = make_transformer(), random_tokens(2, 5)
    output = model(token_BS, hidden_states=True)
    assert model(token_BS).hidden_states == ()
    assert output.hidden_states[0].equal(model.embedding(token_BS))
    assert len(output.hidden_states) == model.config.layers + 1
    assert output.predictions[0].equal(model.head(model.norm(output.hidden_states[-1])))
