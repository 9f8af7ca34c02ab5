"""What every network is made of: the two parts of a classifier, and the pieces they share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn


class Classifier(nn.Module):
    """``head(features(images))``: [N, C, H, W] -> logits [N, classes].

    The submodules of ``features`` have names, so that a term can ask for ``features.maps``, the
    last feature maps [N, C, H, W], or an earlier stage of them, as well as for ``features``, the
    vector [N, D].
    """

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def pooled_classifier(
    parts: Mapping[str, nn.Module], dim: int, classes: int, last: nn.Module | None = None
) -> Classifier:
    """Stages, global average pooling and a linear head, initialized after He et al. 2015.

    Args:
        parts: ``stem``, ``stage1``, ``stage2``...; a term finds ``features.maps.stage1``, and
            ``features.maps`` is what the last of them returns.
        dim: length of the pooled vector.
        classes: number of logits.
        last: a layer between the last stage and the pooling.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(maps=nn.Sequential(OrderedDict(parts)))
    if last is not None:
        layers["last"] = last
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    model = Classifier(nn.Sequential(layers), nn.Linear(dim, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def convolution(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution without bias that keeps the size of the maps at stride 1."""
    return nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )


def normalized_convolution(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution and the batch normalization of what it returns."""
    layer = convolution(inputs, outputs, kernel, stride, groups)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def shuffle_channels(maps: Tensor, groups: int) -> Tensor:
    """[N, C, H, W] with channel ``c`` of group ``g`` at place ``c * groups + g``.

    Zhang et al. 2018 (ShuffleNet), figure 1: the next grouped convolution sees every group.
    """
    return maps.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
