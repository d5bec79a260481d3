"""How important each neuron of BERT's feed-forward networks is to the task: MoEBERT's score, from training data.

Zuo et al.: MoEBERT (NAACL 2022), eq. 4, after Molchanov et al. (CVPR 2019). For neuron j with the weights w1_j into
and w2_j out of it, over labelled examples with the losses L_i:

    I_j = sum_i | <w1_j, dL_i/dw1_j> + <w2_j, dL_i/dw2_j> |

The magnitude is of each example's own gradient: of a batch's gradient, examples would cancel out. Per-example
gradients of weights are not needed for it. With p = x . w1_j + b_j and h = act(p) at each token t of the example,

    <w1_j, dL/dw1_j> = sum_t (p - b_j) dL/dp        <w2_j, dL/dw2_j> = sum_t h dL/dh

so one backward pass per batch, as far as the activations and without any gradient of a weight, gives all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from dist_moe.kernels import sums_at
from dist_moe.models.bert import BertModel, BertOutput
from dist_moe.models.bert.encoder import DenseFeedForward

Batch = TypeVar("Batch")


def neuron_importance(
    model: BertModel,
    batches: Iterable[Batch],
    inputs: Callable[[Batch], tuple[Any, ...]],
    losses: Callable[[BertOutput, Batch], Tensor],
) -> Tensor:
    """Return (layers, H) fp64 importances of a dense model, summed over all examples of ``batches``.

    ``inputs(batch)``: the model's arguments, ``token_BS`` and ``length_B`` first. ``losses(output, batch)``: (B,), the
    loss of each example. Take batches of training data, not those by which the model is judged. Dropout is off.
    Where ranks have batches of their own, the importance is the sum over ranks.
    Raises ValueError for a model with experts.
    """
    blocks = list(model.dense_layers().values())
    if len(blocks) < model.shape.layers:
        raise ValueError("the importance of neurons is defined for a dense model; this one has experts")
    device = model.encoder.embeddings.token.weight.device
    total_LH = torch.zeros(len(blocks), model.shape.hidden, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad(), _activations(blocks) as seen:
            for batch in batches:
                seen.clear()
                output = model(*inputs(batch))
                loss_B = losses(output, batch)
                if not len(loss_B):
                    continue
                gradients = torch.autograd.grad(loss_B.sum(), seen)
                example_T = output.real_BS.nonzero()[:, 0]
                for layer, block in enumerate(blocks):
                    before_TH, after_TH = seen[2 * layer : 2 * layer + 2]
                    grad_before_TH, grad_after_TH = gradients[2 * layer : 2 * layer + 2]
                    product_TH = (before_TH.detach() - block.up.bias.detach()) * grad_before_TH
                    product_TH = product_TH + after_TH.detach() * grad_after_TH
                    total_LH[layer] += sums_at(product_TH.double(), example_T, len(loss_B)).abs().sum(dim=0)
    finally:
        model.train(was_training)
    return total_LH


@contextmanager
def _activations(blocks: list[DenseFeedForward]) -> Iterator[list[Tensor]]:
    """Yield what comes out of each first layer and goes into each second, in the order in which the model runs them."""
    seen: list[Tensor] = []
    hooks = []
    for block in blocks:
        hooks.append(block.up.register_forward_hook(lambda _module, _args, result: seen.append(result)))
        hooks.append(block.down.register_forward_pre_hook(lambda _module, args: seen.append(args[0])))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
