"""DSelect-k: k selectors, each of which picks one expert by choosing the bits of its number.

Hazimeh, Zhao, Chowdhery, Sathiamoorthy, Chen, Mazumder, Hong, Chi: DSelect-k (NeurIPS 2021). With
m = ceil(log2 n) bits, S the smooth-step, selector j and expert i:

    z_jb = S(w_jb . x + c_jb)                                 probability that bit b of j's choice is 1
    q_ij = product over bits b of  z_jb if bit b of i is 1 else 1 - z_jb
    alpha = softmax over j of (u_j . x + d_j)
    g_i = sum_j alpha_j q_ij

A saturated selector picks exactly one of 2^m codes, so at most k experts remain. A code from n
upwards is no expert's: unless n is a power of two, the weights of a token sum to the mass that
reaches experts, which the reciprocal penalty 1 / (1e-6 + sum_{i<n} q_ij) keeps from vanishing.
As in the paper the weights are not divided by that mass. Slots that the gate may not choose lose nothing: a bit
of which one value leads to such slots only takes the other, whatever the token.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.gates.base import GATES, Gate, GateContext, GateSettings, Mixture, affine, check_k, smooth_step
from dist_moe.gates.comet import leaf_entropy

RECIPROCAL_EPSILON = 1e-6
SELECTOR_INIT_RANGE = 0.05


@GATES.register
class DSelectKConfig(GateSettings):
    """The DSelect-k gate: k selectors that harden while training, so that k experts remain."""

    stackable: ClassVar[bool] = True
    varying: ClassVar[tuple[str, ...]] = ("gamma", "entropy_weight")

    name: Literal["dselect_k"] = "dselect_k"
    k: int = Field(2, ge=1, description="number of selectors: the experts per token once they are hard")
    gamma: float = Field(1.0, gt=0, description="width of the smooth-step: the smaller, the sooner a bit saturates")
    entropy_weight: float = Field(
        1.0, ge=0, description="weight of the selectors' entropy: the larger, the sooner each picks one expert"
    )
    reciprocal_weight: float = Field(
        1.0, ge=0, description="weight of the penalty on codes that are no expert's; only if n is not a power of two"
    )
    static: bool = Field(False, description="the same mixture for every token: the selectors see no input")

    @property
    def has_entropy(self) -> bool:
        """Whether the selectors' entropies have a weight."""
        return self.entropy_weight > 0

    def build(self, dim: int, num_experts: int, context: GateContext) -> DSelectK:
        """Return the gate with these options."""
        return DSelectK(dim, num_experts, **self.model_dump(exclude={"name"}))


class DSelectK(Gate):
    """k selectors over ``num_experts``; they are the branches, each already times its alpha.

    Parameters: ``bit_weight`` (k, m, dim), ``bit_bias`` (k, m), of which bit 0 is the lowest;
    ``selector_weight`` (k, dim), ``selector_bias`` (k,); a ``static`` gate has the biases only.
    ``aux["entropy"]``: ``entropy_weight`` times the mean over tokens of the sum over selectors and
    experts of -q log(q + 1e-6). ``aux["reciprocal"]``: ``reciprocal_weight`` times the mean over
    tokens of the selectors' summed penalties; only if n is not a power of two.
    """

    can_exclude = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        gamma: float = 1.0,
        entropy_weight: float = 1.0,
        reciprocal_weight: float = 1.0,
        *,
        static: bool = False,
    ) -> None:
        super().__init__(dim, num_experts)
        check_k(k, num_experts)
        if gamma <= 0:
            raise ValueError(f"gamma must be positive, got {gamma}")
        self.k = self.num_branches = k
        self.num_bits = (num_experts - 1).bit_length()
        self.gamma = gamma
        self.entropy_weight = entropy_weight
        self.reciprocal_weight = reciprocal_weight
        self.static = static
        self.bit_bias = nn.Parameter(torch.empty(k, self.num_bits))
        self.selector_bias = nn.Parameter(torch.empty(k))
        self.bit_weight = None if static else nn.Parameter(torch.empty(k, self.num_bits, dim))
        self.selector_weight = None if static else nn.Parameter(torch.empty(k, dim))
        # As the paper's: bits are U(-gamma/100, gamma/100), so that all codes are equally likely.
        for name, parameter in self.named_parameters():
            bound = self.gamma / 100 if name.startswith("bit") else SELECTOR_INIT_RANGE
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def largest_entropy(self) -> float:
        """The weighted entropy of selectors to which all experts are alike."""
        return self.entropy_weight * self.k * math.log(self.num_allowed)

    def mixture(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Mixture:
        """Return each selector's choice times its alpha, with the entropy and the reciprocal penalty."""
        code_TKE = self.selection(x_TD)
        alpha_TK1 = affine(x_TD, self.selector_weight, self.selector_bias).softmax(dim=-1).unsqueeze(-1)
        tokens = max(len(code_TKE), 1)
        aux = {"entropy": self.entropy_weight * (leaf_entropy(code_TKE) / tokens)}
        if self.num_experts != 2**self.num_bits:
            penalty = (1 / (code_TKE.sum(dim=-1) + RECIPROCAL_EPSILON)).sum()
            aux["reciprocal"] = self.reciprocal_weight * (penalty / tokens)
        return Mixture(alpha_TK1 * code_TKE, aux)

    def selection(self, x_TD: Tensor) -> Tensor:
        """Return q, of shape (T, k, n): how much of each selector each expert gets."""
        one_TKM, zero_TKM = smooth_step(affine(x_TD, self.bit_weight, self.bit_bias), self.gamma)
        code = torch.ones_like(one_TKM[..., :1])
        for bit in range(self.num_bits):  # every code so far, with this bit 0 and then with this bit 1
            zero, one = zero_TKM[..., bit : bit + 1], one_TKM[..., bit : bit + 1]
            if self.allowed_E is not None:
                zero_C, one_C = self._open_codes(bit + 1).chunk(2)
                zero, one = zero.where(one_C, 1).where(zero_C, 0), one.where(zero_C, 1).where(one_C, 0)
            code = torch.cat([code * zero, code * one], dim=-1)
        return code[..., : self.num_experts]

    def _open_codes(self, bits: int) -> Tensor:
        """Return (2^bits,) booleans: may these lowest bits become a code that is not excluded, be it no expert's?"""
        assert self.allowed_E is not None
        lost_C = self.allowed_E.new_ones(2**self.num_bits - self.num_experts)
        return torch.cat([self.allowed_E, lost_C]).view(-1, 2**bits).any(dim=0)
