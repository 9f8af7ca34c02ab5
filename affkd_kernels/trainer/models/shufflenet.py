"""ShuffleNet V1 (Zhang et al., CVPR 2018) and V2 (Ma et al., ECCV 2018) for 32 x 32 images.

Both have a 1 x 1 stem of stride 1 in place of the papers' 3 x 3 one of stride 2 and its pooling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from affkd_kernels.trainer.models.base import (
    Classifier,
    normalized_convolution,
    pooled_classifier,
    shuffle_channels,
)

STEM = 24


class GroupedUnit(nn.Module):
    """ShuffleNet V1's unit (figure 2): grouped 1 x 1, shuffle, 3 x 3 by channel, grouped 1 x 1.

    At stride 1 the maps are added, at stride 2 the average-pooled ones are put beside the branch.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        branch_outputs = outputs - inputs if stride == 2 else outputs
        # a quarter of what the branch itself returns, as in the published comparison; a quarter of
        # all of the unit's outputs, the other reading of the paper, has 50,994 weights more
        width = branch_outputs // 4
        # the stem has too few channels to be divided (section 3.3)
        self.groups = 1 if inputs == STEM else groups
        self.reduce = nn.Sequential(
            normalized_convolution(inputs, width, 1, groups=self.groups), nn.ReLU()
        )
        self.expand = nn.Sequential(
            normalized_convolution(width, width, stride=stride, groups=width),
            normalized_convolution(width, branch_outputs, 1, groups=groups),
        )
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        branch = self.expand(shuffle_channels(self.reduce(maps), self.groups))
        if self.shortcut is None:
            return self.relu(branch + maps)
        return self.relu(torch.cat([branch, self.shortcut(maps)], 1))


def _separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    """3 x 3 by channel, then 1 x 1."""
    return [
        normalized_convolution(inputs, inputs, stride=stride, groups=inputs),
        normalized_convolution(inputs, outputs, kernel=1),
        nn.ReLU(),
    ]


class SplitUnit(nn.Module):
    """ShuffleNet V2's unit (figure 3c, d): half of the channels pass by, at stride 2 all fork."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.splits = stride == 1
        taken = half if self.splits else inputs
        self.branch = nn.Sequential(
            normalized_convolution(taken, half, kernel=1),
            nn.ReLU(),
            *_separable(half, half, stride),
        )
        others = [] if self.splits else _separable(inputs, half, stride)
        self.other = nn.Sequential(*others)

    def forward(self, maps: Tensor) -> Tensor:
        passing, taken = maps.chunk(2, 1) if self.splits else (maps, maps)
        joined = torch.cat([self.other(passing), self.branch(taken)], 1)
        return shuffle_channels(joined, 2)


def _stages(
    channels: int,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    unit: Callable[[int, int, int], nn.Module],
) -> OrderedDict[str, nn.Module]:
    stem = nn.Sequential(normalized_convolution(channels, STEM, kernel=1), nn.ReLU())
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    inputs = STEM
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
        units = [unit(inputs, width, 2), *(unit(width, width, 1) for _ in range(depth - 1))]
        parts[f"stage{stage}"] = nn.Sequential(*units)
        inputs = width
    return parts


def shufflenet_v1(channels: int, classes: int) -> Classifier:
    """ShuffleNet V1 1x with 3 groups: stages of 240, 480 and 960 channels."""
    widths = (240, 480, 960)

    def unit(inputs: int, outputs: int, stride: int) -> nn.Module:
        return GroupedUnit(inputs, outputs, stride, groups=3)

    return pooled_classifier(_stages(channels, widths, (4, 8, 4), unit), widths[-1], classes)


def shufflenet_v2(channels: int, classes: int) -> Classifier:
    """ShuffleNet V2 1x: stages of 116, 232 and 464 channels and a last 1 x 1 layer of 1024."""
    widths, dim = (116, 232, 464), 1024
    last = nn.Sequential(normalized_convolution(widths[-1], dim, kernel=1), nn.ReLU())
    return pooled_classifier(_stages(channels, widths, (4, 8, 4), SplitUnit), dim, classes, last)
