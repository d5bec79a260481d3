"""Placement while training: measure the load, let rank 0 decide, move the experts."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from dist_moe.engine.callbacks import Callback
from dist_moe.engine.deepspeed.migration import migrate, state_bytes_per_expert
from dist_moe.engine.training import Trainer
from dist_moe.errors import UserError
from dist_moe.layer import MoE, MoEOutput
from dist_moe.parallel import Placement, sum_over_ranks
from dist_moe.routing import Pairs
from dist_moe.search import agree_on_placement
from dist_moe.search.placement_policy import MoveCosts, PlacementLook, PlacementScheduleConfig, over_layers, propose

_PASSES = 2
"""Forward and backward: in each, a row travels once with the width of the input and once with that of the result."""
_LOADS = TypeAdapter(list[list[list[Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]]]])
"""By step and layer: (E,) rows per expert, as checkpoints hold them."""


class PlacementCallback(Callback):
    """Moves experts between the ranks of a group, layer by layer, where the measured load says that it pays.

    The load is that of the recorded steps; what is known of it goes into checkpoints, so that a resumed run decides as
    the run would have that was not interrupted. Co-activations are counted in the step before each look, where a group
    has several nodes.
    """

    def __init__(self, config: PlacementScheduleConfig) -> None:
        self._config = config
        self._together: dict[str, _CoActivations] = {}
        self._loads: deque[list[list[float]]] = deque(maxlen=config.window)

    def on_start(self, trainer: Trainer) -> None:
        """Count co-activations of layers, where a group has several nodes.

        Raises UserError for loads, of a run that goes on, that are not of the model's layers.
        """
        experts = [layer.experts.num_experts for layer in trainer.model.moe_layers.values()]
        sizes = {tuple(map(len, load_LE)) for load_LE in self._loads} - {tuple(experts)}
        if sizes:
            raise UserError(
                f"callbacks.{self.name} of the checkpoint has loads of {list(min(sizes))} experts in the layers, which "
                f"have {experts}; use another checkpoint"
            )
        self._ranks_per_node = trainer.groups.ranks_per_node
        if self._ranks_per_node < trainer.groups.expert_parallel_size:
            self._together = {name: _CoActivations(layer) for name, layer in trainer.model.moe_layers.items()}

    def on_records(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        """Remember the load of the recorded steps."""
        self._loads.extend(record["load"] for record in records)

    def before_step(self, trainer: Trainer, step: int) -> None:
        """Begin to count co-activations in a step that a look follows."""
        if self._config.due(step + 1):
            for counter in self._together.values():
                counter.begin()

    def after_step(self, trainer: Trainer, step: int) -> None:
        """Look at every layer and move its experts, if that is due and pays."""
        if not self._config.due(step) or step == trainer.total_steps:
            return
        looks = [self._place(trainer, number, name, step) for number, name in enumerate(trainer.model.moe_layers)]
        if seen := [look for look in looks if look is not None]:
            trainer.monitor.metrics("placement", over_layers(seen), step)

    def on_end(self, trainer: Trainer) -> None:
        """Count no more."""
        for counter in self._together.values():
            counter.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the load that is known."""
        return {"loads": list(self._loads)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the load that was known. Raises ValueError if ``state`` is of another kind."""
        self._loads.extend(_LOADS.validate_python(state.get("loads")))

    def _place(self, trainer: Trainer, number: int, name: str, step: int) -> PlacementLook | None:
        """Look at the load of one layer, and move its experts if that pays. Rank 0 decides for all; its look."""
        layers = trainer.model.moe_layers
        layer = layers[name]
        together_EE = self._together[name].end() if name in self._together else None
        decides = trainer.groups.environment.is_rank_zero and bool(self._loads)
        wanted, look = self._look(trainer, number, layer, step, together_EE) if decides else (layer.placement, None)
        moved = migrate(trainer.engine, layer, agree_on_placement(wanted))
        if look is None:
            return None
        look = replace(look, moved=len(moved.experts), bytes=moved.bytes)
        if look.moved:
            trainer.monitor.say(f"{name}: {look.sentence(step)}" if len(layers) > 1 else look.sentence(step))
        return look

    def _look(
        self, trainer: Trainer, number: int, layer: MoE, step: int, together_EE: Tensor | None
    ) -> tuple[Placement, PlacementLook]:
        bank = layer.experts
        width = _PASSES * (bank.dim + bank.out_dim)
        costs = MoveCosts(
            row_bytes=width * next(bank.parameters()).element_size(),
            expert_bytes=state_bytes_per_expert(trainer.engine, layer),
            groups=trainer.groups.environment.world_size // layer.world.size,
            steps_left=trainer.total_steps - step,
        )
        return propose(
            self._config,
            [load_LE[number] for load_LE in self._loads],
            layer.placement,
            None if together_EE is None else together_EE.cpu().numpy(),
            self._ranks_per_node,
            costs,
        )


class _CoActivations:
    """Counts, on demand, the tokens of training steps that want two experts."""

    def __init__(self, layer: MoE) -> None:
        experts = layer.experts
        device = next(experts.parameters()).device
        self._count_EE = torch.zeros((experts.num_experts,) * 2, dtype=torch.float64, device=device)
        self._counting = False
        self._hook = layer.register_forward_hook(self._count)

    def remove(self) -> None:
        """Count no more."""
        self._hook.remove()

    def begin(self) -> None:
        """Start counting at 0."""
        self._count_EE.zero_()
        self._counting = True

    def end(self) -> Tensor:
        """(E, E) counts over all ranks, on every rank. Collective over all ranks."""
        self._counting = False
        return sum_over_ranks(self._count_EE)

    def _count(self, layer: nn.Module, _: Any, output: MoEOutput) -> None:
        if self._counting and layer.training:
            self._count_EE += co_activations(output.pairs)


def co_activations(pairs: Pairs) -> Tensor:
    """(E, E) fp64: how many tokens want both experts; on the diagonal, how many want the one."""
    wanted_TE = torch.zeros(
        pairs.num_tokens, len(pairs.rows_per_expert_E), dtype=torch.float64, device=pairs.token_N.device
    )
    wanted_TE[pairs.token_N, pairs.expert_N] = 1
    return wanted_TE.T @ wanted_TE
