"""The floor: the matrix products that no implementation gets around, timed on this machine.

Over pairs, a self-affinity needs two half Gram matrices and one product with the weights for the
gradient. Factored, it needs the products of two D x D moments (half of each, by symmetry), the
cross moment, and two products for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .registry import METHODS, Case

PAIRS, FACTORED = "floor", "floor-factored"

# entries of a block of the matrix that a product writes: large enough for the full rate
BLOCK_ELEMENTS = 1 << 24


class Floor(NamedTuple):
    """A step to time, and how many of it make the floor."""

    step: Callable[[], Any]
    times: float


def floors(case: Case, device: str = "cpu") -> dict[str, Floor]:
    """The floors of a case, by name; none for a loss that is not one over pairs."""
    if not METHODS[case.method].pairs:
        return {}
    found = {PAIRS: _pairs(case, device)}
    _, queries, _, length = case.extent
    if not case.bank and length <= queries:
        found[FACTORED] = _factored(case, device)
    return found


def _pairs(case: Case, device: str) -> Floor:
    matrices, queries, keys, length = case.extent
    rows = max(1, min(queries, BLOCK_ELEMENTS // (matrices * keys)))
    new = _maker(device, getattr(torch, case.dtype))
    x, y = new(matrices, rows, length), new(matrices, keys, length)
    pairs, gradient = new(matrices, rows, keys), new(matrices, rows, length)
    # of a self-affinity one full Gram matrix stands for the two halves
    grams = 2 if case.bank else 1
    d_keys = new(matrices, keys, length) if METHODS[case.method].trained_keys else None

    def step() -> None:
        for _ in range(grams):
            torch.bmm(x, y.mT, out=pairs)
        torch.bmm(pairs, y, out=gradient)
        if d_keys is not None:
            torch.bmm(pairs.mT, x, out=d_keys)

    return Floor(step, queries / rows)


def _factored(case: Case, device: str) -> Floor:
    matrices, queries, _, length = case.extent
    new = _maker(device, getattr(torch, case.dtype))
    x, moment = new(matrices, queries, length), new(matrices, length, length)
    gradient = new(matrices, queries, length)

    def step() -> None:
        for _ in range(2):
            torch.bmm(x.mT, x, out=moment)
            torch.bmm(x, moment, out=gradient)

    return Floor(step, 1.0)


def _maker(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    def new(*shape: int) -> Tensor:
        return torch.rand(shape, device=device).to(dtype)

    return new
