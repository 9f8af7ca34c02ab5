"""Wide residual networks: Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from affkd_kernels.trainer.models.base import Classifier, convolution, pooled_classifier


class PreActivation(nn.Module):
    """Normalization and ReLU before each of two 3 x 3 convolutions, and a shortcut around them.

    A projection takes the activated maps, the identity takes the maps themselves.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.branch = nn.Sequential(
            convolution(inputs, outputs, stride=stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            convolution(outputs, outputs),
        )
        projects = inputs != outputs or stride != 1
        self.projection = convolution(inputs, outputs, 1, stride) if projects else None

    def forward(self, maps: Tensor) -> Tensor:
        activated = self.activation(maps)
        around = maps if self.projection is None else self.projection(activated)
        return self.branch(activated) + around


def wide_resnet(depth: int, width: int) -> Callable[[int, int], Classifier]:
    """WRN-``depth``-``width``: a stem of 16, stages of 16, 32 and 64 filters times ``width``.

    ``features.maps`` is what the last stage returns, before its normalization and ReLU.
    """

    def build(channels: int, classes: int) -> Classifier:
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=convolution(channels, 16))
        inputs = 16
        for stage, base in enumerate((16, 32, 64), start=1):
            outputs = base * width
            blocks = [PreActivation(inputs, outputs, stride=1 if stage == 1 else 2)]
            blocks += [PreActivation(outputs, outputs, 1) for _ in range((depth - 4) // 6 - 1)]
            parts[f"stage{stage}"] = nn.Sequential(*blocks)
            inputs = outputs
        last = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        return pooled_classifier(parts, inputs, classes, last)

    return build
