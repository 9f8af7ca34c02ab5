"""Data sets by name: packaged ones, CIFAR from its own files, and folders of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from affkd_kernels.trainer.config import DataConfig
from affkd_kernels.trainer.data.cifar import cifar10, cifar100
from affkd_kernels.trainer.data.folder import folder
from affkd_kernels.trainer.data.images import ImageData, Images
from affkd_kernels.trainer.data.order import Batch, BatchOrder, labeled_rows
from affkd_kernels.trainer.data.packaged import digits, mnist5k
from affkd_kernels.trainer.data.random import Stream, generator

__all__ = ["DATASETS", "Batch", "BatchOrder", "ImageData", "Images", "labeled_rows", "load_data"]

DATASETS: dict[str, Callable[[DataConfig], ImageData]] = {
    "mnist5k": mnist5k,
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "folder": folder,
}


def load_data(config: DataConfig) -> ImageData:
    """Build the data set that ``config.name`` asks for.

    Raises:
        ValueError: an unknown name.
        MissingDataError: its package or files are not there; the message says where to put what.
        FileContentError: a file of it is damaged or hostile.
    """
    if config.name not in DATASETS:
        raise ValueError(f"data.name is {config.name!r}; valid are {', '.join(sorted(DATASETS))}")
    data = DATASETS[config.name](config)
    asked = {
        "name": config.name,
        "split_seed": config.split_seed,
        "limit": config.limit,
        "validation": config.validation,
    }
    data = replace(data, identity={**asked, **data.identity})
    return _hold_out(data, config) if config.validation else data


def _hold_out(data: ImageData, config: DataConfig) -> ImageData:
    """A part of the training images in place of the test images, which then nobody sees."""
    count = len(data.train_labels)
    order = torch.randperm(count, generator=generator(config.split_seed, Stream.VALIDATION))
    held, kept = order.tensor_split([round(config.validation * count)])
    return replace(
        data,
        train_images=data.train_images.take(kept),
        train_labels=data.train_labels[kept],
        test_images=data.train_images.take(held),
        test_labels=data.train_labels[held],
    )
