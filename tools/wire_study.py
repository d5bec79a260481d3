"""How far rounding on the wire takes a layer's outputs and gradients from exact ones.

    python tools/wire_study.py --report results/wire.md

One MoE layer of feed-forward experts on four emulated ranks, once per format of the wire, against the same layer in
fp64 on one rank. Everything is seeded; the figures are the same on every machine but for the rounding of fp32 itself.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from dist_moe.experts import FeedForwardBank
from dist_moe.gates import TopK
from dist_moe.layer import MoE
from dist_moe.parallel import WIRES, EmulatedWorld, ExchangeOptions, SingleWorld, World, experts_of_rank

RANKS, EXPERTS, K = 4, 16, 2
OF_A_RANK = ("outputs", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--tokens", type=int, default=256, help="of every rank")
    parser.add_argument("--width", type=int, default=128, help="of a token; experts have twice as many hidden units")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    page = table(options)
    print(page)
    if options.report is not None:
        options.report.write_text(page, encoding="utf-8")


def table(options: argparse.Namespace) -> str:
    """Markdown: relative errors and bytes by format."""
    torch.manual_seed(options.seed)
    gate = TopK(options.width, EXPERTS, K)
    bank = FeedForwardBank(options.width, 2 * options.width, EXPERTS, range(EXPERTS))
    x_TD, cotangent_TF = (torch.randn(RANKS * options.tokens, options.width) for _ in range(2))
    exact = step(SingleWorld(), gate.double(), bank.double(), x_TD.double(), cotangent_TF.double())
    rows = [_row(name, exact, gate.float(), bank.float(), x_TD, cotangent_TF) for name in WIRES]
    sizes = f"--tokens {options.tokens} --width {options.width} --seed {options.seed}"
    return "\n".join(
        [
            "# Rounding on the wire",
            "",
            f"`python tools/wire_study.py {sizes}`: an MoE layer of {EXPERTS} feed-forward experts "
            f"({options.width}-{2 * options.width}-{options.width}, GELU), Top-k gate with k = {K}, "
            f"{options.tokens} normal tokens on each of {RANKS} emulated ranks, fp32, random weights and cotangents, "
            "forward and backward. Errors are Euclidean norms of the difference from the same layer in fp64 on one "
            "rank, over the norm of the exact; bytes are those of a step, over those of `null`.",
            "",
            "| `wire_dtype` | bytes | outputs | gradient of tokens | of the gate | of the experts |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _row(name: str | None, exact: dict[str, Tensor], gate: TopK, bank: FeedForwardBank, *rows: Tensor) -> str:
    sent, actual = _on_ranks(name, gate, bank, *rows)
    plain, _ = _on_ranks(None, gate, bank, *rows)
    errors = [float((actual[part].double() - x).norm() / x.norm()) for part, x in exact.items()]
    return f"| `{name or 'null'}` | {sent / plain:.3f} | " + " | ".join(f"{error:.1e}" for error in errors) + " |"


def _on_ranks(
    name: str | None, gate: TopK, bank: FeedForwardBank, x_TD: Tensor, cotangent_TF: Tensor
) -> tuple[int, dict[str, Tensor]]:
    """Bytes sent by all ranks, and what :func:`step` gives, of all ranks together."""
    world = EmulatedWorld(RANKS, options=ExchangeOptions(WIRES[name]))

    def of_rank(rank: World) -> dict[str, Tensor]:
        return step(rank, gate, bank, x_TD.chunk(RANKS)[rank.rank], cotangent_TF.chunk(RANKS)[rank.rank])

    results = world.run(of_rank)
    joined = {part: torch.cat([result[part] for result in results]) for part in (*OF_A_RANK, "experts")}
    summed = torch.stack([result["gate"] for result in results]).sum(0)
    whole = {"outputs": joined["outputs"], "tokens": joined["tokens"], "gate": summed, "experts": joined["experts"]}
    return sum(rank.traffic.bytes for rank in world.ranks), whole


def step(world: World, gate: TopK, bank: FeedForwardBank, x_TD: Tensor, cotangent_TF: Tensor) -> dict[str, Tensor]:
    """Outputs, and the gradients of tokens, gate and this rank's experts."""
    ids = experts_of_rank(EXPERTS, world)
    mine = FeedForwardBank(bank.dim, bank.hidden, EXPERTS, ids).to(x_TD.dtype)
    mine.load_state_dict({name: weight[ids.start : ids.stop] for name, weight in bank.state_dict().items()})
    layer = MoE(deepcopy(gate), mine, world=world)
    x_TD = x_TD.clone().requires_grad_()
    output_TF = layer(x_TD).outputs[0]
    (output_TF * cotangent_TF).sum().backward()
    gradient = {
        part: torch.cat([p.grad.flatten(start) for p in module.parameters() if p.grad is not None], dim=-1)
        for part, module, start in (("gate", layer.gates, 0), ("experts", mine, 1))
    }
    assert x_TD.grad is not None
    return {"outputs": output_TF.detach(), "tokens": x_TD.grad} | gradient


if __name__ == "__main__":
    main()
