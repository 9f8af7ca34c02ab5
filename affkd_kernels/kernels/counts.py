"""How many rows and pairs take part, for the reductions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import Inputs
from ..spec import LossSpec
from .moments import shifted


class Counts(NamedTuple):
    """Counts of a call without a pair mask; plain numbers where nothing is left out."""

    matrices: int
    rows: Tensor | int
    pairs: Tensor | int
    pairs_of_row: Tensor | None  # [N, Q]; None: every row has all its pairs

    @staticmethod
    def of(spec: LossSpec, inputs: Inputs) -> Counts:
        n, q = inputs.student.shape[:2]
        k = inputs.num_keys
        key_mask = inputs.mask if inputs.student_keys is None else inputs.key_mask
        if inputs.mask is None and key_mask is None and spec.diagonal != "exclude":
            return Counts(n, n * q if k else 0, n * q * k, None)
        device = inputs.student.device
        queries = _count_or_all(inputs.mask, n, q, device)  # [N, Q]
        keys = _count_or_all(key_mask, n, k, device)  # [N, K]
        pairs_of_row = queries * keys.sum(1, keepdim=True)
        if spec.diagonal == "exclude":
            pairs_of_row = pairs_of_row - queries * shifted(keys, spec.diagonal_offset or 0, q)
        return Counts(n, (pairs_of_row > 0).sum(), pairs_of_row.sum(), pairs_of_row)

    def reciprocal(self, reduction: str, like: Tensor) -> Tensor:
        """1 / count; a count of 0 has nothing to divide."""
        count = {"mean": self.pairs, "batchmean": self.rows, "matrixmean": self.matrices}.get(
            reduction, 1
        )
        count = torch.as_tensor(count, dtype=like.dtype, device=like.device)
        return count.clamp(min=1).reciprocal()

    def zero_without_pairs(self, x: Tensor, per_row: bool) -> Tensor:
        """x with 0 in the rows [N, Q, ...], or the matrices [N, ...], that have no pair.

        Not a product: they may hold NaN, from an item that takes part in nothing here.
        """
        if self.pairs_of_row is None:
            return x
        empty = self.pairs_of_row <= 0
        if not per_row:
            empty = empty.all(1, keepdim=True)
        return x.masked_fill(empty.reshape(*empty.shape, *(1,) * (x.dim() - 2)), 0.0)


def _count_or_all(mask: Tensor | None, n: int, items: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones((), dtype=torch.long, device=device).expand(n, items)
    return mask.long()
