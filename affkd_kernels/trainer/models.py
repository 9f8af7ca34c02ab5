"""Small networks of two parts: ``features`` ends in a vector, ``head`` turns it into logits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """``head(features(images))``: [N, C, H, W] -> logits [N, classes].

    The submodules of ``features`` have names, so that a term can ask for ``features.maps``, the
    last feature maps [N, C, H, W], as well as for ``features``, the vector [N, D].
    """

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


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


MODELS: dict[str, Callable[[int, int], Classifier]] = {
    "cnn_teacher": cnn_teacher,
    "cnn_student": cnn_student,
}


def build_model(name: str, channels: int, classes: int, seed: int) -> Classifier:
    """Build ``name`` with weights that depend on ``seed`` alone; ValueError if unknown."""
    if name not in MODELS:
        raise ValueError(f"model is {name!r}; valid are {', '.join(sorted(MODELS))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](channels, classes)
