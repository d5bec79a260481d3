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
from torch import Tensor, nn

from dist_moe.models.bert import BertModel, BertOutput

Batch = TypeVar("Batch")


def neuron_importance(
    model: BertModel,
    batches: Iterable[Batch],
    inputs: Callable[[Batch], tuple[Any, ...]],
    losses: Callable[[BertOutput, Batch], Tensor],
) -> Tensor:
    """(layers, H) fp64 importances of a dense model, summed over all examples of ``batches``.

    ``inputs(batch)``: the model's arguments, ``token_BS`` and ``length_B`` first. ``losses(output, batch)``: (B,), the
    loss of each example. Take batches of training data, not those by which the model is judged. Dropout is off.
    Where ranks have batches of their own, the importance is the sum over ranks.
    Raises ValueError for a model with experts.
    """
    blocks = model.dense_layers()
    if len(blocks) < model.shape.layers:
        raise ValueError("the importance of neurons is defined for a dense model; this one has experts")
    device = model.encoder.embeddings.token.weight.device
    total_LH = torch.zeros(len(blocks), model.shape.hidden, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad(), _activations([(block.up, block.down) for block in blocks.values()]) as seen:
            for batch in batches:
                seen.clear()
                output = model(*inputs(batch))
                loss_B = losses(output, batch)
                if len(loss_B):
                    total_LH += _of_batch(loss_B, seen, [block.up.bias for block in blocks.values()], output.real_BS)
    finally:
        model.train(was_training)
    return total_LH


def _of_batch(loss_B: Tensor, seen: list[Tensor], biases: list[Tensor], real_BS: Tensor) -> Tensor:
    """(L, H): ``seen`` has each layer's p_TH and h_TH, in turn."""
    grads = torch.autograd.grad(loss_B.sum(), seen)
    example_T = real_BS.nonzero()[:, 0]
    rows = []
    for before_TH, after_TH, grad_before_TH, grad_after_TH, bias_H in zip(
        seen[::2], seen[1::2], grads[::2], grads[1::2], biases, strict=True
    ):
        product_TH = (before_TH.detach() - bias_H.detach()) * grad_before_TH + after_TH.detach() * grad_after_TH
        zeros_BH = product_TH.new_zeros(len(loss_B), product_TH.shape[1], dtype=torch.float64)
        rows.append(zeros_BH.index_add(0, example_T, product_TH.double()).abs().sum(dim=0))
    return torch.stack(rows)


@contextmanager
def _activations(networks: list[tuple[nn.Linear, nn.Linear]]) -> Iterator[list[Tensor]]:
    """What comes out of each first layer and goes into each second, in the order in which the model computes them."""
    seen: list[Tensor] = []
    hooks = []
    for up, down in networks:
        hooks.append(up.register_forward_hook(lambda _module, _args, result: seen.append(result)))
        hooks.append(down.register_forward_pre_hook(lambda _module, args: seen.append(args[0])))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
