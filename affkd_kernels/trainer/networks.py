"""A network with its captured features, and a frozen teacher that may answer from memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from affkd_kernels.features import FeatureCapture
from affkd_kernels.trainer.config import TeacherConfig
from affkd_kernels.trainer.data import ImageData, Images
from affkd_kernels.trainer.errors import reading
from affkd_kernels.trainer.models import Classifier, build_model
from affkd_kernels.trainer.objective import Outputs
from affkd_kernels.trainer.precision import FLOAT32, Precision
from affkd_kernels.trainer.run_folder import load_checkpoint


class ObservedNetwork:
    """A model together with the outputs of the submodules that the terms compare.

    Args:
        model: the network, or what wraps it to train in several processes.
        paths: dotted paths of submodules of the network.
        precision: how it computes. The logits are float32 whatever it is; features are not.
        compiled: run it through ``torch.compile``.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Iterable[str],
        precision: Precision = FLOAT32,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.distributed = isinstance(model, nn.parallel.DistributedDataParallel)
        self.precision = precision
        self._capture = FeatureCapture(model, paths)
        # with the features, which as results of the graph are the graph's own tensors
        self._outputs = torch.compile(self._run) if compiled else self._run

    def __call__(self, images: Tensor) -> Outputs:
        with self.precision.autocast(images.device):
            logits, features = self._outputs(images)
        return Outputs(logits.float(), features)

    def _run(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.model(images)
        return logits, {path: self._capture[path] for path in self._capture}

    def remove(self) -> None:
        """Take the hooks off the model again."""
        self._capture.remove()


class Teacher:
    """A frozen network's outputs for training images, given as rows and as they are shown.

    With ``cache`` every image passes through the network once, before the first step, and the rows
    alone count: for images that are the same in every epoch.
    """

    def __init__(
        self,
        model: Classifier,
        paths: Iterable[str],
        images: Images,
        cache: bool = True,
        precision: Precision = FLOAT32,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self._network = ObservedNetwork(self.model, paths, precision)
        self._cached = self._all_outputs(images) if cache else None

    def __call__(self, rows: Tensor, images: Tensor) -> Outputs:
        if self._cached is None:
            with torch.no_grad():
                return self._network(images)
        features = {path: feature[rows] for path, feature in self._cached.features.items()}
        return Outputs(self._cached.logits[rows], features)

    @torch.no_grad()
    def _all_outputs(self, images: Images, batch_size: int = 500) -> Outputs:
        parts = [self._network(part) for part in images.batches(batch_size)]
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
        raise ValueError(f"{path} holds a {checkpoint['model']!r}, but a {name!r} was asked for")
    _require_same_data(path, checkpoint["data"], data.identity)
    model = build_model(name, data.train_images.channels, data.classes, seed=0)
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
            f"{path}: this network was trained on other data: {'; '.join(changed)}; give the run "
            "the network's data options, or another checkpoint"
        )


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    # a mean over all pixels may differ in its last digits from machine to machine
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-4)
    return first == second


def load_teacher(
    config: TeacherConfig,
    checkpoint: Path,
    paths: Iterable[str],
    data: ImageData,
    augmented: bool = False,
    precision: Precision = FLOAT32,
) -> Teacher:
    """The frozen teacher of a run, ready to answer for the training images."""
    model = load_network(checkpoint, config.model, data)
    cache = not augmented if config.cache is None else config.cache
    return Teacher(model, paths, data.train_images, cache, precision)
