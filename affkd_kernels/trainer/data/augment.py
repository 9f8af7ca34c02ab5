"""Shifted and mirrored images: padding, a random crop, a random flip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from affkd_kernels.trainer.config import DataConfig
from affkd_kernels.trainer.data.random import Stream, generator


def draw_changes(config: DataConfig, count: int, seed: int, step: int) -> Tensor | None:
    """How each of ``count`` images of a step is changed: [count, 3] of top, left, mirrored.

    A function of its arguments alone, so nothing has to be saved to resume a run, and every process
    of several draws the same.
    """
    if not config.augmented:
        return None
    random = generator(seed, Stream.AUGMENTATION, step)
    shifts = torch.randint(2 * config.crop_padding + 1, (count, 2), generator=random)
    flips = torch.randint(2, (count, 1), generator=random) * config.flip
    return torch.cat([shifts, flips], 1)


def apply_changes(pixels: Tensor, changes: Tensor, padding: int) -> Tensor:
    """Crops of the images [B, C, H, W], padded with black by ``padding`` pixels on every side."""
    height, width = pixels.shape[2:]
    changes = changes.to(pixels.device)
    rows = changes[:, :1] + torch.arange(height, device=pixels.device)  # [B, H]
    columns = torch.arange(width, device=pixels.device).expand(len(pixels), -1)  # [B, W]
    columns = torch.where(changes[:, 2:] > 0, columns.flip(1), columns) + changes[:, 1:2]
    padded = F.pad(pixels, (padding,) * 4).movedim(1, -1)  # [B, H', W', C]
    images = torch.arange(len(pixels), device=pixels.device)
    crops = padded[images[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crops.movedim(-1, 1).contiguous()
