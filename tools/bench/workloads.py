"""Workloads, and the tokens and weights that belong to them: the same for every candidate."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

LARGEST_OTHER, SMALLEST_CHOSEN, LARGEST_CHOSEN = 1.0, 2.0, 3.0
"""Router logits: between them room for what rounding to bf16 moves."""


@dataclass(frozen=True)
class Workload:
    """One MoE layer of gated SiLU experts, forward and backward.

    ``tokens``: of every rank. ``width``: D. ``experts``: of all ranks. ``k``: experts per token.
    ``max_violation``: the largest load over the mean load, minus 1; loads are log-normal (0: all equal).
    ``ranks``: processes over which the experts are split. ``empty_rank``: the last rank has no tokens.
    """

    tokens: int
    width: int
    experts: int
    k: int
    dtype: str = "float32"
    max_violation: float = 0.0
    ranks: int = 1
    empty_rank: bool = False

    @property
    def hidden(self) -> int:
        """F: twice the width; with many experts half of it, as models with many experts have it."""
        return 2 * self.width if self.experts <= 64 else self.width // 2

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def name(self) -> str:
        skew = f"-skew{self.max_violation:g}" if self.max_violation else ""
        ranks = f"-r{self.ranks}" if self.ranks > 1 else ""
        empty = "-empty" if self.empty_rank else ""
        short = {"float32": "fp32", "bfloat16": "bf16"}.get(self.dtype, self.dtype)
        return f"t{self.tokens}-d{self.width}-e{self.experts}-k{self.k}-{short}{skew}{ranks}{empty}"

    @property
    def weight_bytes(self) -> int:
        """Size of the weights of all experts."""
        return 3 * self.experts * self.width * self.hidden * self.torch_dtype.itemsize

    def tokens_of(self, rank: int) -> int:
        return 0 if self.empty_rank and rank == self.ranks - 1 else self.tokens

    def impossible(self) -> str | None:
        """Why there is no such workload; None if there is."""
        if self.k > self.experts:
            return f"k={self.k} exceeds the {self.experts} experts"
        if self.experts > self.width:
            return f"{self.experts} experts need a width of as much, to shape the router's inputs"
        if self.experts % self.ranks:
            return f"{self.experts} experts cannot be split over {self.ranks} ranks"
        most = self.experts / self.k - 1
        if self.max_violation > most:
            return f"an expert can take each token once: a max-violation above {most:g} cannot be"
        return None


@dataclass(frozen=True)
class Material:
    """Inputs of a rank's layer. ``expert_TK``: which experts the router's weights make each token choose."""

    x_TD: Tensor
    cotangent_TD: Tensor
    router_ED: Tensor
    gate_EDF: Tensor
    up_EDF: Tensor
    down_EFD: Tensor
    expert_TK: Tensor


def material(workload: Workload, rank: int = 0, seed: int = 0) -> Material:
    """Return weights, alike on every rank, and tokens of its own. Raises ValueError for an impossible workload."""
    if reason := workload.impossible():
        raise ValueError(reason)
    w, dtype = workload, workload.torch_dtype
    weights = _generator(w, seed, "weights")
    router_ED = torch.linalg.qr(torch.randn(w.width, w.experts, generator=weights)).Q.T.contiguous()
    gate, up, down = (
        (torch.randn(w.experts, rows, columns, generator=weights) / rows**0.5).to(dtype)
        for rows, columns in ((w.width, w.hidden), (w.width, w.hidden), (w.hidden, w.width))
    )
    tokens = _generator(w, seed, f"tokens of rank {rank}")
    expert_TK = _choices(w, w.tokens_of(rank), tokens)
    x_TD = _tokens_with_logits(_logits(expert_TK, w.experts, tokens), router_ED, tokens)
    cotangent_TD = torch.randn(x_TD.shape, generator=tokens)
    return Material(x_TD.to(dtype), cotangent_TD.to(dtype), router_ED.to(dtype), gate, up, down, expert_TK)


def loads(assignments: int, experts: int, max_violation: float, most: int, generator: torch.Generator) -> list[int]:
    """Log-normal loads that sum to ``assignments``, the largest being (1 + ``max_violation``) times the mean.

    ``most``: what a load may be at most: the number of tokens.
    """
    normal_E = torch.randn(experts, generator=generator, dtype=torch.float64)
    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        share_E = (middle * (normal_E - normal_E.max())).exp()
        low, high = (middle, high) if share_E.max() / share_E.mean() < 1 + max_violation else (low, middle)
    share_E = (low * (normal_E - normal_E.max())).exp()
    wanted_E = (share_E / share_E.sum() * assignments).clamp(max=most)
    load_E = wanted_E.floor().long()
    left_over = assignments - int(load_E.sum())
    by_remainder = ((wanted_E - load_E) - 2.0 * (load_E >= most)).argsort(descending=True, stable=True)
    load_E[by_remainder[:left_over]] += 1
    return [int(load) for load in load_E]


def _choices(w: Workload, tokens: int, generator: torch.Generator) -> Tensor:
    """(T, K) distinct experts per token, with the loads that were asked for.

    An expert takes consecutive places of a list that runs through the tokens k times: never one token twice. Then
    tokens are shuffled, and the experts of each.
    """
    load_E = torch.tensor(loads(tokens * w.k, w.experts, w.max_violation, tokens, generator))
    expert_N = torch.repeat_interleave(torch.arange(w.experts), load_E)
    expert_TK = expert_N.view(w.k, tokens).T
    order_TK = torch.rand(tokens, w.k, generator=generator).argsort(dim=1)
    return expert_TK[torch.randperm(tokens, generator=generator)].gather(1, order_TK)


def _logits(expert_TK: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    others_TE = torch.randn(len(expert_TK), experts, generator=generator).clamp(max=LARGEST_OTHER)
    chosen_TK = torch.rand(expert_TK.shape, generator=generator)
    chosen_TK = SMALLEST_CHOSEN + (LARGEST_CHOSEN - SMALLEST_CHOSEN) * chosen_TK
    return others_TE.scatter(1, expert_TK, chosen_TK)


def _tokens_with_logits(logit_TE: Tensor, router_ED: Tensor, generator: torch.Generator) -> Tensor:
    """(T, D) random tokens, of which the (orthonormal) router's logits are ``logit_TE``."""
    noise_TD = torch.randn(len(logit_TE), router_ED.shape[1], generator=generator)
    return noise_TD + (logit_TE - noise_TD @ router_ED.T) @ router_ED


def _generator(w: Workload, seed: int, what: str) -> torch.Generator:
    digest = hashlib.sha256(f"{sorted(asdict(w).items())} {seed} {what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
