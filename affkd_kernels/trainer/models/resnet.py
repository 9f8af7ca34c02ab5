"""Residual networks for 32 x 32 images: He et al., Deep Residual Learning, CVPR 2016.

Shortcuts that change the shape are projections (the paper's option B) everywhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from affkd_kernels.trainer.models.base import Classifier, normalized_convolution, pooled_classifier


class Residual(nn.Module):
    """``relu(branch(x) + shortcut(x))``."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.relu = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        return self.relu(self.branch(maps) + self.shortcut(maps))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return normalized_convolution(inputs, outputs, kernel=1, stride=stride)


def _basic(inputs: int, outputs: int, stride: int) -> Residual:
    """Two 3 x 3 convolutions."""
    branch = nn.Sequential(
        normalized_convolution(inputs, outputs, stride=stride),
        nn.ReLU(),
        normalized_convolution(outputs, outputs),
    )
    return Residual(branch, _shortcut(inputs, outputs, stride))


def _bottleneck(inputs: int, outputs: int, stride: int) -> Residual:
    """1 x 1 down to a quarter, 3 x 3, 1 x 1 up again."""
    width = outputs // 4
    branch = nn.Sequential(
        normalized_convolution(inputs, width, kernel=1),
        nn.ReLU(),
        normalized_convolution(width, width, stride=stride),
        nn.ReLU(),
        normalized_convolution(width, outputs, kernel=1),
    )
    return Residual(branch, _shortcut(inputs, outputs, stride))


def _residual_network(
    block: Callable[[int, int, int], Residual],
    stem: int,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    channels: int,
    classes: int,
) -> Classifier:
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(normalized_convolution(channels, stem), nn.ReLU())
    )
    inputs = stem
    for number, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
        blocks = []
        for position in range(depth):
            stride = 2 if number > 1 and position == 0 else 1
            blocks.append(block(inputs, width, stride))
            inputs = width
        parts[f"stage{number}"] = nn.Sequential(*blocks)
    return pooled_classifier(parts, inputs, classes)


def resnet(depth: int, width: int = 1) -> Callable[[int, int], Classifier]:
    """The 6n + 2 network of section 4.2: stages of 16, 32 and 64 filters, times ``width``.

    The published wider networks (8x4, 32x4) have a stem of 32 filters, not of ``16 * width``.
    """

    def build(channels: int, classes: int) -> Classifier:
        blocks = (depth - 2) // 6
        stem = 16 if width == 1 else 32
        widths = (16 * width, 32 * width, 64 * width)
        return _residual_network(_basic, stem, widths, (blocks,) * 3, channels, classes)

    return build


def resnet50(channels: int, classes: int) -> Classifier:
    """The bottleneck network of table 1 with a 3 x 3 stem of stride 1 and no pooling behind it."""
    widths, depths = (256, 512, 1024, 2048), (3, 4, 6, 3)
    return _residual_network(_bottleneck, 64, widths, depths, channels, classes)
