"""Confidence of a weak expert: logits of how far an example is its own.

A confidence is a module ``(weak_BC, features_BD) -> (B,)``: given the weak expert's logits and the features of the
examples it returns the logit z of C = sigmoid(z). One whose attribute ``reads_features`` is false is given D = 0 of
them. Mowst's own is G(D(p)): the dispersion D of the weak expert's distribution p is 0 at the uniform one and 1 at
certainty. To add one: derive from :class:`ConfidenceSettings` and register it in ``CONFIDENCES``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from dist_moe.config.registry import Registry
from dist_moe.config.settings import LARGEST_DEPTH, Settings, Size


def dispersion(logit_BC: Tensor) -> Tensor:
    """Return (B, 2), fp32 at least: how far softmax of the logits is from uniform, 0, and how near to certainty, 1.

    The first is the variance over classes relative to a one-hot distribution's, n/(n-1) (|p|^2 - 1/n); the second is
    1 - entropy / log n. Raises ValueError for fewer than two classes.
    """
    count = logit_BC.shape[1]
    if count < 2:
        raise ValueError(f"a distribution over {count} class(es) has no dispersion")
    log_p_BC = logit_BC.to(torch.promote_types(logit_BC.dtype, torch.float32)).log_softmax(dim=1)
    p_BC = log_p_BC.exp()
    variance_B = count / (count - 1) * (p_BC.square().sum(dim=1) - 1 / count)
    return torch.stack([variance_B, 1 + (p_BC * log_p_BC).sum(dim=1) / math.log(count)], dim=1)


class ConfidenceSettings(Settings, ABC):
    """The section ``confidence``: which kind, and its own fields."""

    name: str

    @abstractmethod
    def build(self, num_features: int) -> nn.Module:
        """Return the module for examples of so many features."""


CONFIDENCES = Registry("confidence", ConfidenceSettings, default="dispersion")

ConfidenceConfig = Annotated[SerializeAsAny[ConfidenceSettings], CONFIDENCES]
"""The type of a configuration field that holds any registered confidence."""


class _MLPSettings(ConfidenceSettings, ABC):
    hidden: Size = Field(16, description="width between the layers of the map")
    layers: int = Field(2, ge=1, le=LARGEST_DEPTH, description="layers of the map")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the units between layers that is dropped")

    def mlp(self, inputs: int, outputs: int = 1) -> nn.Sequential:
        """Return layers from ``inputs`` numbers to so many ``outputs``."""
        widths = [inputs, *[self.hidden] * (self.layers - 1), outputs]
        layers: list[nn.Module] = []
        for pair in pairwise(widths):
            layers += [nn.Linear(*pair), nn.LayerNorm(pair[1]), nn.ReLU(), nn.Dropout(self.dropout)]
        return nn.Sequential(*layers[:-3])


class DispersionConfig(_MLPSettings):
    """Mowst's confidence, a learned map of the dispersion of the weak expert's distribution."""

    name: Literal["dispersion"] = Field("dispersion", description="which confidence this is")
    of: Literal["both", "variance", "entropy"] = Field(
        "both", description="the dispersion: variance, negative entropy, or both side by side, as the authors' code has"
    )
    map: Literal["monotone", "mlp"] = Field(
        "mlp", description="what turns it into a confidence: never falling in it (the paper's), or any MLP (the code's)"
    )
    through: bool = Field(
        True, description="the weak expert learns through the dispersion, too (the paper's; false: the code's)"
    )
    with_features: bool = Field(False, description="give an MLP the features of the example as well")

    def build(self, num_features: int) -> nn.Module:
        """Return the module."""
        parts = {"both": [0, 1], "variance": [0], "entropy": [1]}[self.of]
        inputs = len(parts) + (num_features if self.with_features and self.map == "mlp" else 0)
        learned = self.mlp(inputs) if self.map == "mlp" else MonotoneMap(inputs, self.hidden)
        return DispersionConfidence(learned, parts, through=self.through, with_features=inputs > len(parts))


class DispersionConfidence(nn.Module):
    """z = map(D(p)); ``parts``: which of the two dispersions; see :class:`DispersionConfig`."""

    def __init__(self, learned: nn.Module, parts: list[int], *, through: bool, with_features: bool) -> None:
        super().__init__()
        self.map, self._parts, self._through, self.reads_features = learned, parts, through, with_features

    def forward(self, weak_BC: Tensor, features_BD: Tensor) -> Tensor:
        """Return the logits of the confidence."""
        d_BK = dispersion(weak_BC if self._through else weak_BC.detach())[:, self._parts]
        given = torch.cat([d_BK, features_BD.to(d_BK.dtype)], dim=1) if self.reads_features else d_BK
        z_B: Tensor = self.map(given).squeeze(1)
        return z_B


class MonotoneMap(nn.Module):
    """z = b + sum_j v_j tanh(sum_k w_jk d_k + c_j) with positive v and w: it rises with every d."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.raw_w = nn.Parameter(torch.randn(hidden, inputs))
        self.raw_v = nn.Parameter(torch.randn(1, hidden) - math.log(hidden))
        self.c, self.b = nn.Parameter(torch.randn(hidden)), nn.Parameter(torch.zeros(1))

    def forward(self, d_BK: Tensor) -> Tensor:
        """Return (B, 1) logits."""
        return F.linear(F.linear(d_BK, F.softplus(self.raw_w), self.c).tanh(), F.softplus(self.raw_v), self.b)


class HyperNetworkConfig(_MLPSettings):
    """A map of the dispersion that each example has for itself: a network on its features gives the weights."""

    name: Literal["hyper_network"] = Field("hyper_network", description="which confidence this is")

    def build(self, num_features: int) -> nn.Module:
        """Return the module."""
        return HyperNetworkConfidence(self.mlp(num_features, outputs=3))


class HyperNetworkConfidence(nn.Module):
    """z = b(x) + sum_k w_k(x) D(p)_k with positive w: it rises with both dispersions, for every example x."""

    def __init__(self, learned: nn.Module) -> None:
        super().__init__()
        self.map = learned

    def forward(self, weak_BC: Tensor, features_BD: Tensor) -> Tensor:
        """Return the logits of the confidence."""
        d_B2, raw_B3 = dispersion(weak_BC), self.map(features_BD)
        return raw_B3[:, 2] + (F.softplus(raw_B3[:, :2]) * d_B2).sum(dim=1)


class FeatureGateConfig(_MLPSettings):
    """A gate on the features that knows nothing of the weak expert: that of a plain soft mixture. A control."""

    name: Literal["features"] = Field("features", description="which confidence this is")

    def build(self, num_features: int) -> nn.Module:
        """Return the module."""
        return FeatureGate(self.mlp(num_features))


class FeatureGate(nn.Module):
    """z = MLP(features)."""

    def __init__(self, learned: nn.Module) -> None:
        super().__init__()
        self.map = learned

    def forward(self, weak_BC: Tensor, features_BD: Tensor) -> Tensor:
        """Return the logits of the confidence."""
        z_B: Tensor = self.map(features_BD).squeeze(1)
        return z_B


class RandomConfidenceConfig(ConfidenceSettings):
    """A confidence drawn uniformly for each example, and kept. A control."""

    name: Literal["random"] = Field("random", description="which confidence this is")

    def build(self, num_features: int) -> nn.Module:
        """Return the module."""
        return RandomConfidence()


class RandomConfidence(nn.Module):
    """z = logit(u), u uniform by a hash of the features: wherever an example occurs it has the same one."""

    def forward(self, weak_BC: Tensor, features_BD: Tensor) -> Tensor:
        """Return the logits of the confidence."""
        # In whole numbers, which wrap around alike whatever the number and order of rows.
        factor_D = (2 * torch.arange(features_BD.shape[1], device=features_BD.device) + 1) * 2_654_435_761
        hash_B = ((features_BD.detach() * 2**20).round().long() * factor_D).sum(dim=1)
        hash_B = (hash_B ^ (hash_B >> 31)) * 6_364_136_223_846_793_005
        u_B = ((hash_B >> 33) % 2**24).double() / 2**24
        return torch.logit(u_B, eps=1e-6).to(weak_BC.dtype)


for _settings in (DispersionConfig, HyperNetworkConfig, FeatureGateConfig, RandomConfidenceConfig):
    CONFIDENCES.register(_settings)
