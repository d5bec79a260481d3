"""The layer of a weak and a strong expert, and the loss of what they give together.

With the confidence C, logits z, z' of the weak and strong expert, p, p' their distributions, l, l' their losses:

    losses        C l + (1 - C) l'                      Mowst: one of the two answers, the weak one with probability C
    predictions   -log(C p + (1 - C) p')_y              Mowst*: the mixed distribution answers
    logits        loss of C z + (1 - C) z'              Mowst* as the authors' code trains it; answers are as above

For the same C, z and z' the first is never less than the two others: -log is convex, and so is the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_moe.models.moe_model import ModelOutput

Mixture = Literal["losses", "predictions", "logits"]


def mixed_losses(confidence_B: Tensor, weak_B: Tensor, strong_B: Tensor) -> Tensor:
    """Return (B,) C l + (1 - C) l'; its derivative by C is l - l'. Also the expected accuracy, of who is right."""
    return confidence_B * weak_B + (1 - confidence_B) * strong_B


def mixed_predictions(z_B: Tensor, weak_BC: Tensor, strong_BC: Tensor) -> Tensor:
    """Return (B, C) log(C p + (1 - C) p') for C = sigmoid(z) and logits of both experts; exact at C = 0 and 1."""
    weak_BC, strong_BC = (logits.log_softmax(dim=1) for logits in (weak_BC, strong_BC))
    return torch.logaddexp(F.logsigmoid(z_B).unsqueeze(1) + weak_BC, F.logsigmoid(-z_B).unsqueeze(1) + strong_BC)


@dataclass(frozen=True)
class WeakStrongOutput(ModelOutput):
    """Output of both experts for B examples. ``predictions``: their mixed log-probabilities. ``z_B``: logits of C."""

    weak_BC: Tensor
    strong_BC: Tensor
    z_B: Tensor
    mixture: Mixture

    @property
    def confidence_B(self) -> Tensor:
        """C, the probability that the weak expert answers."""
        return self.z_B.sigmoid()

    def cross_entropy(self, label_B: Tensor) -> Tensor:
        """Return the (B,) losses of the mixture, see the module."""
        if self.mixture == "losses":
            losses = (F.cross_entropy(logits, label_B, reduction="none") for logits in (self.weak_BC, self.strong_BC))
            return mixed_losses(self.confidence_B, *losses)
        if self.mixture == "logits":
            c_B1 = self.confidence_B.unsqueeze(1)
            return F.cross_entropy(c_B1 * self.weak_BC + (1 - c_B1) * self.strong_BC, label_B, reduction="none")
        return F.nll_loss(self.predictions[0], label_B, reduction="none")

    def right(self, label_B: Tensor) -> Tensor:
        """Return the (B,) probability that the answer is right: 0 or 1 where a mixed distribution answers."""
        weak_B, strong_B, mixed_B = (
            (logits.argmax(dim=1) == label_B).to(self.z_B.dtype)
            for logits in (self.weak_BC, self.strong_BC, self.predictions[0])
        )
        return mixed_losses(self.confidence_B, weak_B, strong_B) if self.mixture == "losses" else mixed_B


class WeakStrong(nn.Module):
    """``layer(*inputs)``: logits of ``weak(*inputs)`` and ``strong(*inputs)``, mixed by a confidence.

    ``confidence``: see :mod:`dist_moe.models.weak_strong.confidence`. ``features``: the (B, D) features of the examples
    among ``inputs``; by default the first of them.
    """

    def __init__(
        self,
        weak: nn.Module,
        strong: nn.Module,
        confidence: nn.Module,
        mixture: Mixture = "losses",
        features: Callable[..., Tensor] = lambda first, *_: first,
    ) -> None:
        super().__init__()
        self.weak, self.strong, self.confidence, self.mixture = weak, strong, confidence, mixture
        self.features = features

    def forward(self, *inputs: Any) -> WeakStrongOutput:
        """Return the output of both experts."""
        return self.mixed(self.weak(*inputs), self.strong(*inputs), *inputs)

    @torch.no_grad()
    def classify(
        self, *inputs: Any, threshold: float, strong_of: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (B,) classes, those of the strong expert where the confidence is below ``threshold``; and where.

        The strong expert runs for these examples alone: on those rows of all ``inputs``, or, given where they are, by
        ``strong_of``, which returns their logits. Needs evaluation mode.
        """
        weak_BC = self.weak(*inputs)
        asks_B = self._confidence_logits(weak_BC, *inputs).sigmoid() < threshold
        class_B = weak_BC.argmax(dim=1)
        if asks_B.any():
            strong_BC = strong_of(asks_B) if strong_of else self.strong(*(x[asks_B] for x in inputs))
            class_B[asks_B] = strong_BC.argmax(dim=1)
        return class_B, asks_B

    def mixed(self, weak_BC: Tensor, strong_BC: Tensor, *inputs: Any) -> WeakStrongOutput:
        """Return the output for given logits, fp32 at least."""
        weak_BC, strong_BC = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (weak_BC, strong_BC))
        z_B = self._confidence_logits(weak_BC, *inputs)
        mixed = mixed_predictions(z_B, weak_BC, strong_BC)
        return WeakStrongOutput((mixed,), (), weak_BC, strong_BC, z_B, self.mixture)

    def _confidence_logits(self, weak_BC: Tensor, *inputs: Any) -> Tensor:
        reads = getattr(self.confidence, "reads_features", True)
        z_B: Tensor = self.confidence(weak_BC, self.features(*inputs) if reads else weak_BC[:, :0])
        return z_B
