"""The layer on one GPU in bf16: the rate of its training step over that of dense products of the same FLOPs.

    python tools/bench/gpu.py --report results/gpu.md

For every size the candidates take turns, several rounds, forward and backward, each timed with CUDA events;
of each the median counts. Written are ratios within this one run, no bare times. Without a GPU it says so and
ends with code 2.

    dist_moe    the layer with its Top-k gate: routing, permute, experts, weighted un-permute
    experts     its experts alone, rows sorted by expert, evenly loaded
    loop        as many models do it: one expert after the other on the tokens that chose it
    padded      as GShard, DeepSpeed and FairScale do it: every expert gets the rows of the fullest, in one
                batched product; what is sent there and back is not counted
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_moe.experts import FeedForwardBank
from dist_moe.gates import TopK
from dist_moe.layer import MoE

GOAL = 0.8
Step = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """``tokens`` of ``width`` go to ``k`` of ``experts`` gated experts of ``hidden`` units each."""

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int

    @property
    def flops(self) -> int:
        """Operations of the experts' products in a forward and a backward pass: three matrices, three products each."""
        return 3 * 3 * 2 * self.tokens * self.k * self.width * self.hidden

    @property
    def name(self) -> str:
        return f"T {self.tokens}, D {self.width}, F {self.hidden}, {self.experts} experts, k {self.k}"


SIZES = [
    Size(tokens, 2048, hidden, 64, k) for tokens in (16384, 65536) for hidden in (1024, 2048, 4096) for k in (2, 8)
]


@dataclass(frozen=True)
class Result:
    """``seconds``: the median of a step by candidate; "dense" are the products of the same FLOPs.
    ``missing``: why a candidate has no time."""

    size: Size
    seconds: dict[str, float]
    missing: dict[str, str]

    def share(self, candidate: str) -> float | None:
        """Return the share of the dense rate, that is dense time over the candidate's."""
        return self.seconds["dense"] / self.seconds[candidate] if candidate in self.seconds else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("results/gpu.md"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured and no report was written", file=sys.stderr)
        return 2
    torch.manual_seed(options.seed)
    results = [measure(size, options.rounds, torch.device("cuda")) for size in SIZES]
    options.report.write_text(
        report(results, torch.cuda.get_device_name(), options.rounds, options.seed), encoding="utf-8"
    )
    print(f"{options.report}: {verdict(results)}")
    return 0


def measure(size: Size, rounds: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Result:
    """All candidates in turns; one that runs out of memory is left out, with the reason."""
    steps, missing = dict[str, Step](), dict[str, str]()
    for name, make in CANDIDATES.items():
        try:
            steps[name] = make(size, device, dtype)
            steps[name]()
            steps[name]()
        except torch.OutOfMemoryError:
            steps.pop(name, None)
            missing[name] = "out of memory"
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds_of(step, device))
    return Result(size, {name: statistics.median(each) for name, each in times.items()}, missing)


def seconds_of(step: Step, device: torch.device) -> float:
    """Return the seconds of one step, by a GPU's own clock. On a CPU, where only tests measure, by the host's."""
    if device.type == "cpu":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _backward(y: Tensor, leaves: list[Tensor], cotangent: Tensor) -> None:
    torch.autograd.grad(y, leaves, cotangent)


def _drawn(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape, device=device, dtype=dtype) / shape[-2] ** 0.5).requires_grad_()


def _bank(size: Size, device: torch.device, dtype: torch.dtype) -> FeedForwardBank:
    # A bank draws its weights on the CPU, which takes too long at these sizes: a small one gets larger weights.
    bank = FeedForwardBank(16, 16, size.experts, range(size.experts), activation="silu", gated=True)
    bank.dim = bank.out_dim = size.width
    bank.hidden = size.hidden
    for name, shape in {"up": (size.width, size.hidden), "gate": (size.width, size.hidden)}.items():
        setattr(bank, name, nn.Parameter(_drawn(size.experts, *shape, device=device, dtype=dtype)))
    bank.down = nn.Parameter(_drawn(size.experts, size.hidden, size.width, device=device, dtype=dtype))
    return bank


def dense_step(size: Size, device: torch.device, dtype: torch.dtype) -> Step:
    """The nine products, each over all rows with one matrix: what the hardware gives."""
    rows = size.tokens * size.k
    wide, narrow = (_drawn(rows, width, device=device, dtype=dtype).detach() for width in (size.width, size.hidden))
    up, gate = (_drawn(size.width, size.hidden, device=device, dtype=dtype).detach() for _ in range(2))
    down = _drawn(size.hidden, size.width, device=device, dtype=dtype).detach()

    def step() -> None:
        for weight in (up, gate):
            wide @ weight
            narrow @ weight.t()
            wide.t() @ narrow
        narrow @ down
        wide @ down.t()
        narrow.t() @ wide

    return step


def layer_step(size: Size, device: torch.device, dtype: torch.dtype) -> Step:
    """The whole layer on one rank."""
    moe = MoE(TopK(size.width, size.experts, size.k).to(device, dtype), _bank(size, device, dtype))
    x_TD = torch.randn(size.tokens, size.width, device=device, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(size.tokens, size.width, device=device, dtype=dtype)
    leaves = [x_TD, *moe.parameters()]
    return lambda: _backward(moe(x_TD).outputs[0], leaves, cotangent)


def experts_step(size: Size, device: torch.device, dtype: torch.dtype) -> Step:
    """The experts alone, equally many rows for each."""
    bank, rows = _bank(size, device, dtype), size.tokens * size.k // size.experts
    x_ND = torch.randn(rows * size.experts, size.width, device=device, dtype=dtype, requires_grad=True)
    counts_E, cotangent = torch.full((size.experts,), rows, device=device), torch.randn_like(x_ND)
    leaves = [x_ND, *bank.parameters()]
    return lambda: _backward(bank(x_ND, counts_E), leaves, cotangent)


def loop_step(size: Size, device: torch.device, dtype: torch.dtype) -> Step:
    """One expert after the other, each a small network of its own."""
    gate, bank = TopK(size.width, size.experts, size.k).to(device, dtype), _bank(size, device, dtype)
    assert bank.gate is not None
    parts = [[nn.Parameter(w.detach().clone()) for w in weight] for weight in (bank.up, bank.gate, bank.down)]
    x_TD = torch.randn(size.tokens, size.width, device=device, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(size.tokens, size.width, device=device, dtype=dtype)
    leaves = [x_TD, *gate.parameters(), *(weight for part in parts for weight in part)]

    def step() -> None:
        mixture_TE = gate.mixture(x_TD.float(), None).weight_TKE.sum(1)
        y_TD = torch.zeros_like(x_TD)
        for e, (up, gated, down) in enumerate(zip(*parts, strict=True)):
            token_N = mixture_TE[:, e].nonzero().squeeze(1)
            x_ND = x_TD[token_N]
            result_ND = (torch.nn.functional.silu(x_ND @ gated) * (x_ND @ up)) @ down
            y_TD = y_TD.index_add(0, token_N, result_ND * mixture_TE[token_N, e].to(dtype).unsqueeze(1))
        _backward(y_TD, leaves, cotangent)

    return step


def padded_step(size: Size, device: torch.device, dtype: torch.dtype) -> Step:
    """One batched product per matrix; capacity is the load of the fullest expert of this gate."""
    bank = _bank(size, device, dtype)
    gate = TopK(size.width, size.experts, size.k).to(device, dtype)
    x_TD = torch.randn(size.tokens, size.width, device=device, dtype=dtype)
    fullest = int(MoE(gate, bank)(x_TD).pairs.rows_per_expert_E.max())
    x_END = torch.randn(size.experts, fullest, size.width, device=device, dtype=dtype, requires_grad=True)
    cotangent, leaves = torch.randn_like(x_END), [x_END, *bank.parameters()]
    assert bank.gate is not None
    gated = bank.gate
    return lambda: _backward(
        (torch.nn.functional.silu(x_END @ gated) * (x_END @ bank.up)) @ bank.down, leaves, cotangent
    )


CANDIDATES: dict[str, Callable[[Size, torch.device, torch.dtype], Step]] = {
    "dense": dense_step,
    "dist_moe": layer_step,
    "experts": experts_step,
    "loop": loop_step,
    "padded": padded_step,
}


def report(results: list[Result], device: str, rounds: int, seed: int) -> str:
    """Markdown: per size each candidate's share of the dense rate."""
    columns = [name for name in CANDIDATES if name != "dense"]
    lines = [
        "# The layer on one GPU",
        "",
        f"`python tools/bench/gpu.py --rounds {rounds} --seed {seed}` on one {device}, bf16,",
        f"torch {torch.__version__}.",
        "Share of the rate of dense products of the same FLOPs, forward and backward; medians of alternating rounds.",
        "",
        "| size | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    cells = ([result.size.name, *(_cell(result, name) for name in columns)] for result in results)
    lines += (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([*lines, "", verdict(results), ""])


def verdict(results: list[Result]) -> str:
    """One sentence about the goal."""
    shares = [(result.share("dist_moe") or 0.0, result.size.name) for result in results]
    reached = sum(share >= GOAL for share, _ in shares)
    lowest, where = min(shares)
    return f"dist_moe reaches {GOAL:.0%} in {reached} of {len(shares)} sizes; lowest: {lowest:.0%} at {where}."


def _cell(result: Result, name: str) -> str:
    share = result.share(name)
    return result.missing.get(name, "-") if share is None else f"{share:.0%}"


if __name__ == "__main__":
    sys.exit(main())
