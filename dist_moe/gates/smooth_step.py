"""The smooth-step function: a sigmoid that reaches 0 and 1 exactly.

Hazimeh et al., The Tree Ensemble Layer (ICML 2020), eq. 2; used by COMET (KDD 2023):

    S(t) = 0 for t <= -gamma/2,  1 for t >= gamma/2,  -2 t^3/gamma^3 + 3 t/(2 gamma) + 1/2 between.
"""

from __future__ import annotations

from torch import Tensor


def smooth_step(t: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return S(t) and 1 - S(t), each to full relative precision, of any shape.

    With u = clamp(t/gamma + 1/2, 0, 1) the cubic is u^2 (3 - 2u) and its complement
    (1-u)^2 (1 + 2u). The cubic as printed gives values below 0 just inside the left edge in fp32,
    and 1 - S loses all precision near 1; this form does neither. Both derivatives are exactly 0
    outside the open interval, which is what makes skipping an expert exact.
    """
    u = (t / gamma + 0.5).clamp(0.0, 1.0)
    w = 1.0 - u
    return u * u * (3.0 - 2.0 * u), w * w * (1.0 + 2.0 * u)
