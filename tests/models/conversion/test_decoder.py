"""Up-cycled decoders: where all experts weigh alike they are the dense model, and every gate starts from the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.engine.checkpoint import ROUTERS, place_weights
from dist_moe.errors import UserError
from dist_moe.gates import CometConfig, GateConfig, HashRoutingConfig, SoftmaxConfig, TopKConfig
from dist_moe.models import Transformer
from dist_moe.models.conversion import DecoderConversionConfig, convert_decoder
from tests.helpers.transformers import SMALL, make_transformer, random_tokens

DENSE: dict[str, Any] = {"moe_every": 0, "dense_hidden": 12, "layers": 3}
EXPERTS = SMALL["num_experts"]
SPLIT = DecoderConversionConfig(method="split")


def dense() -> Transformer:
    return make_transformer(**DENSE).double()


def upcycled(conversion: DecoderConversionConfig, gate: GateConfig, **options: Any) -> Transformer:
    width = 12 // (EXPERTS if conversion.method == "split" else 1)
    model = make_transformer(**(DENSE | {"moe_every": 2, "expert_hidden": width, "gate": gate} | options)).double()
    source = dense()
    weights = convert_decoder(dict(source.named_parameters()), source.config, model.config, conversion)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(part in name for part in ROUTERS):
                parameter.fill_(float("nan"))
    place_weights(model, weights, ROUTERS)
    return model


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model(random_tokens(3, 9)).predictions[0]


def make_uniform(model: Transformer) -> None:
    for layer in model.moe_layers.values():
        for parameter in layer.gates.parameters():
            nn.init.zeros_(parameter)


@pytest.mark.parametrize("gate", [SoftmaxConfig(), TopKConfig(k=2), HashRoutingConfig(), CometConfig(k=2)])
@pytest.mark.parametrize("moe_every", [1, 2, 3])
def test_copies_without_noise_are_the_dense_model_whatever_the_gate_says(gate: GateConfig, moe_every: int) -> None:
    model = upcycled(DecoderConversionConfig(), gate, moe_every=moe_every)
    torch.testing.assert_close(logits(model), logits(dense()), rtol=0, atol=1e-10)


def test_noise_makes_experts_and_layers_differ_and_is_drawn_from_its_seed() -> None:
    noisy = DecoderConversionConfig(noise=0.1)
    gate = TopKConfig(k=2)
    bank = upcycled(noisy, gate, moe_every=1).moe_layers["layers.0.moe"].experts
    noise = bank.up - bank.up.mean(0)
    spread = dense().layers[0].dense.up.weight.std().item()
    assert noise.std().item() == pytest.approx(0.1 * spread, rel=0.15)
    assert not torch.equal(bank.up[0], bank.up[1])
    first, again = (upcycled(noisy, gate, moe_every=1) for _ in range(2))
    other = upcycled(DecoderConversionConfig(noise=0.1, seed=1), gate, moe_every=1)
    assert logits(first).equal(logits(again))
    assert not logits(first).equal(logits(other))
    assert (logits(first) - logits(dense())).abs().max() > 1e-3


def test_a_split_is_the_dense_model_where_all_weights_are_alike() -> None:
    model = upcycled(SPLIT, SoftmaxConfig())
    assert (logits(model) - logits(dense())).abs().max() > 1e-2
    make_uniform(model)
    torch.testing.assert_close(logits(model), logits(dense()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("conversion", [SPLIT, DecoderConversionConfig(noise=0.2)])
def test_gates_differ_alone(conversion: DecoderConversionConfig) -> None:
    one, other = upcycled(conversion, TopKConfig(k=1)), upcycled(conversion, CometConfig(k=2))
    same = dict(one.named_parameters())
    for name, parameter in other.named_parameters():
        if not any(part in name for part in ROUTERS):
            assert torch.equal(parameter, same[name]), name


@pytest.mark.parametrize(
    ("conversion", "options", "message"),
    [
        (DecoderConversionConfig(), {"expert_hidden": 5}, "experts of width 12, model.expert_hidden=5 says otherwise"),
        (SPLIT, {"expert_hidden": 12}, "use model.expert_hidden=3"),
        (SPLIT, {"num_experts": 5, "expert_hidden": 2}, "num_experts=5 does not divide the feed-forward width 12"),
        (DecoderConversionConfig(), {"shared_hidden": 3}, "model.shared_hidden=3"),
        (DecoderConversionConfig(), {"dim": 16}, "model.dim=16, but the dense model has 8"),
        (DecoderConversionConfig(), {"kv_heads": 4}, "model.kv_heads=4, but the dense model has 2"),
        (DecoderConversionConfig(), {"rope_theta": 99.0}, r"model.rope_theta=99.0, but the dense model has 10000\.0"),
    ],
)
def test_what_does_not_fit(conversion: DecoderConversionConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        upcycled(conversion, SoftmaxConfig(), **options)


def test_experts_are_not_converted_again() -> None:
    source = make_transformer(moe_every=1)
    with pytest.raises(UserError, match=r"model\.moe_every=1: only a dense model can be converted"):
        convert_decoder(dict(source.named_parameters()), source.config, source.config, SPLIT)
