"""Ways of using the experts of a forest together, by name: entries of the section ``recipe.merge``.

To add one: derive from :class:`MergeSettings` and register it, here or in a module under ``imports``. One that has to
be trained first does so in :meth:`MergeSettings.prepare`, by stages of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from dist_moe.config.registry import Registry
from dist_moe.config.settings import LARGEST_COUNT, Settings
from dist_moe.engine.checkpoint import ModelWeights, place_weights
from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.recipes.branch_train_merge.average import averaged
from dist_moe.recipes.branch_train_merge.ensemble import EnsembleModel
from dist_moe.recipes.branch_train_merge.posterior import History, log_mixture, log_weights, top_k, uniform_prior
from dist_moe.recipes.branch_train_merge.scoring import Pass, Scorer

if TYPE_CHECKING:
    from dist_moe.recipes.branch_train_merge.training import ForestPlan
    from dist_moe.recipes.stages import Stages

Prior = Literal["uniform", "cached"]


@dataclass(frozen=True)
class Scores:
    """The predictions of a way of merging for a domain, on this rank.

    ``logp_NS``: log-probabilities of the targets of this rank's sequences. ``experts_per_token``: whole models that are
    computed for each token. ``flops_per_token``: of them all, see :class:`Pass`. ``weight_JN``: mean weight of each
    expert in each sequence; None where they have none.
    """

    logp_NS: Tensor
    experts_per_token: float
    flops_per_token: float
    weight_JN: Tensor | None = None

    @classmethod
    def of_one(cls, passed: Pass) -> Scores:
        """Return the predictions of one model."""
        return cls(passed.logp_NS, 1.0, passed.flops_per_token)


@dataclass(frozen=True)
class Exported:
    """A way of merging outside of its forest: one model, or an ensemble.

    ``models``: weights by the experts' names, read tensor by tensor; of one model by any name. ``config``: of the run
    that they are models of. ``prior_J``: of an ensemble, whose ``history`` and ``top_k`` are as those of
    :class:`Ensemble`; None for one model.
    """

    models: Mapping[str, ModelWeights]
    config: Any
    prior_J: Tensor | None = None
    history: History = "all"
    top_k: int | None = None


class MergeSettings(Settings, ABC):
    """A way of using the experts together, and its own fields."""

    name: str

    @property
    def label(self) -> str:
        """A short name for tables that tells it from others, by the fields that differ from their defaults."""
        return label_of(self.name.replace("_", " "), changed_fields(self))

    def check_config(self, config: Any) -> None:
        """Raise UserError for what of the whole configuration does not go with it."""

    def check_plan(self, plan: ForestPlan) -> None:
        """Raise UserError for what of the branches does not go with it."""

    def prepare(self, plan: ForestPlan, stages: Stages) -> None:
        """Run stages of its own once all experts are in the forest. On every rank."""

    @abstractmethod
    def score(self, scorer: Scorer, domain: str) -> Scores:
        """Score the test sequences of a domain. Collective over all ranks."""

    @abstractmethod
    def model(self, scorer: Scorer, domain: str | None, new_model: Callable[[], MoEModel]) -> nn.Module:
        """Return one module that predicts as this way of merging does. Collective over all ranks.

        ``domain``: of the text to come, None if it is not known. ``new_model``: returns a model for some weights.
        Raises UserError for a domain that must be known.
        """

    def exported(self, plan: ForestPlan, scorer: Scorer, domain: str | None) -> Exported:
        """Return what is written of it for other programs. Collective over all ranks.

        ``domain``: as of :meth:`model`. Raises UserError if it cannot be written.
        """
        able = sorted(name for name, other in MERGES.by_name.items() if other.exported is not MergeSettings.exported)
        raise UserError(f"{self.label}: cannot be written for other programs; these can: {', '.join(able)}")


def changed_fields(settings: Settings) -> dict[str, Any]:
    """Return the fields but the name that differ from their defaults, with their values."""
    fields = type(settings).model_fields
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    return {name: value for name, value in settings if name != "name" and value != defaults[name]}


def label_of(name: str, fields: Mapping[str, Any]) -> str:
    """Return a label: a name, and fields with their values."""
    return ", ".join([name, *(f"{field} {value}" for field, value in fields.items())])


MERGES = Registry("merge", MergeSettings)

MergeConfig = Annotated[SerializeAsAny[MergeSettings], MERGES]
"""The type of a configuration field that holds any registered way of merging."""


@MERGES.register
class Ensemble(MergeSettings):
    """All experts predict; their probabilities are mixed by the posterior of their domains."""

    name: Literal["ensemble"] = Field("ensemble", description="mix the experts' probabilities by the domain posterior")
    prior: Prior = Field(
        "uniform",
        description="what is believed of the domain before the first token: uniform, or cached: the running posterior "
        "over validation sequences of the domain that is evaluated",
    )
    history: History = Field(
        "all", description="what the posterior has seen: all of the sequence so far, or the previous token alone"
    )
    top_k: int | None = Field(
        None, ge=1, le=LARGEST_COUNT, description="use only so many experts, of the largest prior (null: all)"
    )

    def prior_of(self, scorer: Scorer, domain: str | None) -> Tensor:
        """Return (J,) the prior with which sequences of a domain begin. Collective over all ranks."""
        return top_k(_prior(self.prior, scorer, domain, self.history), self.top_k)

    def log_weights(self, logp_JBS: Tensor, token_BS: Tensor, prior_J: Tensor) -> Tensor:
        """Return (J, B, S) log-weights of the experts before each target.

        ``logp_JBS``: log-probabilities of the targets, of which only earlier ones may count. ``token_BS``: the tokens
        before the targets; the first t + 1 of them may count for target t.
        """
        return log_weights(logp_JBS, prior_J, self.history)

    def score(self, scorer: Scorer, domain: str) -> Scores:
        """Mix the experts' log-probabilities; experts without prior are not computed."""
        prior_J = self.prior_of(scorer, domain)
        used = prior_J.nonzero().flatten().tolist()
        logp_KNS, flops = scorer.passes([scorer.experts[j] for j in used], domain)
        log_weight_KNS = self.log_weights(logp_KNS, scorer.tokens(domain), prior_J[used])
        weight_JN = torch.zeros(len(prior_J), logp_KNS.shape[1], dtype=torch.float64)
        weight_JN[used] = log_weight_KNS.exp().mean(dim=2)
        return Scores(log_mixture(log_weight_KNS, logp_KNS), float(len(used)), sum(flops), weight_JN)

    def model(self, scorer: Scorer, domain: str | None, new_model: Callable[[], MoEModel]) -> nn.Module:
        """Return the experts that have a prior, and the mixture of what they predict."""
        prior_J = self.prior_of(scorer, domain)
        used, models = prior_J.nonzero().flatten().tolist(), []
        for j in used:
            models.append(new_model())
            place_weights(models[-1], scorer.forest.weights(scorer.experts[j]))
        return EnsembleModel(models, partial(self.log_weights, prior_J=prior_J[used]))

    def exported(self, plan: ForestPlan, scorer: Scorer, domain: str | None) -> Exported:
        """Return the experts that have a prior. Raises UserError for a derived class that weighs them otherwise."""
        if type(self).log_weights is not Ensemble.log_weights:
            return super().exported(plan, scorer, domain)
        prior_J = self.prior_of(scorer, domain)
        used = prior_J.nonzero().flatten().tolist()
        models = {scorer.experts[j]: scorer.forest.weights(scorer.experts[j]) for j in used}
        return Exported(models, plan.start.config, prior_J[used], self.history, self.top_k)


@MERGES.register
class Average(MergeSettings):
    """One model whose parameters are an average of the experts' parameters."""

    name: Literal["average"] = Field("average", description="average the experts' parameters to one model")
    weights: Prior = Field("uniform", description="shares of the experts: uniform, or the cached prior of each domain")

    def check_config(self, config: Any) -> None:
        """Raise UserError where branches would learn different slot -> expert tables."""
        if config.model.permutation is not None:
            raise UserError(
                "recipe.merge: parameters cannot be averaged where every branch learns a permutation of its own; set "
                "model.permutation=null, or give only ensembles in recipe.merge"
            )

    def average(self, scorer: Scorer, weight_J: Sequence[float]) -> ModelWeights:
        """Return the average of the experts' weights."""
        return averaged([scorer.forest.weights(name) for name in scorer.experts], weight_J)

    def score(self, scorer: Scorer, domain: str) -> Scores:
        """Average for the domain, and score its sequences by that one model."""
        weight_J = tuple(_prior(self.weights, scorer, domain).tolist())
        scorer.place(weight_J, lambda: self.average(scorer, weight_J))
        return Scores.of_one(scorer.score(scorer.model, domain))

    def model(self, scorer: Scorer, domain: str | None, new_model: Callable[[], MoEModel]) -> nn.Module:
        """Return the one model."""
        model = new_model()
        place_weights(model, self.average(scorer, _prior(self.weights, scorer, domain).tolist()))
        return model

    def exported(self, plan: ForestPlan, scorer: Scorer, domain: str | None) -> Exported:
        """Return the average, which is computed as it is read."""
        self.check_config(plan.start.config)
        average = self.average(scorer, _prior(self.weights, scorer, domain).tolist())
        return Exported({self.name: average}, plan.start.config)


def _prior(kind: Prior, scorer: Scorer, domain: str | None, history: History = "all") -> Tensor:
    """Return (J,) the prior of a domain, fp64. Raises UserError for the cached one of no domain."""
    if kind == "uniform":
        return uniform_prior(len(scorer.experts))
    if domain is None:
        raise UserError("a cached prior is that of a domain of the data; name one by --domain, or take prior: uniform")
    return scorer.prior(domain, history)


DEFAULT_MERGES: Sequence[MergeSettings] = (
    Ensemble(name="ensemble"),
    Ensemble(name="ensemble", prior="cached"),
    Ensemble(name="ensemble", prior="cached", top_k=2),
    Average(name="average"),
    Average(name="average", weights="cached"),
)
