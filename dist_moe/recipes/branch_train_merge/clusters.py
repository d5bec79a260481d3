"""The ensemble of cluster experts, each counting by how near a text's words so far are to its cluster (c-BTM).

Gururangan et al.: Scaling Expert Language Models with Unsupervised Domain Discovery, 2023, section 2.3. Expert j was
trained on the cluster with centre c_j, and h_t is the vector of the words before the target x_t:

    p(x_t | x_<t) = sum_j  w_jt  p(x_t | x_<t, D=j),        w_jt ~ exp(-|h_t - c_j|^2 / temperature)

Nothing of an expert's own predictions is needed for its weight, so those that are left out are not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.config.settings import LARGEST_COUNT
from dist_moe.data.text.clusters import prefix_log_weights, prefix_vectors
from dist_moe.engine.checkpoint import place_weights
from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.recipes.branch_train_merge.ensemble import EnsembleModel
from dist_moe.recipes.branch_train_merge.merge import MERGES, MergeSettings, Scores
from dist_moe.recipes.branch_train_merge.posterior import log_mixture
from dist_moe.recipes.branch_train_merge.scoring import Scorer
from dist_moe.recipes.branch_train_merge.training import ForestPlan


@MERGES.register
class Clusters(MergeSettings):
    """All experts predict; their probabilities are mixed by how near the words so far are to their clusters."""

    name: Literal["clusters"] = Field(
        "clusters",
        description="mix the experts' probabilities by the distances of the words so far from their clusters",
    )
    temperature: float = Field(
        0.1, ge=1e-6, description="squared distance by which a weight falls by a factor of e; c-BTM's is 0.1"
    )
    doubled_square: bool = Field(
        False, description="square the squared distances once more, as the released scorer does, with the same 0.1"
    )
    top_k: int | None = Field(
        None, ge=1, le=LARGEST_COUNT, description="use only so many experts for each token, the nearest (null: all)"
    )

    def check_config(self, config: Any) -> None:
        """Raise UserError unless the data's domains are clusters."""
        if getattr(config.data, "clusters", None) is None:
            raise UserError(
                "recipe.merge: clusters tells experts by their clusters, and the data has none; set "
                "data.clusters.count, or take ensemble"
            )

    def check_plan(self, plan: ForestPlan) -> None:
        """Raise UserError for a branch that is no cluster."""
        clusterer = plan.task.data.clusterer
        for branch in plan.partition.branches:
            if clusterer is None or branch not in clusterer.names:
                raise UserError(
                    f"recipe.merge: clusters tells experts by their clusters, and the branch {branch} is none; use "
                    "recipe.partition.name=provenance, and clusters alone as recipe.partition.domains"
                )

    def log_weights(self, scorer: Scorer) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what gives (J, B, S) log-weights of the experts before each target, see :class:`EnsembleModel`.

        Raises UserError for an expert that is no cluster.
        """
        clusterer, text = scorer.forest.clusterer(), scorer.task.data
        number_of = {name: k for k, name in enumerate(clusterer.names)}
        for expert in scorer.experts:
            if expert not in number_of:
                raise UserError(f"the expert {expert} is no cluster, by which it could be weighed; leave it out")
        weigh = partial(
            prefix_log_weights,
            clusterer,
            clusters=[number_of[expert] for expert in scorer.experts],
            temperature=self.temperature,
            doubled_square=self.doubled_square,
            top_k=self.top_k,
        )

        def log_weights(logp_JBS: Tensor, token_BS: Tensor) -> Tensor:
            vector_BSD = prefix_vectors(clusterer, text.tokenizer, text.end_of_text, token_BS.cpu().numpy())
            return torch.from_numpy(weigh(vector_BSD)).to(token_BS.device)

        return log_weights

    def score(self, scorer: Scorer, domain: str) -> Scores:
        """Mix the experts' log-probabilities."""
        logp_JNS, flops = scorer.passes(scorer.experts, domain)
        log_weight_JNS = self.log_weights(scorer)(logp_JNS, scorer.tokens(domain))
        used = min(self.top_k or len(logp_JNS), len(logp_JNS))
        flops_used = used * sum(flops) / len(flops)  # which ones differs by token
        mixed_NS = log_mixture(log_weight_JNS, logp_JNS)
        return Scores(mixed_NS, float(used), flops_used, log_weight_JNS.exp().mean(dim=2))

    def model(self, scorer: Scorer, domain: str | None, new_model: Callable[[], MoEModel]) -> nn.Module:
        """Return the experts, and the mixture of what they predict."""
        models = []
        for expert in scorer.experts:
            models.append(new_model())
            place_weights(models[-1], scorer.forest.weights(expert))
        return EnsembleModel(models, self.log_weights(scorer))
