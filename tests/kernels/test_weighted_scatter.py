"""weighted_scatter against its reference: values and all gradients, with small blocks and empties."""

from __future__ import annotations

import pytest
import torch

from dist_moe.kernels import weighted_scatter, weighted_scatter_reference


@pytest.mark.parametrize(("rows", "tokens"), [(0, 0), (0, 3), (1, 1), (700, 90), (1500, 40)])
@pytest.mark.parametrize("gates", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_reference(rows: int, tokens: int, gates: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows + tokens)
    rows_NF = torch.randn(rows, 130, generator=generator).to(dtype)
    weight_GN = torch.rand(gates, rows, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    token_N = torch.randint(max(tokens, 1), (rows,), generator=generator)
    grad_GTF = torch.randn(gates, tokens, 130, generator=generator).to(weight_GN.dtype)
    results = []
    for function in (weighted_scatter, weighted_scatter_reference):
        inputs = [rows_NF.clone().requires_grad_(), weight_GN.clone().requires_grad_()]
        output = function(inputs[0], inputs[1], token_N, tokens)
        output.backward(grad_GTF)
        results.append([output.detach(), *(x.grad for x in inputs)])
    for ours, reference in zip(*results, strict=True):
        assert ours is not None
        # The reference adds the gates' gradients in bf16, the kernel in fp32.
        tolerance = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(ours, reference, **tolerance)
