"""Whole training steps: the same model, loss and ZeRO 1, once with our layer and engine, once on DeepSpeed's MoE.

    python -m tools.bench.steps --output results/bench_steps.md

"recommender": the COMET paper's for MovieLens-1M, with a single Top-2 gate, because DeepSpeed's layer has one.
"transformer": four pre-norm blocks, each of attention and an MoE of feed-forward experts. Random tokens; both
models begin with the same weights, and their first losses must be equal before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_moe.engine.deepspeed.config import complete_deepspeed_section, import_deepspeed
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch.environment import LaunchEnvironment, disable_malloc_trim
from dist_moe.engine.launch.process_groups import ParallelConfig, ProcessGroups, process_groups
from dist_moe.experts import FeedForwardBank
from dist_moe.gates import TopK
from dist_moe.layer import MoE
from tools.bench.timing import Spread, interleaved, ratio

MakeMoE = Callable[[], nn.Module]
"""A layer: (T, width) -> (T, width)."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the layer of experts, and the tokens of a step."""

    width: int
    hidden: int
    experts: int
    tokens: int
    k: int = 2


class OurMoE(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        bank = FeedForwardBank(sizes.width, sizes.hidden, sizes.experts, range(sizes.experts), activation="relu")
        self.moe = MoE(TopK(sizes.width, sizes.experts, sizes.k), bank)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.moe(x_TD).outputs[0]


class ReLUExpert(nn.Module):
    """A model as a user of DeepSpeed's layer writes it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.up = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class TheirMoE(nn.Module):
    """DeepSpeed's layer without its random choices, with nothing dropped."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE as DeepSpeedMoE

        self.moe = DeepSpeedMoE(
            sizes.width,
            ReLUExpert(sizes),
            sizes.experts,
            k=sizes.k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        output_TD: Tensor = self.moe(x_TD)[0]
        return output_TD


class Recommender(nn.Module):
    """Users and items of MovieLens-1M, two towers on one mixture."""

    def __init__(self, make_moe: MakeMoE, width: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(6040, width // 2), nn.Embedding(3706, width // 2)
        self.moe = make_moe()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)) for _ in range(2)
        )

    def forward(self, ids_T: Tensor) -> Tensor:
        x_TD = torch.cat([self.user(ids_T % 6040), self.item(ids_T % 3706)], dim=1)
        mixed_TD = self.moe(x_TD)
        return torch.stack([tower(mixed_TD).square().mean() for tower in self.towers]).sum()


class Block(nn.Module):
    def __init__(self, make_moe: MakeMoE, width: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_moe = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.moe = make_moe()

    def forward(self, x_BTD: Tensor) -> Tensor:
        parts = self.queries_keys_values(self.before_attention(x_BTD)).chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).flatten(2))
        return x_BTD + self.moe(self.before_moe(x_BTD).flatten(0, 1)).view_as(x_BTD)


class Transformer(nn.Module):
    """Next-token loss over 4,096 symbols, sequences of 128."""

    def __init__(self, make_moe: MakeMoE, width: int, blocks: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4096, width)
        self.blocks = nn.Sequential(*(Block(make_moe, width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids_T: Tensor) -> Tensor:
        ids_BT = ids_T.view(-1, 128)
        logits_BTV = F.linear(self.norm(self.blocks(self.embedding(ids_BT))), self.embedding.weight)
        return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


MODELS: dict[str, tuple[Callable[[MakeMoE, int], nn.Module], Sizes]] = {
    "recommender, 16 experts, batch 512": (Recommender, Sizes(256, 256, 16, 512)),
    "transformer, 8 experts, 1,024 tokens": (Transformer, Sizes(256, 512, 8, 1024)),
    "transformer, 64 experts, 2,048 tokens": (Transformer, Sizes(256, 512, 64, 2048)),
}


def start_alike(ours: nn.Module, theirs: nn.Module) -> None:
    """Give ``theirs`` the weights of ``ours``. Raises KeyError for a parameter that none of ours matches."""
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            layer, deepspeed, rest = name.partition("moe.moe.deepspeed_moe.")
            if not deepspeed:
                parameter.copy_(mine[name])
            elif rest.startswith("gate."):
                parameter.copy_(mine[f"{layer}moe.moe.gates.0.weight"])
            else:
                *_, expert, matrix, _ = rest.split(".")  # experts.deepspeed_experts.EXPERT.MATRIX.weight
                parameter.copy_(mine[f"{layer}moe.moe.experts.{matrix}"][int(expert)].T)


def our_engine(model: nn.Module, groups: ProcessGroups, tokens: int) -> ExpertParallelEngine:
    return ExpertParallelEngine(model, complete_deepspeed_section(_section(), tokens, 1), groups)


def their_engine(model: nn.Module, tokens: int) -> nn.Module:
    """Set DeepSpeed's layer up as its tutorial does; torch's AdamW, because theirs is compiled first on a CPU."""
    deepspeed = import_deepspeed()
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    config = _section() | {"train_batch_size": tokens, "steps_per_print": 2**31 - 1}
    config["optimizer"]["params"]["torch_adam"] = True
    engine: nn.Module = deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]
    return engine


def _section() -> dict[str, Any]:
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.0}},
        "zero_optimization": {"stage": 1},
    }


def step(engine: Any, ids_T: Tensor) -> float:
    """Forward, backward and update; the loss before it."""
    loss: Tensor = engine(ids_T)
    engine.backward(loss)
    engine.step()
    return loss.item()


def compare(name: str, groups: ProcessGroups, repetitions: int) -> tuple[Spread, dict[str, float]]:
    """Their time over ours, of the same step; and the medians in seconds.

    Raises AssertionError if the losses of the first two steps differ by more than 1e-4 of their value.
    """
    make_model, sizes = MODELS[name]
    torch.manual_seed(0)
    ours = make_model(lambda: OurMoE(sizes), sizes.width)
    for gate in (module for module in ours.modules() if isinstance(module, TopK)):
        gate.bias.requires_grad_(False)  # theirs has none
    theirs = make_model(lambda: TheirMoE(sizes), sizes.width)
    start_alike(ours, theirs)
    ids_T = torch.randint(4096, (sizes.tokens,))
    engines = {"ours": our_engine(ours, groups, sizes.tokens), "theirs": their_engine(theirs, sizes.tokens)}
    for number in range(2):  # the second after an update by each
        losses = {which: step(engine, ids_T) for which, engine in engines.items()}
        difference = abs(losses["ours"] - losses["theirs"])
        assert difference < 1e-4 * abs(losses["ours"]), f"{name}, step {number}: the losses are {losses}"
    seconds = interleaved({which: partial(step, engine, ids_T) for which, engine in engines.items()}, repetitions)
    return ratio(seconds["theirs"], seconds["ours"]), {which: Spread.of(s).median for which, s in seconds.items()}


def table(found: dict[str, Spread], threads: int, repetitions: int) -> str:
    """Markdown."""
    lines = [
        "# Whole training steps beside DeepSpeed's MoE",
        "",
        f"`python -m tools.bench.steps`, seed 0, {os.cpu_count()} cores, {platform.machine()}, {threads} threads, "
        f"torch {torch.__version__}, one rank, ZeRO 1, AdamW, fp32, Top-2; {repetitions} steps each, by turns. "
        "Same weights, same losses.",
        "",
        "| model | DeepSpeed MoE (dropless) over ours, median | quartiles |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name} | {s.median:.2f} | {s.low:.2f} to {s.high:.2f} |" for name, s in found.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole training steps beside DeepSpeed's MoE.")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="models with that in their name")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_malloc_trim()
    found = {}
    environment = LaunchEnvironment(launched=True)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    with process_groups(environment, ParallelConfig()) as groups:
        for name in (name for name in MODELS if options.only in name):
            found[name], seconds = compare(name, groups, options.repetitions)
            print(f"{name}: {found[name]}, {seconds}", flush=True)
    if options.output:
        options.output.write_text(table(found, options.threads, options.repetitions), encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
