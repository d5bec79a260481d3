"""A small model of dense and MoE layers, trained by SGD with momentum, decay and clipping: the numbers to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from dist_moe import MoE
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import store_of_this_attempt
from dist_moe.experts import FeedForwardBank
from dist_moe.gates import Comet, TopK
from dist_moe.integrations.deepspeed import import_deepspeed
from dist_moe.parallel import ExchangeOptions, ProcessWorld, SingleWorld, World, experts_of_rank

WIDTH, EXPERTS, TOKENS, STEPS = 6, 4, 24, 5
CLIPPING = 0.05
SGD = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
Numbers = dict[str, Tensor]


class Block(nn.Module):
    """Dense, then experts, with a residual connection; keeps the auxiliary loss of the last pass."""

    def __init__(self, gate: nn.Module, world: World, **of_layer: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        bank = FeedForwardBank(WIDTH, 5, EXPERTS, experts_of_rank(EXPERTS, world), bias=True)
        self.moe = MoE(gate, bank, world=world, **of_layer)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        out = self.moe(self.dense(x_TD).tanh())
        return x_TD + out.outputs[0], sum(out.aux.values(), start=x_TD.new_zeros(()))


class Model(nn.Module):
    """``reentrant``: blocks keep nothing for the backward pass, by the kind of checkpointing that runs them anew."""

    def __init__(self, world: World, reentrant: bool = False, **of_layer: Any) -> None:
        super().__init__()
        self.reentrant = reentrant
        gates = [Comet(WIDTH, EXPERTS, k=2, entropy_weight=0.1), TopK(WIDTH, EXPERTS, k=2)]
        self.blocks = nn.ModuleList(Block(gate, world, **of_layer) for gate in gates)

    def forward(self, x_TD: Tensor) -> Tensor:
        aux = x_TD.new_zeros(())
        for block in self.blocks:
            x_TD, block_aux = self._run(block, x_TD)
            aux = aux + block_aux
        return x_TD.square().mean() + aux

    def _run(self, block: nn.Module, x_TD: Tensor) -> Any:
        if not self.reentrant:
            return block(x_TD)
        return checkpoint(block, x_TD if x_TD.requires_grad else x_TD.requires_grad_(), use_reentrant=True)


def build(world: World, dtype: torch.dtype = torch.float64, **options: Any) -> Model:
    torch.manual_seed(5)
    return Model(world, **options).to(dtype)


def tokens(step: int, rank: int, ranks: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x_TD.chunk(ranks)[rank].to(dtype)


def one_process(shares: int, dtype: torch.dtype = torch.float64) -> tuple[Numbers, list[float]]:
    """Parameters and norms of plain torch: the loss is the mean over ``shares`` of the tokens."""
    model = build(SingleWorld(), dtype)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.stack([model(tokens(step, share, shares, dtype)) for share in range(shares)]).mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)))
        optimizer.step()
    return numbers(model), norms


def train(
    model: nn.Module, clip: Callable[[], Tensor], bare: nn.Module, micro_batches: int = 1
) -> tuple[Numbers, list[float]]:
    """Parameters and norms of the same steps on this rank's share of the tokens; DDP reduces in the last backward."""
    rank, shares = dist.get_rank(), dist.get_world_size() * micro_batches
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(micro_batches):
            last = micro == micro_batches - 1
            with nullcontext() if last else model.no_sync():  # type: ignore[operator]
                (model(tokens(step, rank * micro_batches + micro, shares)) / micro_batches).backward()
        norms.append(float(clip()))
        optimizer.step()
    return numbers(bare), norms


def numbers(model: nn.Module, values: Numbers | None = None) -> Numbers:
    """Return detached parameters, experts one by one: "NAME|EXPERT"."""
    banks = {f"blocks.{n}.moe.experts.": block.moe.experts for n, block in enumerate(model.blocks)}
    result = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach() if values is None else values[name]
        value = value.full_tensor() if isinstance(value, DTensor) else value
        bank = next((bank for prefix, bank in banks.items() if name.startswith(prefix)), None)
        if bank is None:
            result[name] = value.clone()
        else:
            result |= {f"{name}|{e}": row.clone() for e, row in zip(bank.expert_ids, value, strict=True)}
    return result


def assert_one_process(
    results: list[tuple[Numbers, list[float]]], tolerance: float, micro_batches: int = 1, **of_reference: Any
) -> None:
    """Every rank's dense parameters and experts are those of one process, to ``tolerance`` by absolute value."""
    wanted, norms = one_process(len(results) * micro_batches, **of_reference)
    assert all(norm > CLIPPING for norm in norms)
    found = {name for values, _ in results for name in values}
    assert found == set(wanted)
    for values, own_norms in results:
        assert max(abs(a - b) for a, b in zip(own_norms, norms, strict=True)) <= tolerance
        for name, value in values.items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@contextmanager
def plain_group() -> Iterator[None]:
    """A process group as any script opens it; it is closed through DeepSpeed, which may have added to it."""
    environment, timeout = LaunchEnvironment.read(), timedelta(seconds=60)
    store = store_of_this_attempt(environment, timeout)
    dist.init_process_group(
        "gloo", store=store, rank=environment.rank, world_size=environment.world_size, timeout=timeout
    )
    try:
        yield
    finally:
        deepspeeds = import_deepspeed().comm
        (deepspeeds if deepspeeds.is_initialized() else dist).destroy_process_group()


def expert_world(size: int, options: ExchangeOptions | None = None) -> ProcessWorld:
    """Return this rank's world of ``size`` neighbours. Collective over all ranks."""
    groups = [dist.new_group(range(start, start + size)) for start in range(0, dist.get_world_size(), size)]
    return ProcessWorld(groups[dist.get_rank() // size], options=options)
