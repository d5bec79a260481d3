"""A layer notices wrappers and broadcasts that overwrite, shard or average split experts, and nothing else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from dist_moe import MoE
from dist_moe.experts import FeedForwardBank
from dist_moe.gates import TopK
from dist_moe.integrations.data_parallel import prepare_for_ddp
from dist_moe.integrations.deepspeed import import_deepspeed
from dist_moe.parallel import ExchangeOptions, SingleWorld, World, experts_of_rank
from tests.helpers.pool import on_ranks
from tests.helpers.worlds import emulate
from tests.integrations.steps import WIDTH, Model, Numbers, build, expert_world, plain_group, tokens

REMEDY = {
    "DistributedDataParallel": "wrap_ddp",
    "FSDP": "fully_shard_dense",
    "deepspeed.initialize": "dist_moe.integrations.deepspeed.initialize",
}


def wrapped_unprepared(wrapper: str, changed_before: bool) -> str:
    """The message of the first step of a script that does not know of experts."""
    with plain_group():
        model = build(expert_world(2))
        if changed_before:  # differently on each rank, but no rank has what it was dealt
            for parameter in model.parameters():
                nn.init.normal_(parameter)
        try:
            if wrapper == "DistributedDataParallel":
                DistributedDataParallel(model)(tokens(0, 0, 2))
            elif wrapper == "FSDP":
                fully_shard(model)(tokens(0, 0, 2))
            elif wrapper == "FullyShardedDataParallel":
                FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))(tokens(0, 0, 2))
            else:
                section = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {}}}
                import_deepspeed().initialize(model=model.float(), config=section)
        except RuntimeError as error:
            return str(error)
        return "nothing was noticed"


@pytest.mark.parametrize("changed_before", [False, True])
@pytest.mark.parametrize("wrapper", [*REMEDY, "FullyShardedDataParallel"])
def test_a_wrapper_that_knows_nothing_of_experts_is_refused_on_all_ranks(wrapper: str, changed_before: bool) -> None:
    for message in on_ranks(2, wrapped_unprepared, wrapper, changed_before):
        assert message.startswith("MoE")
        name = "FSDP" if wrapper == "FullyShardedDataParallel" else wrapper
        assert name in message
        assert REMEDY[name] in message


def gradients_of_a_layer() -> Numbers:
    """Those of a layer that is itself what DDP wraps, without any preparation."""
    with plain_group():
        layer = build(expert_world(2)).blocks[0].moe
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        ddp = DistributedDataParallel(layer)
        assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())
        ddp(tokens(0, layer.world.rank, 2)).outputs[0].square().mean().backward()
        return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def test_a_layer_by_itself_is_right_in_ddp() -> None:
    by_rank = on_ranks(2, gradients_of_a_layer)
    layer = build(SingleWorld()).blocks[0].moe
    torch.stack([layer(tokens(0, rank, 2)).outputs[0].square().mean() for rank in range(2)]).mean().backward()
    for name, parameter in layer.named_parameters():
        shares = [grads[name] for grads in by_rank]
        found = torch.cat(shares) if "experts" in name else shares[0]
        torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-14)


def copies_of_experts_that_no_one_averages() -> str:
    with plain_group():
        model = build(expert_world(2))
        try:
            DistributedDataParallel(prepare_for_ddp(model))(tokens(0, 0, 4))
        except RuntimeError as error:
            return str(error)
        return "nothing was noticed"


@pytest.mark.slow
def test_copies_of_experts_want_averaging() -> None:
    for message in on_ranks(4, copies_of_experts_that_no_one_averages):
        assert "copies" in message
        assert "wrap_ddp" in message


def layer_of(world: World, experts_per_rank: int = 2) -> MoE:
    torch.manual_seed(3)
    experts = experts_per_rank * world.size
    bank = FeedForwardBank(WIDTH, 5, experts, experts_of_rank(experts, world), bias=True)
    return MoE(TopK(WIDTH, experts, k=2), bank, world=world)


def broadcast(layer: MoE, only: str = "") -> None:
    """What a script does to keep ranks alike."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if only in name:
                parameter.data.copy_(layer.world.broadcast(parameter))


def forward(layer: MoE) -> None:
    layer(torch.randn(7, WIDTH))


def train_then(change: Callable[[MoE], None]) -> Callable[[MoE], None]:
    def both(layer: MoE) -> None:
        layer.eval()
        forward(layer)
        layer.train()
        change(layer)

    return both


def load_on_rank_zero_and_broadcast(layer: MoE) -> None:
    if layer.world.rank == 0:
        layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})
    broadcast(layer)


OVERWRITTEN: dict[str, Callable[[MoE], None]] = {
    "broadcast": broadcast,
    "one parameter": lambda layer: broadcast(layer, only="experts.down"),
    "loaded on rank 0 only": load_on_rank_zero_and_broadcast,
    "after an evaluation": train_then(broadcast),
    "after a cast": lambda layer: broadcast(layer.double().float()),
    "of a copy": lambda layer: broadcast(layer),
}


@pytest.mark.parametrize(("experts_per_rank", "chunks"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("how", OVERWRITTEN)
def test_overwritten_experts_are_an_error_on_all_ranks(how: str, experts_per_rank: int, chunks: int) -> None:
    def message(world: World) -> str:
        layer = layer_of(world, experts_per_rank)
        if how == "of a copy":
            layer = copy.deepcopy(layer)
        OVERWRITTEN[how](layer)
        with pytest.raises(RuntimeError, match="overwritten") as raised:
            forward(layer)
        return str(raised.value)

    messages = emulate(3, message, options=ExchangeOptions(overlap_chunks=chunks))
    assert len(set(messages)) == 1
    assert "rank(s) [1, 2]" in messages[0]
    assert "of rank 0" in messages[0]


@torch.no_grad()
def initialise_alike(layer: MoE) -> None:
    torch.manual_seed(8)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)


@torch.no_grad()
def fill(layer: MoE, value: float) -> None:
    for parameter in layer.experts.parameters():
        parameter.fill_(value)


@torch.no_grad()
def up_cycle(layer: MoE) -> None:
    """Every expert becomes the same dense network."""
    torch.manual_seed(4)
    for parameter in layer.experts.parameters():
        parameter.copy_(torch.randn(parameter.shape[1:]).expand_as(parameter))


def load_up_cycled(layer: MoE) -> None:
    other = copy.deepcopy(layer)
    up_cycle(other)
    layer.load_state_dict(other.state_dict())


def step_of_sgd(layer: MoE) -> None:
    layer(torch.randn(7, WIDTH)).outputs[0].square().mean().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def by_way_of_meta(layer: MoE) -> None:
    layer.to("meta")
    layer.to_empty(device="cpu")
    initialise_alike(layer)


LEGITIMATE: dict[str, Callable[[MoE], None]] = {
    "nothing": lambda layer: None,
    "the same seed": initialise_alike,
    "zeros": lambda layer: fill(layer, 0.0),
    "ones": lambda layer: fill(layer, 1.0),
    "up-cycled": up_cycle,
    "up-cycled and loaded": load_up_cycled,
    "loaded as it is": lambda layer: layer.load_state_dict(layer.state_dict()) and None,
    "assigned": lambda layer: layer.load_state_dict(layer.state_dict(), assign=True) and None,
    "cast": lambda layer: layer.bfloat16().float() and None,
    "meta": by_way_of_meta,
    "dense ones broadcast": lambda layer: broadcast(layer, only="gates"),
    "trained": step_of_sgd,
}


@pytest.mark.parametrize("experts_per_rank", [1, 2])
@pytest.mark.parametrize("how", LEGITIMATE)
def test_what_a_user_sets_is_no_error(how: str, experts_per_rank: int) -> None:
    def runs(world: World) -> None:
        layer = layer_of(world, experts_per_rank)
        LEGITIMATE[how](layer)
        forward(layer)

    emulate(3, runs)


def test_it_is_looked_at_once_in_training_and_once_in_evaluation() -> None:
    def looks(world: World) -> int:
        layer, count, gather = layer_of(world), [0], world.gather

        def counted(x: Tensor) -> list[Tensor]:
            count[0] += 1
            return gather(x)

        world.gather = counted  # type: ignore[method-assign]
        for training in (False, True, True, False, True):
            forward(layer.train(training))
        return count[0]

    assert emulate(2, looks) == [2, 2]


def test_one_rank_has_plain_parameters() -> None:
    layer = layer_of(SingleWorld())
    assert layer.experts.group_name is None
    assert layer._ddp_params_and_buffers_to_ignore == set()
    assert not any(vars(parameter) for parameter in layer.parameters())


class SecondOfTwo(SingleWorld):
    """A rank that meets no other."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.rank = 2, 1


def plain(layer: MoE) -> MoE:
    return layer


SURVIVED: dict[str, Callable[[MoE], MoE]] = {
    "built": plain,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "to": lambda layer: layer.to(torch.float64),
    "to_empty": lambda layer: layer.to("meta").to_empty(device="cpu"),
    "load": lambda layer: (layer.load_state_dict(layer.state_dict()), layer)[1],
    "assign": lambda layer: (layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True), layer)[1],
    "inside another": lambda layer: nn.Sequential(layer).to("meta").to_empty(device="cpu")[0],
    "parametrized": lambda layer: (parametrize.register_parametrization(layer.experts, "up", nn.Identity()), layer)[1],
}


@pytest.mark.parametrize("how", SURVIVED)
def test_marks_outlast(how: str) -> None:
    layer = SURVIVED[how](layer_of(SecondOfTwo()))
    assert len(list(layer.experts.parameters())) == 4
    for parameter in layer.experts.parameters():
        marks: Any = parameter
        assert marks.allreduce is False
        assert marks.group_name == marks.ds_zero_partition_group_name == "ep_size_2"
        assert marks._ddp_ignored
    assert not any(hasattr(parameter, "allreduce") for parameter in layer.gates.parameters())
    names = {f"experts.{name}" for name, _ in layer.experts.named_parameters()}
    assert layer._ddp_params_and_buffers_to_ignore == names


def test_prepared_models_name_experts_and_what_they_ignored_before() -> None:
    def names(world: World) -> set[str]:
        model = Model(world)
        model._ddp_params_and_buffers_to_ignore = ["blocks.0.dense.bias"]
        return set(prepare_for_ddp(model)._ddp_params_and_buffers_to_ignore)

    experts = {
        f"blocks.{block}.moe.experts.{name}" for block in range(2) for name in ("up", "down", "up_bias", "down_bias")
    }
    assert emulate(2, names) == [experts | {"blocks.0.dense.bias"}] * 2
