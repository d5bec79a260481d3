"""The naive fp64 version of every fast path: loops over tokens, trees, leaves, slots and experts."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import Comet, Gate, TopK


def naive_smooth_step(t: Tensor, gamma: float) -> Tensor:
    """The cubic as the paper prints it, of one number."""
    if t <= -gamma / 2:
        return torch.zeros_like(t)
    if t >= gamma / 2:
        return torch.ones_like(t)
    return -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5


def naive_leaf_masses(left_Q: list[Tensor]) -> list[Tensor]:
    """Recursive descent of one heap-ordered tree; leaves from left to right."""

    def descend(node: int, mass: Tensor) -> list[Tensor]:
        if node >= len(left_Q):
            return [mass]
        left = left_Q[node]
        return descend(2 * node + 1, mass * left) + descend(2 * node + 2, mass * (1 - left))

    return descend(0, torch.ones_like(left_Q[0]))


def naive_comet(gate: Comet, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(T, n) mixture, and the entropy term with its coefficient."""
    rows, entropy = [], x_TD.new_zeros(())
    for x_D in x_TD:
        shares = [x_TD.new_zeros(()) for _ in range(gate.num_experts)]
        for tree in range(gate.k):
            splits = zip(gate.split_weight[tree], gate.split_bias[tree], strict=True)
            masses = naive_leaf_masses([naive_smooth_step(w_D @ x_D + b, gate.gamma) for w_D, b in splits])
            for leaf, mass in enumerate(masses):
                logit = gate.leaf_weight[tree, leaf] @ x_D + gate.leaf_bias[tree, leaf]
                shares[leaf] = shares[leaf] + mass * logit.exp()
                entropy = entropy - mass * (mass + 1e-6).log()
        rows.append(torch.stack([share / sum(shares) for share in shares]))
    mixture_TE = torch.stack(rows) if rows else x_TD.new_zeros(0, gate.num_experts)
    return mixture_TE, gate.entropy_weight * entropy / max(len(x_TD), 1)


def naive_top_k(gate: TopK, x_TD: Tensor) -> Tensor:
    """(T, n) mixture: sort, keep k indices, softmax over them."""
    rows = []
    for x_D in x_TD:
        logits = [w_D @ x_D + b for w_D, b in zip(gate.weight, gate.bias, strict=True)]
        kept = sorted(range(len(logits)), key=lambda e: logits[e].item(), reverse=True)[: gate.k]
        total = sum(logits[e].exp() for e in kept)
        zero = x_TD.new_zeros(())
        rows.append(torch.stack([logits[e].exp() / total if e in kept else zero for e in range(len(logits))]))
    return torch.stack(rows) if rows else x_TD.new_zeros(0, gate.num_experts)


def naive_gate(gate: Gate, x_TD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(T, n) mixture and the auxiliary losses of any gate."""
    if isinstance(gate, Comet):
        mixture_TE, entropy = naive_comet(gate, x_TD)
        return mixture_TE, {"entropy": entropy}
    assert isinstance(gate, TopK)
    return naive_top_k(gate, x_TD), {}


def naive_relabel(mixture_TS: Tensor, table: list[int]) -> Tensor:
    """Slot s becomes expert ``table[s]``."""
    columns = [mixture_TS[:, table.index(expert)] for expert in range(len(table))]
    return torch.stack(columns, dim=1)


def naive_mix(mixture_TS: Tensor, matrix_SS: Tensor) -> Tensor:
    """g'_c = sum_r g_r P[r, c], divided by its sum over c."""
    rows = []
    for g_S in mixture_TS:
        mixed = [sum(g_S[r] * matrix_SS[r, c] for r in range(len(g_S))) for c in range(len(g_S))]
        rows.append(torch.stack([m / sum(mixed) for m in mixed]))
    return torch.stack(rows) if rows else mixture_TS


def naive_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Row by row, then column by column, on the exponentials themselves."""
    matrix = logits.exp()
    for _ in range(iterations):
        matrix = torch.stack([row / row.sum() for row in matrix])
        matrix = torch.stack([column / column.sum() for column in matrix.T]).T
    return matrix


def naive_permutation_entropy(matrix_SS: Tensor) -> Tensor:
    """sum of -P log(P + 1e-6) and of -Q log(Q + 1e-6), Q being P with its rows normalised."""
    entropy = matrix_SS.new_zeros(())
    for row in matrix_SS:
        for p in row:
            q = p / row.sum()
            entropy = entropy - p * (p + 1e-6).log() - q * (q + 1e-6).log()
    return entropy


def naive_experts(mixture_TE: Tensor, x_TD: Tensor, bank: DenseReLUBank) -> Tensor:
    """Every expert on every token, weighted, zero weights included."""
    rows = []
    for g_E, x_D in zip(mixture_TE, x_TD, strict=True):
        results = [torch.relu(x_D @ w_DF + b_F) for w_DF, b_F in zip(bank.weight, bank.bias, strict=True)]
        rows.append(sum((g * y_F for g, y_F in zip(g_E, results, strict=True)), x_TD.new_zeros(bank.out_dim)))
    return torch.stack(rows) if rows else x_TD.new_zeros(0, bank.out_dim)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-10, name: str = "") -> None:
    """Equal to ``tolerance``, absolute for small tensors and relative to the largest entry for large ones."""
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    message = (lambda text: f"{name}: {text}") if name else None
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale, msg=message)


def assert_all_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_same(actual[name], expected[name], tolerance, name)


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """By name; a leaf that is not in the graph is an error."""
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def naive_gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """By name; a leaf that is not in the graph has a zero gradient."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))
