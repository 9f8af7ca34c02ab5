"""Which images keep their label, and a batch order that survives a restart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from affkd_kernels.trainer.config import DataConfig
from affkd_kernels.trainer.data.random import Stream, generator


def labeled_rows(labels: Tensor, per_class: int | None, seed: int) -> Tensor:
    """Rows of the images that keep their label: all, or ``per_class`` random ones a class."""
    if per_class is None:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=generator(seed, Stream.LABELS))
    shuffled = labels.cpu()[order]
    chosen = [order[shuffled == label][:per_class] for label in shuffled.unique()]
    return torch.cat(chosen).sort().values


class Batch(NamedTuple):
    """Rows of one step: ``rows`` go to every term, ``labeled`` to the cross-entropy."""

    rows: Tensor  # [B]
    labeled: Tensor  # [L]; the same tensor as rows where every image keeps its label
    changes: Tensor | None = None  # [B + L, 3], or [B, 3] without rows of their own

    @property
    def apart(self) -> bool:
        """True where the labeled images are others than those of ``rows``."""
        return self.labeled is not self.rows

    @property
    def images(self) -> Tensor:
        """All rows that the student sees: ``rows``, and behind them ``labeled`` where apart."""
        return torch.cat([self.rows, self.labeled]) if self.apart else self.rows

    def part(self, index: int, count: int) -> Batch:
        """One of ``count`` parts, which differ by one image at most."""
        rows = self.rows[index::count]
        labeled = self.labeled[index::count] if self.apart else rows
        if self.changes is None:
            return Batch(rows, labeled)
        both = self.changes.tensor_split([len(self.rows)])
        return Batch(rows, labeled, torch.cat([changes[index::count] for changes in both]))


class BatchOrder:
    """Shuffled batches without end, whose position is part of ``state_dict``.

    A restored order goes on with the very batch the saved one would have given next, in the
    middle of an epoch too. The last batch of an epoch may be smaller; one of fewer than
    ``smallest`` images, which could not be divided among as many processes, is left out.
    """

    def __init__(
        self, count: int, labeled: Tensor, config: DataConfig, seed: int, smallest: int = 1
    ) -> None:
        self.config = config
        self.count = count
        self.labeled = labeled
        remainder = count % config.batch_size
        self._used = count if remainder >= smallest else count - remainder
        self._generator = generator(seed, Stream.ORDER)
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self._used // self.config.batch_size)

    def epoch(self) -> Iterator[Batch]:
        """The batches from here to the end of the epoch."""
        if self._position >= min(len(self._order), self._used):
            self._order = torch.randperm(self.count, generator=self._generator)
            self._position = 0
        while self._position < self._used:
            rows = self._order[self._position : self._position + self.config.batch_size]
            self._position += len(rows)
            yield Batch(rows, self._draw_labeled(rows))

    def _draw_labeled(self, rows: Tensor) -> Tensor:
        if len(self.labeled) == self.count:
            return rows
        size = min(self.config.labeled_batch, len(self.labeled))
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
