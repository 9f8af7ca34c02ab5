"""One's own images: a tree of ``train/CLASS/*.png`` and ``test/CLASS/*.png``."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from affkd_kernels.trainer.config import DataConfig
from affkd_kernels.trainer.data.images import ImageData, standardized_parts
from affkd_kernels.trainer.data.random import Stream, generator
from affkd_kernels.trainer.errors import MissingDataError, reading

TEST_FOLDERS = ("test", "val")


def folder(config: DataConfig) -> ImageData:
    """The images below ``data.root``, scaled and cropped to squares of ``data.image_size``.

    They are held in memory, a byte a value: 100,000 color images of 64 x 64 are 1.2 GB.

    Raises:
        MissingDataError: ``train``, or one of ``test`` and ``val``, is not there.
        ValueError: the two have other classes than each other, or no images.
        FileContentError: a file is no image, damaged, or so large that it must be hostile.
    """
    from torchvision.datasets import ImageFolder

    root = Path(config.root)
    train = ImageFolder(str(_part(root, "train")))
    test = ImageFolder(str(_part(root, *TEST_FOLDERS)))
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"data.root: the training and the test images of {root} must have the same classes; "
            f"only one of them has {', '.join(differing)}"
        )
    order = torch.randperm(len(train.samples), generator=generator(config.split_seed, Stream.SPLIT))
    chosen = [train.samples[row] for row in order[: config.limit].tolist()]
    train_part, test_part = (_read(part, config.image_size) for part in (chosen, test.samples))
    data = standardized_parts(train_part, test_part, len(train.classes))
    data.identity["image_size"] = config.image_size
    return data


def _part(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise MissingDataError(
        f"data.root: {root} has no folder {' or '.join(names)}; put the images into "
        f"{root / names[0]}/CLASS/, a folder for each class"
    )


def _read(samples: list[tuple[str, int]], size: int) -> tuple[Tensor, Tensor]:
    images = torch.stack([_image(Path(path), size) for path, _ in samples])
    return images, torch.tensor([label for _, label in samples], dtype=torch.int64)


def _image(path: Path, size: int) -> Tensor:
    """[3, size, size] uint8: the shorter side scaled to ``size``, the middle of the longer one."""
    from PIL import Image
    from torchvision.transforms import functional

    with reading(path, "an image"), warnings.catch_warnings():
        # a small file can hold an image that fills the memory
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            scaled = functional.resize(image.convert("RGB"), [size])
            return functional.pil_to_tensor(functional.center_crop(scaled, [size]))
