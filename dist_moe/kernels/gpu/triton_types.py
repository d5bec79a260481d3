"""The types in which Triton's kernels compute: sums in fp32, or in fp64 for fp64 rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type of sums over rows of ``dtype``."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which a matrix product takes its factors. Triton's interpreter, which is numpy, has no bf16."""
    return accumulator(dtype) if triton.knobs.runtime.interpret else _TYPES[dtype]


def precision(dtype: torch.dtype) -> str:
    """fp32 factors stay fp32, unless ``torch.set_float32_matmul_precision`` allows TF32."""
    lower = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if lower else "ieee"


def stages_and_warps(dtype: torch.dtype) -> dict[str, int]:
    """Fixed, not tuned at the first call: tuning would time kernels, which waits for the device."""
    return {"num_stages": 3, "num_warps": 8} if dtype.itemsize == 2 else {"num_stages": 2, "num_warps": 4}
