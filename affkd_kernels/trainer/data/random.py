"""Independent streams of random numbers that come of one seed."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What random numbers are drawn for; the numbers decide the streams, so they stay."""

    SPLIT = 0
    LABELS = 1
    ORDER = 2
    AUGMENTATION = 3
    VALIDATION = 4


def generator(seed: int, stream: Stream, *position: int) -> torch.Generator:
    """The generator of a stream, at a position such as a step."""
    # one seed for all would let the kept labels be the first rows of the first epoch
    mixed = np.random.SeedSequence((seed, int(stream), *position)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed))
