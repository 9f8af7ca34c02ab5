"""The items of a call as its kernels read them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...inputs import Inputs
from .layout import Side

# of rows: addresses inside a tile are 32-bit
MAX_STRIDE = 1 << 24


class ItemStrides(NamedTuple):
    """Of the features [N, items, D] of student and teacher."""

    student_row: int
    student_matrix: int
    student_dim: int
    teacher_row: int
    teacher_matrix: int
    teacher_dim: int


class Items(NamedTuple):
    """Queries or keys of both sides."""

    student: Tensor  # [N, items, Ds]
    teacher: Tensor  # [N, items, Dt]
    mask: Tensor | None  # [N, items]
    terms: Tensor  # [N * items, ITEM_TERMS]

    @property
    def size(self) -> int:
        return self.student.shape[1]


class Sums(NamedTuple):
    """Sums [N, parts, D + 1] of the items of both sides."""

    student: Tensor
    teacher: Tensor
    parts: int


def readable(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs as kernels read them, each a tensor object of its own.

    Triton's compiler fails on a float64 product of an operand that anything narrower than 32 bits
    goes into: all features are float64 where some are, and the masks of their items as wide.
    """
    given = {name: x.detach() for name, x in inputs._asdict().items() if x is not None}
    return inputs._replace(**{name: _as_read(name, x, dtype) for name, x in given.items()})


def _as_read(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    wide = dtype == torch.float64
    if name in ("student", "teacher", "student_keys", "teacher_keys"):
        return _rows(x.to(dtype) if wide else x)
    if name == "row_weight":
        x = x.to(dtype)
    if name in ("mask", "key_mask") and wide:
        x = x.to(torch.int64)
    return x.contiguous()


def same_place(x: Tensor | None, y: Tensor | None) -> bool:
    return x is y or (x is not None and y is not None and x.data_ptr() == y.data_ptr())


def _rows(x: Tensor) -> Tensor:
    """Features whose last dimension is contiguous."""
    contiguous = x.stride(2) == 1 or x.shape[2] == 1
    return x if contiguous and x.stride(1) < MAX_STRIDE else x.contiguous()


def strides(x: Tensor) -> tuple[int, int]:
    """Of rows and of matrices; of a single matrix 0, which compiles nothing anew."""
    return x.stride(1), x.stride(0) if x.shape[0] > 1 else 0


def side_of(queries: Tensor, keys: Tensor, scale: Tensor) -> Side:
    return Side(queries, keys, scale, *strides(queries), *strides(keys), queries.shape[2])


def item_strides(items: Items) -> ItemStrides:
    x, y = items.student, items.teacher
    return ItemStrides(*strides(x), x.shape[2], *strides(y), y.shape[2])
