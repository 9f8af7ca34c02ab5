"""Images in memory: kept as they were read, standardized as they are taken out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Images [N, C, H, W], uint8 or float32, and what makes them mean 0 and variance 1."""

    pixels: Tensor  # [N, C, H, W]
    mean: Tensor  # [C, 1, 1], or [1, 1, 1] for all channels
    std: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """The standardized images of these rows, float32."""
        return self.standardize(self.pixels[rows])

    def standardize(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean) / self.std

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order, standardized, ``size`` at a time."""
        yield from map(self.standardize, self.pixels.split(size))

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.mean.to(device), self.std.to(device))

    def take(self, rows: Tensor) -> Images:
        return replace(self, pixels=self.pixels[rows])


@dataclass(frozen=True)
class ImageData:
    """A data set in memory: two parts with their labels, int64."""

    train_images: Images  # [N, C, H, W]
    train_labels: Tensor  # [N]
    test_images: Images  # [M, C, H, W]
    test_labels: Tensor  # [M]
    classes: int
    # which images train and how they were standardized: a network belongs to exactly that
    identity: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> ImageData:
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )


def standardized_parts(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
    axes: tuple[int, ...] = (0, 2, 3),
) -> ImageData:
    """Both parts, each of images and labels, with the statistics of the training images.

    Args:
        axes: dimensions that share a statistic; the default gives each channel its own.
    """
    mean, std = _statistics(train[0], axes)
    parts = [Images(pixels, mean, std) for pixels, _ in (train, test)]
    identity = {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
    return ImageData(parts[0], train[1], parts[1], test[1], classes, identity)


def _statistics(pixels: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    if pixels.dtype == torch.uint8:
        # by histogram: a float copy of all images would need four times their memory
        return _statistics_of_bytes(pixels)
    std, mean = torch.std_mean(pixels, axes, keepdim=True)
    return mean[0], std[0]


def _statistics_of_bytes(pixels: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack(
        [pixels[:, channel].flatten().bincount(minlength=256) for channel in range(pixels.shape[1])]
    ).double()  # [C, 256]
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ values  # [C]
    std = (shares @ values.square() - mean.square()).sqrt()
    return mean.float()[:, None, None], std.float()[:, None, None]
