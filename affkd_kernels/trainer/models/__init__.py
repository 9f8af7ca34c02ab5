"""The networks by name: the demo's, those of the CIFAR benchmark, torchvision's and timm's."""

from __future__ import annotations

from collections.abc import Callable

import torch

from affkd_kernels.trainer.models.base import Classifier
from affkd_kernels.trainer.models.libraries import LIBRARIES
from affkd_kernels.trainer.models.mobilenet import mobilenet_v2_half
from affkd_kernels.trainer.models.resnet import resnet, resnet50
from affkd_kernels.trainer.models.shufflenet import shufflenet_v1, shufflenet_v2
from affkd_kernels.trainer.models.small import cnn_student, cnn_teacher
from affkd_kernels.trainer.models.stages import STAGES_OF
from affkd_kernels.trainer.models.vgg import vgg
from affkd_kernels.trainer.models.wide_resnet import wide_resnet

__all__ = ["MODELS", "STAGES_OF", "Classifier", "build_model"]

MODELS: dict[str, Callable[[int, int], Classifier]] = {
    "cnn_teacher": cnn_teacher,
    "cnn_student": cnn_student,
    **{f"resnet{depth}": resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": resnet(depth, width=4) for depth in (8, 32)},
    "resnet50": resnet50,
    **{f"wrn_{d}_{w}": wide_resnet(d, w) for d, w in ((16, 1), (16, 2), (40, 1), (40, 2))},
    "vgg8": vgg(convolutions=1),
    "vgg13": vgg(convolutions=2),
    "mobilenet_v2_half": mobilenet_v2_half,
    "shufflenet_v1": shufflenet_v1,
    "shufflenet_v2": shufflenet_v2,
}


def build_model(name: str, channels: int, classes: int, seed: int) -> Classifier:
    """Build a network with weights that depend on ``seed`` alone.

    Args:
        name: a key of ``MODELS``, ``torchvision:NAME`` or ``timm:NAME``.
        channels: of the images.
        classes: number of logits.
        seed: of the initial weights.

    Raises:
        ValueError: an unknown name, or a network that does not take such images.
    """
    library, colon, library_name = name.partition(":")
    if name not in MODELS and (not colon or library not in LIBRARIES):
        valid = [*sorted(MODELS), *(f"{prefix}:NAME" for prefix in LIBRARIES)]
        raise ValueError(f"model is {name!r}; valid are {', '.join(valid)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in MODELS:
            return MODELS[name](channels, classes)
        return LIBRARIES[library](library_name, channels, classes)
