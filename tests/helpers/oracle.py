"""The naive fp64 version of every fast path: loops over tokens, trees, leaves, slots and experts."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import Comet, DSelectK, Gate, HashRouting, NullSlots, ReLU, SMoEDropout, Softmax, TopK


def naive_smooth_step(t: Tensor, gamma: float) -> Tensor:
    """The cubic as the paper prints it, of one number."""
    if t <= -gamma / 2:
        return torch.zeros_like(t)
    if t >= gamma / 2:
        return torch.ones_like(t)
    return -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5


def naive_allowed(gate: Gate) -> list[bool]:
    """Whether the gate may choose each of its slots."""
    return [True] * gate.num_experts if gate.allowed_E is None else gate.allowed_E.tolist()


def naive_one_sided(left_Q: list[Tensor], allowed: list[bool]) -> list[Tensor]:
    """The probabilities of going left, 1 or 0 where one side alone has leaves that are allowed."""
    has = [below > 0 for below in naive_open_leaves(len(left_Q), allowed)]
    turned = []
    for node, left in enumerate(left_Q):
        first, second = has[2 * node + 1], has[2 * node + 2]
        turned.append(left if first == second else torch.full_like(left, float(first)))
    return turned


def naive_open_leaves(num_splits: int, allowed: list[bool]) -> list[int]:
    """Per node of the heap, how many allowed leaves are below it."""
    leaves = iter(allowed)

    def count(node: int, below: dict[int, int]) -> int:
        if node >= num_splits:
            below[node] = int(next(leaves))
        else:
            below[node] = count(2 * node + 1, below) + count(2 * node + 2, below)
        return below[node]

    below: dict[int, int] = {}
    count(0, below)
    return [below[node] for node in range(2 * num_splits + 1)]


def naive_leaf_masses(left_Q: list[Tensor]) -> list[Tensor]:
    """Recursive descent of one heap-ordered tree; leaves from left to right."""

    def descend(node: int, mass: Tensor) -> list[Tensor]:
        if node >= len(left_Q):
            return [mass]
        left = left_Q[node]
        return descend(2 * node + 1, mass * left) + descend(2 * node + 2, mass * (1 - left))

    return descend(0, torch.ones_like(left_Q[0]))


def _comet_branches(gate: Comet, x_TD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    rows, entropy = [], x_TD.new_zeros(())
    left_KQ = x_TD.new_zeros(gate.k, gate.num_experts - 1)
    reached_KQ = torch.zeros_like(left_KQ)
    for x_D in x_TD:
        shares = []
        for tree in range(gate.k):
            lefts = [_comet_left(gate, t) for t in _planes(gate, "split", x_D, tree)]
            lefts = naive_one_sided(lefts, naive_allowed(gate))
            masses = naive_leaf_masses(lefts)
            logits = _planes(gate, "leaf", x_D, tree)
            shares.append(torch.stack([mass * logit.exp() for mass, logit in zip(masses, logits, strict=True)]))
            entropy = entropy + _naive_entropy(masses)
            reached = torch.stack(_naive_split_masses(lefts))
            left_KQ = left_KQ + _one_row(gate.k, tree, reached * torch.stack(lefts))
            reached_KQ = reached_KQ + _one_row(gate.k, tree, reached)
        rows.append(_naive_cap(gate, torch.stack(shares)))
    aux = {"entropy": gate.entropy_weight * entropy / max(len(x_TD), 1)}
    if gate.balance_weight and gate.training:
        below = naive_open_leaves(gate.num_experts - 1, naive_allowed(gate))
        free = [q for q in range(gate.num_experts - 1) if bool(below[2 * q + 1]) == bool(below[2 * q + 2])]
        aux["split_balance"] = gate.balance_weight * naive_split_balance(left_KQ[:, free], reached_KQ[:, free])
    return _stacked(rows, x_TD, gate.k, gate.num_experts), aux


def _planes(gate: Comet | DSelectK, part: str, x_D: Tensor, branch: int) -> list[Tensor]:
    """Values of one tree's or one selector's hyperplanes; of a static gate, the biases."""
    biases = getattr(gate, f"{part}_bias")[branch].unbind()
    if gate.static:
        return list(biases)
    return [w_D @ x_D + b for w_D, b in zip(getattr(gate, f"{part}_weight")[branch], biases, strict=True)]


def _comet_left(gate: Comet, t: Tensor) -> Tensor:
    if gate.hard_evaluation and not gate.training:
        return torch.ones_like(t) if t >= 0 else torch.zeros_like(t)
    return naive_smooth_step(t, gate.gamma)


def _naive_split_masses(left_Q: list[Tensor]) -> list[Tensor]:
    """The mass that reaches each split: the product along its way from the root."""
    masses = [torch.ones_like(left_Q[0])]
    for node in range(1, len(left_Q)):
        parent = (node - 1) // 2
        masses.append(masses[parent] * (left_Q[parent] if node == 2 * parent + 1 else 1 - left_Q[parent]))
    return masses


def _one_row(rows: int, row: int, values_Q: Tensor) -> Tensor:
    """(rows, q), zero but for one row."""
    return torch.stack([values_Q if each == row else torch.zeros_like(values_Q) for each in range(rows)])


def _naive_cap(gate: Comet, share_KE: Tensor) -> Tensor:
    """Divide by the sum of all, or of the ``max_active`` heaviest slots, the others being zeroed."""
    if gate.max_active is not None:
        slots = share_KE.flatten() if gate.splits_branches else share_KE.sum(dim=0)
        kept = naive_largest(slots, gate.max_active)
        kept_S = torch.tensor([s in kept for s in range(len(slots))])
        share_KE = share_KE * (kept_S.view_as(share_KE) if gate.splits_branches else kept_S)
    return share_KE / share_KE.sum()


def naive_split_balance(left_KQ: Tensor, reached_KQ: Tensor) -> Tensor:
    """Mean over trees of the sum over splits of -(log alpha + log(1 - alpha)) / 2."""
    penalty = left_KQ.new_zeros(())
    for left_Q, reached_Q in zip(left_KQ, reached_KQ, strict=True):
        for left, reached in zip(left_Q, reached_Q, strict=True):
            alpha = left / (reached + 1e-6)
            penalty = penalty - 0.5 * ((alpha + 1e-6).log() + (1 - alpha + 1e-6).log())
    return penalty / len(left_KQ)


def _naive_entropy(masses: list[Tensor]) -> Tensor:
    return sum((-mass * (mass + 1e-6).log() for mass in masses), torch.zeros_like(masses[0]))


def naive_largest(scores: Tensor | list[Tensor], k: int, allowed: list[bool] | None = None) -> list[int]:
    """Places of the k largest that are allowed, of equal ones the first."""
    places = [place for place in range(len(scores)) if allowed is None or allowed[place]]
    return sorted(places, key=lambda place: scores[place].item(), reverse=True)[:k]


def _top_k_branches(gate: TopK, x_TD: Tensor) -> tuple[Tensor, dict[str, Tensor], list[list[Tensor]]]:
    """Branches, losses, and the router probabilities of every token over all slots."""
    rows, chosen, probabilities, z = [], [], [], x_TD.new_zeros(())
    noisy, allowed = gate.noise_weight is not None and gate.training, naive_allowed(gate)
    noise_TE = torch.randn(len(x_TD), gate.num_experts, dtype=x_TD.dtype) if noisy else None
    for token, x_D in enumerate(x_TD):
        logits = [w_D @ x_D + b for w_D, b in zip(gate.weight, gate.bias, strict=True)]
        if noise_TE is not None:
            deviations = [(1 + (w_D @ x_D).exp()).log() for w_D in gate.noise_weight]
            logits = [logit + n * d for logit, n, d in zip(logits, noise_TE[token], deviations, strict=True)]
        scores = [1 / (1 + (-logit).exp()) if gate.scores == "sigmoid" else logit.exp() for logit in logits]
        scores = [score if open_ else 0 * score for score, open_ in zip(scores, allowed, strict=True)]
        probabilities.append([score / sum(scores) for score in scores])
        kept = naive_largest(_top_k_preferences(gate, scores, probabilities[-1]), gate.k, allowed)
        total = sum(scores) if gate.scores == "softmax_before" else sum(scores[e] for e in kept)
        zero = x_TD.new_zeros(())
        rows.append(torch.stack([scores[e] / total if e in kept else zero for e in range(len(logits))]).unsqueeze(0))
        chosen.append(kept)
        z = z + sum(logit.exp() for logit, open_ in zip(logits, allowed, strict=True) if open_).log() ** 2
    aux = {}
    if gate.training and gate.balance_weight:
        aux["load_balance"] = gate.balance_weight * naive_load_balance(
            chosen, probabilities, gate.num_experts, excluded=allowed.count(False)
        )
    if gate.training and gate.z_loss_weight:
        aux["z_loss"] = gate.z_loss_weight * z / max(len(x_TD), 1)
    return _stacked(rows, x_TD, 1, gate.num_experts), aux, probabilities


def _top_k_preferences(gate: TopK, scores: list[Tensor], probabilities: list[Tensor]) -> list[Tensor]:
    if not gate.bias_update_rate:
        return scores
    biased = scores if gate.scores == "sigmoid" else probabilities
    return [score + bias for score, bias in zip(biased, gate.selection_bias, strict=True)]


def naive_load_balance(
    chosen: list[list[int]], probabilities: list[list[Tensor]], num_slots: int, num_null: int = 0, excluded: int = 0
) -> Tensor:
    """S sum_i f_i P_i, S without ``excluded`` slots; the nulls, the last slots, share f."""
    selections = sum(len(slots) for slots in chosen)
    share = [sum(slots.count(s) for slots in chosen) / max(selections, 1) for s in range(num_slots)]
    null = range(num_slots - num_null, num_slots)
    bucket = sum(share[s] for s in null) / max(num_null, 1)
    loss = torch.zeros((), dtype=torch.float64)
    for row in probabilities:
        for slot, probability in enumerate(row):
            loss = loss + (bucket if slot in null else share[slot]) * probability / len(probabilities)
    return (num_slots - excluded) * loss


def _dselect_k_branches(gate: DSelectK, x_TD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    rows, entropy, reciprocal = [], x_TD.new_zeros(()), x_TD.new_zeros(())
    for x_D in x_TD:
        alphas = [b if gate.static else gate.selector_weight[j] @ x_D + b for j, b in enumerate(gate.selector_bias)]
        row = []
        for j in range(gate.k):
            bits = [naive_smooth_step(t, gate.gamma) for t in _planes(gate, "bit", x_D, j)]
            codes = []
            for expert in range(gate.num_experts):
                factors = [_naive_bit(gate, expert, b, z) for b, z in enumerate(bits)]
                code = factors[0]
                for factor in factors[1:]:
                    code = code * factor
                codes.append(code)
            row.append(alphas[j].exp() / sum(alpha.exp() for alpha in alphas) * torch.stack(codes))
            entropy = entropy + _naive_entropy(codes)
            reciprocal = reciprocal + 1 / (sum(codes) + 1e-6)
        rows.append(torch.stack(row))
    aux = {"entropy": gate.entropy_weight * entropy / max(len(x_TD), 1)}
    if bin(gate.num_experts).count("1") != 1:
        aux["reciprocal"] = gate.reciprocal_weight * reciprocal / max(len(x_TD), 1)
    return _stacked(rows, x_TD, gate.k, gate.num_experts), aux


def _naive_bit(gate: DSelectK, code: int, bit: int, one: Tensor) -> Tensor:
    """The probability that a selector that chose the bits of ``code`` below ``bit`` chooses this one, too."""
    allowed = naive_allowed(gate) + [True] * (2**gate.num_bits - gate.num_experts)
    same = [c for c, open_ in enumerate(allowed) if open_ and c % 2**bit == code % 2**bit]
    values = {(c >> bit) & 1 for c in same}
    wanted = (code >> bit) & 1
    if len(values) < 2:
        return torch.full_like(one, float(wanted in values))
    return one if wanted else 1 - one


def _linear_branches(gate: Softmax | SMoEDropout, x_TD: Tensor) -> Tensor:
    k = gate.num_experts
    if isinstance(gate, SMoEDropout):
        own_k = gate.evaluation_k is not None and not gate.training
        k = gate.evaluation_k if own_k else gate.k_at(int(gate.step))
    rows = []
    for x_D in x_TD:
        logits = [w_D @ x_D + b for w_D, b in zip(gate.weight, gate.bias, strict=True)]
        kept = naive_largest(logits, k, naive_allowed(gate))
        total, zero = sum(logits[e].exp() for e in kept), x_TD.new_zeros(())
        rows.append(torch.stack([logits[e].exp() / total if e in kept else zero for e in range(len(logits))]))
    return _stacked([row.unsqueeze(0) for row in rows], x_TD, 1, gate.num_experts)


def _relu_branches(gate: ReLU, x_TD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    allowed, rows = naive_allowed(gate), []
    for x_D in x_TD:
        logits = [w_D @ x_D for w_D in gate.weight]
        rows.append([logit * float(open_ and logit > 0) for logit, open_ in zip(logits, allowed, strict=True)])
    loss, tokens = x_TD.new_zeros(()), max(len(rows), 1)
    for expert in range(gate.num_experts):
        weights = [row[expert] for row in rows]
        busy = sum(1 for weight in weights if weight > 0) * sum(allowed) / (gate.k * tokens) if gate.balance else 1.0
        loss = loss + busy * sum(weights, x_TD.new_zeros(())) / tokens
    aux = {"l1": gate.first_l1_weight * 1.2 ** int(gate.l1_steps) * loss} if gate.training else {}
    return _stacked([torch.stack(row).unsqueeze(0) for row in rows], x_TD, 1, gate.num_experts), aux


def _null_branches(gate: NullSlots, x_TD: Tensor, ids_T: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    inner, num_slots = gate.gate, gate.num_experts + gate.null_slots
    if isinstance(inner, TopK):
        inner_TKS, aux, probabilities = _top_k_branches(inner, x_TD)
    else:
        inner_TKS, aux = _branches(inner, x_TD, ids_T)
        probabilities = [list(row_S) for row_S in inner_TKS.sum(dim=1)]
    chosen = [row_S.nonzero().flatten().tolist() for row_S in inner_TKS.sum(dim=1)]
    if gate.balance_weight and gate.training:
        excluded = naive_allowed(gate).count(False)
        loss = naive_load_balance(chosen, probabilities, num_slots, gate.null_slots, excluded)
        aux = aux | {"null_balance": gate.balance_weight * loss}
    rows = []
    for row_KS, slots in zip(inner_TKS, chosen, strict=True):
        row_KE = row_KS[:, : gate.num_experts]
        true = [slot for slot in slots if slot < gate.num_experts]
        rows.append(row_KE / row_KE.sum() if true and len(true) < len(slots) else row_KE)
    return _stacked(rows, x_TD, gate.num_branches, gate.num_experts), aux


def _hash_branches(gate: HashRouting, x_TD: Tensor, ids_T: Tensor | None) -> Tensor:
    assert ids_T is not None
    table = gate.table.tolist()
    rows = [[float(table[each] == expert) for expert in range(gate.num_experts)] for each in ids_T.tolist()]
    return torch.tensor(rows, dtype=x_TD.dtype).view(len(x_TD), 1, gate.num_experts)


def _stacked(rows: list[Tensor], x_TD: Tensor, branches: int, num_experts: int) -> Tensor:
    return torch.stack(rows) if rows else x_TD.new_zeros(0, branches, num_experts)


def _branches(gate: Gate, x_TD: Tensor, ids_T: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """(T, branches, n) and the auxiliary losses of any gate."""
    if isinstance(gate, Comet):
        return _comet_branches(gate, x_TD)
    if isinstance(gate, TopK):
        return _top_k_branches(gate, x_TD)[:2]
    if isinstance(gate, DSelectK):
        return _dselect_k_branches(gate, x_TD)
    if isinstance(gate, NullSlots):
        return _null_branches(gate, x_TD, ids_T)
    if isinstance(gate, HashRouting):
        return _hash_branches(gate, x_TD, ids_T), {}
    if isinstance(gate, ReLU):
        return _relu_branches(gate, x_TD)
    assert isinstance(gate, Softmax | SMoEDropout)
    return _linear_branches(gate, x_TD), {}


def _slots(gate: Gate, branches_TKE: Tensor) -> Tensor:
    return branches_TKE.flatten(1) if gate.splits_branches else branches_TKE.sum(dim=1)


def naive_gate(gate: Gate, x_TD: Tensor, ids_T: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """(T, slots) mixture and the auxiliary losses of any gate, of a single rank."""
    branches_TKE, aux = _branches(gate, x_TD, ids_T)
    return _slots(gate, branches_TKE), aux


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
