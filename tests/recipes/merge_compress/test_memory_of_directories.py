"""The memory in which a large directory is compressed: that of a layer, however many there are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

from dist_moe.engine.checkpoint import ModelWeights
from dist_moe.engine.checkpoint.format import BUFFER, DENSE, EXPERTS
from dist_moe.engine.checkpoint.safetensors_writer import TensorSpec
from dist_moe.experts import FeedForwardConfig
from dist_moe.gates import TopKConfig
from dist_moe.models import RunShape, TransformerConfig
from dist_moe.models.hugging_face.decoder import write_decoder_weights
from dist_moe.parallel import SingleWorld
from tests.data.text.test_own_tokenizer import byte_level

LARGE = {"layers": 24, "num_experts": 64, "dim": 256, "experts": FeedForwardConfig(hidden=512)}
SMALL = {"layers": 1, "num_experts": 64, "dim": 16, "experts": FeedForwardConfig(hidden=8)}

_COMPRESS = """
import json, resource, sys, time
from dist_moe.cli.main import main

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large, out, *options = sys.argv[1:]
assert main(["compress", small, out + "-small", *options]) == 0  # libraries are loaded, the text is prepared
before, start = peak(), time.perf_counter()
assert main(["compress", large, out, *options]) == 0
print(json.dumps({"bytes": peak() - before, "seconds": time.perf_counter() - start}))
"""


def write_random_mixture(directory: Path, sizes: dict[str, Any]) -> float:
    """A Mixtral of random numbers, none of whose layers is ever in memory; the bytes of a layer."""
    tokenizer = byte_level()
    gate = TopKConfig(k=2, bias=False)
    config = TransformerConfig(**sizes, heads=4, moe_every=1, gate=gate, tied_embeddings=False)
    vocabulary = tokenizer.get_vocab_size()
    with torch.device("meta"):
        model = config.build(vocabulary, RunShape(SingleWorld(), 1))
    specs = {name: TensorSpec.of(tensor) for name, tensor in model.state_dict().items()}
    kinds = {name: EXPERTS if ".experts." in name else DENSE for name in specs}
    kinds |= {name: BUFFER for name in specs if name.endswith(".table")}

    def read(name: str, expert: int | None) -> Tensor:
        spec = specs[name]
        if kinds[name] == BUFFER:
            return torch.arange(config.num_experts).view(spec.shape)
        generator = torch.Generator().manual_seed(crc32(f"{name} {expert}".encode()))
        shape = spec.shape if expert is None else spec.shape[1:]
        return torch.ones(shape) if "norm" in name else 0.05 * torch.randn(shape, generator=generator)

    write_decoder_weights(
        ModelWeights(kinds, specs, read),
        config,
        vocabulary,
        directory,
        tokenizer=tokenizer,
        end_of_text=tokenizer.token_to_id("<|endoftext|>"),
    )
    return sum(spec.num_bytes for name, spec in specs.items() if name.startswith("layers.0."))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_peak_memory_is_below_two_layers_and_a_half(tmp_path: Path, tiny_text: dict[str, str]) -> None:
    """Of 24 layers of 64 experts, 2.4 GB: calibrated by results, aligned, merged, folded, compared, written."""
    write_random_mixture(tmp_path / "small", SMALL)
    layer = write_random_mixture(tmp_path / "large", LARGE)
    data = [f"data.{name}={value}" for name, value in tiny_text.items()]
    options = [*data, "data.sequence_length=32", "examples=32", "--experts=32", "similarity=outputs", "--as=stock"]
    arguments = [*map(str, (tmp_path / "small", tmp_path / "large", tmp_path / "out")), *options]
    done = subprocess.run(
        [sys.executable, "-c", _COMPRESS, *arguments], capture_output=True, text=True, encoding="utf-8", timeout=2900
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    layers, seconds = found["bytes"] / layer, found["seconds"] / LARGE["layers"]
    took = f"{layers:.2f} layers of {layer / 2**20:.0f} MiB, {seconds:.1f} s a layer"
    print(took)
    assert layers < 2.5, took
