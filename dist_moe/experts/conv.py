"""The expert of MultiMNIST and MultiFashionMNIST: a small convolutional network.

COMET supplement, section on architectures: convolution 5x5 with 10 filters, max-pool 2, convolution 5x5
with 20 filters, max-pool 2, dense 50, dense 50, a ReLU after every convolution and dense layer. As Keras
has it by default: no padding, pools that drop an odd last row and column, kernels glorot-uniform,
biases zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dist_moe import kernels
from dist_moe.config.settings import Size
from dist_moe.experts.bank import ExpertBank, ExpertSettings, InitStds, drawn

KERNEL_SIDE = 5
POOL_SIDE = 2
SMALLEST_SIDE = 16


class ConvConfig(ExpertSettings):
    """A small convolutional network over square one-channel images."""

    name: Literal["conv"] = Field("conv", description="which experts these are")
    channels: tuple[Size, Size] = Field((10, 20), description="filters of the two 5x5 convolutions of each expert")
    units: tuple[Size, Size] = Field(
        (50, 50), description="units of the two dense layers of each expert; the last are the width of its result"
    )

    def build(self, dim: int, num_experts: int, expert_ids: Sequence[int], init_stds: InitStds = None) -> ConvBank:
        """Return the experts ``expert_ids`` over images of ``dim`` pixels; glorot-uniform, whatever ``init_stds``."""
        return ConvBank(math.isqrt(dim), num_experts, expert_ids, self.channels, self.units)

    def validation_errors(self, dim: int, out_dim: int | None = None) -> Iterator[str]:
        """Yield that rows are no images that the convolutions can take, or the wrong width of the result."""
        side = math.isqrt(dim)
        if side**2 != dim or side < SMALLEST_SIDE:
            yield (
                f"experts.name={self.name}: rows of {dim} numbers are no square image of at least {SMALLEST_SIDE} x "
                f"{SMALLEST_SIDE} pixels; use feed_forward or dense_relu"
            )
        if out_dim not in (None, self.units[1]):
            yield f"experts.units={list(self.units)}: the last must be {out_dim}, the width that the model needs"


class ConvBank(ExpertBank):
    """Experts over square one-channel images of ``side`` x ``side`` pixels, given as rows of ``side**2``.

    ``channels``: filters (C1, C2) of the two convolutions; ``units``: (F1, F2) of the two dense layers,
    F2 being the width of the result. With P = ``pooled_side`` (6 for side 36), the parameters are

        conv1_weight (E_local, C1, 1, 5, 5)        conv1_bias (E_local, C1)
        conv2_weight (E_local, C2, C1, 5, 5)       conv2_bias (E_local, C2)
        dense1_weight (E_local, C2 * P * P, F1)    dense1_bias (E_local, F1)
        dense2_weight (E_local, F1, F2)            dense2_bias (E_local, F2)

    drawn per expert from its global id. Raises ValueError when ``side`` leaves nothing after the second pool.
    """

    def __init__(
        self,
        side: int,
        num_experts: int,
        expert_ids: Sequence[int],
        channels: tuple[int, int] = (10, 20),
        units: tuple[int, int] = (50, 50),
    ) -> None:
        if side < SMALLEST_SIDE:
            raise ValueError(
                f"side must be at least {SMALLEST_SIDE} for two 5x5 convolutions and two pools, got {side}"
            )
        super().__init__(side * side, units[1], num_experts, expert_ids)
        self.side = side
        self.pooled_side = _side_after_layer(_side_after_layer(side))
        generators = self.generators()
        self.conv1_weight = drawn((channels[0], 1, KERNEL_SIDE, KERNEL_SIDE), generators)
        self.conv2_weight = drawn((channels[1], channels[0], KERNEL_SIDE, KERNEL_SIDE), generators)
        self.dense1_weight = drawn((channels[1] * self.pooled_side**2, units[0]), generators)
        self.dense2_weight = drawn(units, generators)
        self.conv1_bias, self.conv2_bias, self.dense1_bias, self.dense2_bias = (
            nn.Parameter(torch.zeros(self.num_local_experts, width)) for width in (*channels, *units)
        )

    def forward(self, x_ND: Tensor, rows_per_expert: kernels.RowCounts) -> Tensor:
        """Return the networks' results, the convolutions expert by expert."""
        # unbind, not indexing: the backward of an index writes a whole stack of gradients per expert.
        # Experts without rows take part, so that every parameter stays in the graph.
        convolutions = (self.conv1_weight, self.conv1_bias, self.conv2_weight, self.conv2_bias)
        per_expert = zip(*(parameter.unbind(0) for parameter in convolutions), strict=True)
        blocks = zip(x_ND.split(kernels.counts_on_host(rows_per_expert)), per_expert, strict=True)
        features_ND = torch.cat([self._features(rows, *expert) for rows, expert in blocks])
        hidden_NF = kernels.grouped_linear(features_ND, self.dense1_weight, self.dense1_bias, rows_per_expert)
        result_NF = kernels.grouped_linear(torch.relu(hidden_NF), self.dense2_weight, self.dense2_bias, rows_per_expert)
        return torch.relu(result_NF)

    def all_experts(self, x_TD: Tensor) -> Tensor:
        """Return all results by one network: their filters side by side, then their dense layers as a batch."""
        experts, filters = self.conv2_bias.shape
        features = self._features(
            x_TD,
            self.conv1_weight.flatten(0, 1),
            self.conv1_bias.flatten(),
            self.conv2_weight.flatten(0, 1),
            self.conv2_bias.flatten(),
            groups=experts,
        )
        features_ETD = features.unflatten(1, (experts, filters * self.pooled_side**2)).transpose(0, 1)
        hidden_ETF = torch.relu(torch.baddbmm(self.dense1_bias.unsqueeze(1), features_ETD, self.dense1_weight))
        return torch.relu(torch.baddbmm(self.dense2_bias.unsqueeze(1), hidden_ETF, self.dense2_weight))

    @property
    def flops_per_row(self) -> float:
        """FLOPs of the dense layers, and of every filter once for each place of its map."""
        (first, second), _ = self._sizes
        filters = self.conv1_weight[0].numel() * first**2 + self.conv2_weight[0].numel() * second**2
        return 2.0 * (filters + self.dense1_weight[0].numel() + self.dense2_weight[0].numel())

    @property
    def kept_per_row(self) -> int:
        """Numbers kept: patches and maps; what is pooled of them and the hidden units, each with its gradient."""
        (first, second), (filters1, filters2) = self._sizes
        maps = (KERNEL_SIDE**2 + filters1) * first**2 + filters2 * second**2
        pooled = filters1 * (first // POOL_SIDE) ** 2 + filters2 * self.pooled_side**2
        return maps + 2 * (pooled + self.dense1_bias.shape[1])

    @property
    def accesses_per_row(self) -> float:
        """Accesses of patches and maps, those of the second convolution twice."""
        (first, second), (filters1, filters2) = self._sizes
        return 5.0 * ((KERNEL_SIDE**2 + filters1) * first**2 + 2 * filters2 * second**2)

    @property
    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sides of the maps, and filters, of both convolutions."""
        first = self.side - KERNEL_SIDE + 1
        return (first, first // POOL_SIDE - KERNEL_SIDE + 1), (self.conv1_bias.shape[1], self.conv2_bias.shape[1])

    def _features(
        self, x_ND: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, groups: int = 1
    ) -> Tensor:
        """(N, side**2) -> (N, filters * P * P): both convolutions, the second one in ``groups``.

        A pool of a ReLU is the ReLU of the pool, values and gradients, on a quarter of the elements.
        """
        first = _conv_of_one_channel(x_ND.unflatten(1, (self.side, self.side)), weight1, bias1)
        second = F.conv2d(torch.relu(F.max_pool2d(first, POOL_SIDE)), weight2, bias2, groups=groups)
        return torch.relu(F.max_pool2d(second, POOL_SIDE)).flatten(1)


def _conv_of_one_channel(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, side, side) -> (N, filters, side - 4, side - 4), as a product of all 5x5 patches and all filters.

    On a CPU twice as fast as ``conv2d``, which is made for many input channels; and it leaves the maps
    with the channel as the fastest axis, with which the pool and the second convolution are faster too.
    """
    rows, side = len(images), images.shape[1] - KERNEL_SIDE + 1
    patches = images.unfold(1, KERNEL_SIDE, 1).unfold(2, KERNEL_SIDE, 1)
    maps = torch.addmm(bias, patches.reshape(rows * side * side, KERNEL_SIDE**2), weight.flatten(1).t())
    return maps.view(rows, side, side, len(bias)).permute(0, 3, 1, 2)


def _side_after_layer(side: int) -> int:
    return (side - KERNEL_SIDE + 1) // POOL_SIDE
