"""A weak and a strong expert that differ in kind, and a confidence that decides which of them answers (Mowst).

Zeng et al.: Mixture of Weak & Strong Experts on Graphs (ICLR 2024). Nothing here knows graphs.
"""

from dist_moe.models.weak_strong.confidence import (
    CONFIDENCES,
    ConfidenceConfig,
    ConfidenceSettings,
    DispersionConfig,
    dispersion,
)
from dist_moe.models.weak_strong.layer import Mixture, WeakStrong, WeakStrongOutput, mixed_losses, mixed_predictions

__all__ = [
    "CONFIDENCES",
    "ConfidenceConfig",
    "ConfidenceSettings",
    "DispersionConfig",
    "Mixture",
    "WeakStrong",
    "WeakStrongOutput",
    "dispersion",
    "mixed_losses",
    "mixed_predictions",
]
