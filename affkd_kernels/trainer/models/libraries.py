"""Networks of torchvision and timm by name, imported when one is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from affkd_kernels.trainer.models.base import Classifier


def torchvision_classifier(name: str, channels: int, classes: int) -> Classifier:
    """A classification network of ``torchvision.models`` with random weights.

    ``features`` is the network without its last linear layer, so a term finds
    ``features.layer3`` as torchvision calls it.
    """
    from torchvision import models

    if channels != 3:
        raise ValueError(f"torchvision:{name} takes images of 3 channels, got {channels}")
    if name not in models.list_models(module=models):
        raise ValueError(
            f"model is 'torchvision:{name}', which torchvision.models does not have; "
            "torchvision.models.list_models(module=torchvision.models) lists them"
        )
    # no download either: Inception's and GoogLeNet's auxiliary heads would return more than logits
    options: dict[str, Any] = {"weights": None, "num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    model = models.get_model(name, **options)
    return Classifier(model, _take_last_linear(model, name))


def _take_last_linear(model: nn.Module, name: str) -> nn.Linear:
    """Replace the last linear layer by an identity and return it."""
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(
            f"model 'torchvision:{name}' has no linear layer to take its features from"
        )
    parent_path, _, attribute = layers[-1].rpartition(".")
    parent = model.get_submodule(parent_path)
    head = getattr(parent, attribute)
    setattr(parent, attribute, nn.Identity())
    return head


def timm_classifier(name: str, channels: int, classes: int) -> Classifier:
    """A network of timm with random weights; ``features`` is timm's network without classifier."""
    timm = importlib.import_module("timm")
    if not timm.is_model(name):
        raise ValueError(
            f"model is 'timm:{name}', which timm does not have; see timm.list_models()"
        )
    model = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=0)
    # some have a hidden layer before the classifier, which stays a part of the features
    dim = getattr(model, "head_hidden_size", None) or model.num_features
    return Classifier(model, nn.Linear(dim, classes))


LIBRARIES = {"torchvision": torchvision_classifier, "timm": timm_classifier}
