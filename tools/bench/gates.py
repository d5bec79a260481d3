"""The cost of a COMET gate with hard trees against a linear top-k router over the same experts.

    python -m tools.bench.gates --report results/bench_gates.md

Candidates take turns on the same tokens, forward and backward, gradients to tokens and all parameters; what is
printed are ratios of medians, which a busy machine hits alike. ``linear`` is a bare router, ``x @ W.T``,
``torch.topk``, softmax; ``top_k`` our gate of that name; ``comet`` the lazy route; ``comet, read`` the same with the
norm of every gradient computed after it, as clipping does: a gradient of which most pages were never written costs
its zeros only when it is read.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_moe.engine.launch.environment import disable_malloc_trim
from dist_moe.gates import Comet, Gate, TopK
from tools.bench.timing import interleaved

EXPERTS = (1024, 16384, 65536)
TARGETS = {1024: 1.0, 16384: 5.0, 65536: 20.0}
HARDNESS = 1000.0
HEADER = ["n", "T", "D", "leaves per token", "linear / comet", "linear / comet, read", "top_k / comet", "target"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-logits", type=int, default=2**28, help="leave out a linear router with more than these")
    parser.add_argument("--gate-up-to", type=int, default=16384, help="experts up to which our top_k gate runs too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--disable-malloc-trim", action="store_true", help="as the engine asks of glibc in training")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    if options.disable_malloc_trim and not disable_malloc_trim():
        parser.error("--disable-malloc-trim: there is no glibc")
    rows = []
    for n in options.experts:
        for tokens in options.tokens:
            for width in options.widths:
                if n * tokens <= options.most_logits:
                    rows.append(measure(n, tokens, width, options))
                    print(" | ".join(rows[-1]), flush=True)
    text = page(rows, options)
    print(text)
    if options.report is not None:
        options.report.parent.mkdir(exist_ok=True)
        options.report.write_text(text, encoding="utf-8")


def measure(n: int, tokens: int, width: int, options: argparse.Namespace) -> list[str]:
    """One row of the table."""
    torch.manual_seed(options.seed)
    x_TD = torch.randn(tokens, width, device=options.device, requires_grad=True)
    comet = Comet(width, n, options.k, lazy=True).to(options.device)
    harden(comet)
    candidates = {
        "comet": lambda: step_of_gate(comet, x_TD),
        "comet, read": lambda: (step_of_gate(comet, x_TD), norm_of_gradients(comet)),
        "linear": step_of_linear_router(n, options.k, x_TD),
    }
    if n <= options.gate_up_to:
        top_k = TopK(width, n, options.k).to(options.device)
        candidates["top_k"] = lambda: step_of_gate(top_k, x_TD)
    leaves = comet(x_TD).num_assignments / tokens
    seconds = {
        name: statistics.median(each)
        for name, each in interleaved(candidates, options.repetitions, before_each=gc.collect).items()
    }
    ratios = [ratio(seconds, *names) for names in (("linear", "comet"), ("linear", "comet, read"), ("top_k", "comet"))]
    target = f">= {TARGETS[n]:g}" if n in TARGETS else "-"
    return [str(n), str(tokens), str(width), f"{leaves:.2f}", *ratios, target]


def harden(gate: Comet) -> None:
    """Split weights so large against gamma that nearly all splits saturate."""
    with torch.no_grad():
        gate.split_weight.normal_().mul_(HARDNESS * gate.gamma)


def step_of_gate(gate: Gate, x_TD: Tensor) -> None:
    """Forward and backward, from weights and auxiliary losses to tokens and parameters."""
    forget_gradients([x_TD, *gate.parameters()])
    route = gate(x_TD)
    (route.weight_N.square().sum() + sum(route.aux.values())).backward()
    wait(x_TD)


def step_of_linear_router(n: int, k: int, x_TD: Tensor) -> Callable[[], None]:
    """Return a step of a bare linear router, by autograd."""
    weight_ED = nn.Parameter(torch.randn(n, x_TD.shape[1], device=x_TD.device) / x_TD.shape[1] ** 0.5)

    def step() -> None:
        forget_gradients([x_TD, weight_ED])
        kept_TK, _ = torch.topk(x_TD @ weight_ED.T, k)
        kept_TK.softmax(dim=-1).square().sum().backward()
        wait(x_TD)

    return step


def norm_of_gradients(gate: Gate) -> float:
    """Compute the norm as clipping does: every gradient is read once."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in gate.parameters() if p.grad is not None]))


def forget_gradients(tensors: Sequence[Tensor]) -> None:
    """Forget the gradients, as ``zero_grad`` does at the start of a step."""
    for tensor in tensors:
        tensor.grad = None


def wait(x: Tensor) -> None:
    """For a device that works on its own."""
    if x.is_cuda:
        torch.cuda.synchronize()


def ratio(seconds: dict[str, float], above: str, below: str) -> str:
    return f"{seconds[above] / seconds[below]:.2f}" if above in seconds else "-"


def page(rows: list[list[str]], options: argparse.Namespace) -> str:
    """The report."""
    sizes = " ".join(map(str, options.experts))
    command = f"python -m tools.bench.gates --experts {sizes} --tokens {' '.join(map(str, options.tokens))}"
    command += f" --widths {' '.join(map(str, options.widths))} --k {options.k}"
    command += f" --repetitions {options.repetitions} --seed {options.seed}"
    if options.disable_malloc_trim:
        command += " --disable-malloc-trim"
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    return "\n".join(
        [
            "# The COMET gate against a linear router",
            "",
            f"`{command}`: forward and backward, fp32, k = {options.k}; trees hardened; {device}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}. Ratios of medians of "
            f"{options.repetitions} repetitions in turn, after one that is not counted; above 1, COMET is cheaper.",
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    )


if __name__ == "__main__":
    main()
