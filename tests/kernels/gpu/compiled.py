"""Compile every Triton kernel for a GPU that need not be there, to its machine code: prints what each needs.

    python -m tests.kernels.gpu.compiled 90 bfloat16        # compute capability 9.0

The launches are real ones on CPU tensors, except that compiling stands in for launching.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dist_moe.kernels.gpu import triton_gemm, triton_rows

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}


def compiled(function: JITFunction, capability: int, *arguments: Any, **options: Any) -> str:
    """One line about the machine code for these arguments of a launch. Raises what Triton raises."""
    names, constants, aligned = function.arg_names, {}, [["tt.divisibility", 16]]
    attributes = {}
    signature = dict.fromkeys(names, "constexpr")
    for i, (name, value) in enumerate(zip(names, arguments, strict=False)):
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = aligned  # as a launch would find it: only then are loads wide and pipelined
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif value == 1:
            constants[name] = value
        else:
            signature[name] = "i32"
    settings = {name: value for name, value in options.items() if name not in names}
    constants |= {name: value for name, value in options.items() if name in names}
    source = ASTSource(
        function, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)
    assert made.asm["cubin"]
    assert made.metadata.shared <= SHARED_BYTES[capability], made.metadata.shared
    return f"{function.__name__} {dict(options)}: {made.metadata.shared} bytes of shared memory"


class Launches:
    """In place of a kernel: ``kernel[grid](...)`` compiles it."""

    def __init__(self, function: JITFunction, capability: int) -> None:
        self._function, self._capability = function, capability

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: print(compiled(self._function, self._capability, *arguments, **options))


def main(capability: int, dtypes: list[str]) -> None:
    for module in (triton_gemm, triton_rows):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name != "_activate":
                setattr(module, name, Launches(value, capability))
    for dtype in dtypes:
        compile_all(getattr(torch, dtype))


def compile_all(dtype: torch.dtype) -> None:
    """The largest tiles, for rows of ``dtype``."""
    weights = torch.promote_types(dtype, torch.float32)
    x_ND, weight_EDF = torch.empty(1024, 256, dtype=dtype), torch.empty(3, 256, 512, dtype=dtype)
    ends_E = torch.tensor([500, 500, 1024], dtype=torch.int32)
    token_N, weight_GN = torch.arange(1024), torch.empty(2, 1024, dtype=weights)
    triton_gemm.rows_times_weights(x_ND, weight_EDF, None, ends_E)
    triton_gemm.rows_times_weights(x_ND, weight_EDF, torch.empty(3, 512, dtype=dtype), ends_E)
    triton_gemm.rows_times_weights(torch.empty(1024, 512, dtype=dtype), weight_EDF.transpose(1, 2), None, ends_E)
    triton_gemm.outer_sums(x_ND, torch.empty(1024, 512, dtype=dtype), ends_E)
    triton_gemm.group_sums(x_ND, ends_E)
    triton_rows.gather(x_ND, token_N, dtype)
    triton_rows.token_sums(x_ND, weight_GN, token_N, torch.arange(1025), weights)
    triton_rows.token_sums_backward(torch.empty(2, 1024, 256, dtype=weights), x_ND, weight_GN, token_N)
    for activation in ("relu", "gelu", "silu"):
        triton_rows.gated(x_ND, x_ND, activation)
        triton_rows.gated_backward(*x_ND.new_empty(5, 1024, 256), activation)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
