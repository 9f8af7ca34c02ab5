"""The demo's networks: a few thousand weights, for gray images of any size."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from affkd_kernels.trainer.models.base import Classifier


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def _convolutional(channels: int, widths: tuple[int, ...], dim: int, classes: int) -> Classifier:
    maps: list[nn.Module] = []
    for inputs, outputs in zip((channels, *widths), widths, strict=False):
        maps += [*_block(inputs, outputs), nn.MaxPool2d(2)]
    parts = OrderedDict(
        maps=nn.Sequential(*maps),
        pool=nn.AdaptiveAvgPool2d(2),
        flatten=nn.Flatten(),
        project=nn.Linear(4 * widths[-1], dim),
    )
    return Classifier(nn.Sequential(parts), nn.Sequential(nn.ReLU(), nn.Linear(dim, classes)))


def cnn_teacher(channels: int, classes: int) -> Classifier:
    """Three blocks of 32, 64 and 128 channels and a vector of 128: about 160 thousand weights."""
    return _convolutional(channels, (32, 64, 128), 128, classes)


def cnn_student(channels: int, classes: int) -> Classifier:
    """Two blocks of 8 and 16 channels and a vector of 24: about 3 thousand weights."""
    return _convolutional(channels, (8, 16), 24, classes)
