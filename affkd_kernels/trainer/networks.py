"""A network with its captured features, and a frozen teacher that may answer from memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affkd_kernels.features import FeatureCapture
from affkd_kernels.trainer.config import TeacherConfig
from affkd_kernels.trainer.data import ImageData
from affkd_kernels.trainer.errors import reading
from affkd_kernels.trainer.models import Classifier, build_model
from affkd_kernels.trainer.objective import Outputs
from affkd_kernels.trainer.run_folder import load_checkpoint


class ObservedNetwork:
    """A model together with the outputs of the submodules that the terms compare."""

    def __init__(self, model: Classifier, paths: Iterable[str]) -> None:
        self.model = model
        self._capture = FeatureCapture(model, paths)

    def __call__(self, images: Tensor) -> Outputs:
        logits = self.model(images)
        return Outputs(logits, dict(self._capture))

    def remove(self) -> None:
        """Take the hooks off the model again."""
        self._capture.remove()


class Teacher:
    """A frozen network's outputs for rows of the training images.

    With ``cache`` every image passes through the network once, before the first step.
    """

    def __init__(
        self, model: Classifier, paths: Iterable[str], images: Tensor, cache: bool = True
    ) -> None:
        self._network = ObservedNetwork(model.eval().requires_grad_(False), paths)
        self._images = images
        self._cached = self._all_outputs() if cache else None

    def __call__(self, rows: Tensor) -> Outputs:
        if self._cached is None:
            with torch.no_grad():
                return self._network(self._images[rows])
        features = {path: feature[rows] for path, feature in self._cached.features.items()}
        return Outputs(self._cached.logits[rows], features)

    @torch.no_grad()
    def _all_outputs(self, batch_size: int = 500) -> Outputs:
        parts = [self._network(part) for part in self._images.split(batch_size)]
        features = {
            path: torch.cat([p.features[path] for p in parts]) for path in parts[0].features
        }
        return Outputs(torch.cat([part.logits for part in parts]), features)


def load_network(path: Path, name: str, data: ImageData) -> Classifier:
    """The network of a checkpoint.

    Raises:
        ValueError: it is not the model called ``name``, or was trained on other data: another
            split would let test images into its training, another standardization would show it
            images it has never seen the like of.
        FileContentError: the file is no checkpoint of this trainer.
    """
    checkpoint = load_checkpoint(path, ("model", "weights", "data"))
    if checkpoint["model"] != name:
        raise ValueError(f"{path} holds a {checkpoint['model']!r}, but teacher.model is {name!r}")
    _require_same_data(path, checkpoint["data"], data.identity)
    model = build_model(name, data.train_images.shape[1], data.classes, seed=0)
    with reading(path, f"a checkpoint of a {name} for these images"):
        model.load_state_dict(checkpoint["weights"])
    return model.to(data.train_images.device)


def _require_same_data(path: Path, trained_on: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    changed = [
        f"data.{name} was {trained_on.get(name)!r} and is {value!r}"
        for name, value in given.items()
        if not _same(trained_on.get(name), value)
    ]
    if changed:
        raise ValueError(
            f"{path}: this teacher was trained on other data: {'; '.join(changed)}; give the run "
            "the teacher's data options, or another teacher"
        )


def _same(first: Any, second: Any) -> bool:
    # a mean over all pixels may differ in its last digits from machine to machine
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-4)
    return first == second


def load_teacher(
    config: TeacherConfig, checkpoint: Path, paths: Iterable[str], data: ImageData
) -> Teacher:
    """The frozen teacher of a run, ready to answer for the training images."""
    model = load_network(checkpoint, config.model, data)
    return Teacher(model, paths, data.train_images, config.cache)
