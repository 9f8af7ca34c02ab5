"""VGG with batch normalization: Simonyan & Zisserman, ICLR 2015, shortened for 32 x 32 images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from affkd_kernels.trainer.models.base import Classifier, pooled_classifier

WIDTHS = (64, 128, 256, 512, 512)


def vgg(convolutions: int) -> Callable[[int, int], Classifier]:
    """Five stages of ``convolutions`` layers and one linear layer: 1 makes VGG8, 2 makes VGG13.

    The maps are halved before stages 2, 3 and 4; an image of 32 x 32 ends as 4 x 4.
    """

    def build(channels: int, classes: int) -> Classifier:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = channels
        for stage, width in enumerate(WIDTHS, start=1):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if stage in (2, 3, 4) else []
            for _ in range(convolutions):
                # with a bias, as the paper has it, though the normalization takes it out again
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            parts[f"stage{stage}"] = nn.Sequential(*layers)
        return pooled_classifier(parts, inputs, classes)

    return build
