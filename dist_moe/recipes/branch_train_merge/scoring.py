"""Log-probabilities that the models of a forest give the tokens of a text: all that an evaluation needs of them.

One model is in memory at a time; the next one's weights are copied into it. What it gives is kept, this rank's share of
each domain's sequences, so that every way of using the experts together costs no further forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_moe.data.batches import shard_batches
from dist_moe.data.text import TokenTable
from dist_moe.engine.checkpoint import ModelWeights, place_weights
from dist_moe.engine.deepspeed.config import cast_parameters
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.models import MoEModel
from dist_moe.parallel import current_world, gather_columns, sum_over_ranks
from dist_moe.recipes.branch_train_merge.forest import Forest
from dist_moe.recipes.branch_train_merge.posterior import History, PriorOptions, cached_prior
from dist_moe.recipes.branch_train_merge.training import ForestPlan
from dist_moe.recording import recording
from dist_moe.tasks import build_model
from dist_moe.tasks.language import LanguageModelTask
from dist_moe.tasks.language.task import EVAL_TOKENS, token_nats

_TEST, _PRIOR = "test", "val"
"""Parts of the data: what is evaluated, and what priors are estimated from."""


@dataclass(frozen=True)
class Pass:
    """A model's forward pass over the sequences of a domain: ``logp_NS``, log-probabilities of the targets of this
    rank's sequences, and ``flops_per_token``, of matrix products, by the experts per token as measured over all ranks.
    """

    logp_NS: Tensor
    flops_per_token: float


class Scorer:
    """Scores sequences by the models of ``forest``. Its methods are collective, alike on all ranks.

    ``model``: of the run, into which weights are copied. ``task``: that of the run, for which models are built.
    ``domains``: by name the tasks of their sequences. ``prior``: how cached priors are estimated. ``experts``: those
    that are used, all if None.
    """

    def __init__(
        self,
        model: MoEModel,
        task: LanguageModelTask,
        domains: Mapping[str, LanguageModelTask],
        forest: Forest,
        groups: ProcessGroups,
        prior: PriorOptions,
        experts: Sequence[str] | None = None,
    ) -> None:
        self.model, self.task, self.domains, self.forest, self.groups = model, task, dict(domains), forest, groups
        self.experts = tuple(forest.experts if experts is None else experts)
        self._prior = prior
        self._tables = {(_TEST, domain): task.data.test for domain, task in domains.items()}
        self._tables |= {(_PRIOR, domain): self._drawn(domain) for domain in domains}
        self._kept: dict[tuple[str, str, str], Pass] = {}
        self._priors: dict[tuple[str, History], Tensor] = {}
        self._placed: Hashable = None
        self._bytes: dict[str, int] = {}
        self._another: tuple[Hashable, MoEModel] | None = None

    def table(self, domain: str) -> TokenTable:
        """Return the sequences of a domain that are evaluated: those of the test part."""
        return self._tables[_TEST, domain]

    def bytes(self, domain: str) -> int:
        """Return the bytes of UTF-8 that the targets of a domain stand for, over all ranks."""
        if domain not in self._bytes:
            table = self.table(domain)
            batches = shard_batches(table, EVAL_TOKENS, rank=0, world_size=1)
            self._bytes[domain] = sum(int(table.batch(index_B, index_B).bytes_B.sum()) for index_B in batches)
        return self._bytes[domain]

    def tokens(self, domain: str) -> Tensor:
        """Return (N, S) the tokens of this rank's sequences of a domain: row n, place t stands before target t."""
        return torch.cat([batch.token_BS.cpu() for batch in self._batches(self.table(domain))])

    def place(self, key: Hashable, weights: Callable[[], ModelWeights]) -> None:
        """Copy weights into the model, unless those of the same ``key`` are in it already."""
        if self._placed != key:
            self._placed = None
            place_weights(self.model, weights())
            self._placed = key

    def another(self, key: Hashable, build: Callable[[], MoEModel]) -> MoEModel:
        """Return the model that ``build`` returns, built once as long as the ``key`` stays the same."""
        if self._another is None or self._another[0] != key:
            self._another = None
            self._another = (key, build())
        return self._another[1]

    def score(self, model: MoEModel, domain: str) -> Pass:
        """Return the pass of any model over the sequences of a domain."""
        return self._forward(model, self.table(domain))

    def passes(self, names: Sequence[str], domain: str) -> tuple[Tensor, list[float]]:
        """Return (J, N, S) log-probabilities of this rank's sequences of a domain, by each model, and their FLOPs."""
        found = [self._of_model(name, _TEST, domain) for name in names]
        return torch.stack([each.logp_NS for each in found]), [each.flops_per_token for each in found]

    def prior(self, domain: str, history: History) -> Tensor:
        """Return (J,) fp64, the cached prior of a domain, from sequences of the validation part; alike on all ranks."""
        key = (domain, history)
        if key not in self._priors:
            mine_JNS = torch.stack([self._of_model(name, _PRIOR, domain).logp_NS for name in self.experts])
            count, world = len(self._tables[_PRIOR, domain]), current_world()
            experts, _, length = mine_JNS.shape
            column_CN = mine_JNS.transpose(1, 2).reshape(experts * length, -1).to(self.groups.device)
            all_CN = gather_columns(column_CN, -(-count // world.size))[:, :count].cpu()
            all_JSN = all_CN.reshape(experts, length, count)
            self._priors[key] = cached_prior(all_JSN.unbind(dim=2), experts, self._prior.decay, history)
        return self._priors[key]

    def _of_model(self, name: str, part: str, domain: str) -> Pass:
        """Return the pass of a model, which is loaded once for all domains of the part."""
        if (name, part, domain) not in self._kept:
            self.place(name, partial(self.forest.weights, name))
            for each in self.domains:
                self._kept[name, part, each] = self._forward(self.model, self._tables[part, each])
        return self._kept[name, part, domain]

    def _drawn(self, domain: str) -> TokenTable:
        """Return the sequences from which a domain's prior is estimated, in random order."""
        table = self.domains[domain].data.val
        order_N = np.random.default_rng((self._prior.seed, *domain.encode())).permutation(len(table))
        return table.select(order_N[: self._prior.sequences])

    def _batches(self, table: TokenTable) -> list[Any]:
        """Return this rank's share of a table in batches, as many on every rank, some of them empty."""
        world, size = current_world(), max(1, EVAL_TOKENS // table.sequence_length)
        indices = shard_batches(table, size, rank=world.rank, world_size=world.size)
        return [table.batch(index_B, index_B).to(self.groups.device) for index_B in indices]

    @torch.no_grad()
    def _forward(self, model: MoEModel, table: TokenTable) -> Pass:
        model.eval()
        model.begin_evaluation()
        scores, assignments = [], torch.zeros((), dtype=torch.int64, device=self.groups.device)
        with recording(None):  # gates record training steps only
            for batch in self._batches(table):
                ACTIVITY.beat()
                output = model(*batch.inputs)
                scores.append(-token_nats(output, batch).cpu())
                assignments += sum(route.num_assignments for layer in output.layers for route in layer.routes)
        layers, tokens = len(model.moe_layers), len(table) * table.sequence_length
        experts = int(sum_over_ranks(assignments)) / (layers * tokens) if layers and tokens else 0.0
        return Pass(torch.cat(scores), model.size.flops_per_token(table.sequence_length, experts))


def new_model(plan: ForestPlan, groups: ProcessGroups) -> MoEModel:
    """Return a model of the run with this rank's experts, in the precision in which the run computed."""
    config = plan.start.config
    model: MoEModel = build_model(config, plan.union, groups.world).to(groups.device)
    cast_parameters(model, config.deepspeed, groups.device)
    return model
