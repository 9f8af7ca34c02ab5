"""Sums over all pairs from second moments, chunk by chunk: the arithmetic of the factored form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .factors import Side

# elements of the rows in one step: on a CPU a float64 copy of them stays in cache, on a GPU they
# fill the device; both bound the extra memory
_CHUNK_ELEMENTS = {"cpu": 1 << 19}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 23


class Moments(NamedTuple):
    """Second moments of the keys."""

    student: Tensor  # K_s' K_s [N, Rs, Rs]
    teacher: Tensor  # K_t' K_t [N, Rt, Rt]
    cross: Tensor  # K_s' K_t [N, Rs, Rt]

    def to(self, dtype: torch.dtype) -> Moments:
        return Moments(*(x.to(dtype) for x in self))


class Sums(NamedTuple):
    """Sums of A_s^2, A_t^2 and A_s A_t over the pairs that take part, per row or per matrix."""

    student: Tensor  # [N, Q or 1]
    teacher: Tensor
    cross: Tensor

    def total(self) -> Sums:
        return Sums(*(x.sum(-1, keepdim=True) for x in self))

    def scaled(self, student: Side, teacher: Side) -> Sums:
        return Sums(
            self.student * (student.scale * student.scale),
            self.teacher * (teacher.scale * teacher.scale),
            self.cross * (student.scale * teacher.scale),
        )


class Diagonal(NamedTuple):
    """What row i's own key, i + offset, contributes; 0 where there is none."""

    keys: Tensor  # K_{i + offset} of the student [N, Q, Rs]
    student: Tensor  # A_s,ii [N, Q]
    teacher: Tensor  # A_t,ii [N, Q]
    offset: int

    def of(self, rows: slice) -> Diagonal:
        return Diagonal(
            self.keys[:, rows], self.student[:, rows], self.teacher[:, rows], self.offset
        )


def key_moments(
    student: Side, teacher: Side, dtype: torch.dtype, products: torch.dtype | None = None
) -> Moments:
    """The moments in ``dtype``, of products of rows in ``products`` (None: the same)."""
    n, _, rank_s = student.keys.shape
    rank_t = teacher.keys.shape[2]
    zeros, products = student.keys.new_zeros, products or dtype
    own = zeros((n, rank_s, rank_s), dtype=dtype)
    other = zeros((n, rank_t, rank_t), dtype=dtype)
    cross = zeros((n, rank_s, rank_t), dtype=dtype)
    for rows in chunks(student.keys):
        s, t = student.keys[:, rows].to(products), teacher.keys[:, rows].to(products)
        add_product(own, s.mT, s)
        add_product(other, t.mT, t)
        add_product(cross, s.mT, t)
    return Moments(own, other, cross)


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x y: the product in the dtype of x and y, the sum in that of the total."""
    if total.dtype == x.dtype:
        total.baddbmm_(x, y)
    else:
        total += x @ y


def matrix_sums(student: Side, teacher: Side, moments: Moments) -> Sums:
    """Per matrix [N, 1], for F = K on both sides: <F'F, K'K> is a norm of the moments."""
    sums = Sums(*(x.square().sum((1, 2)).unsqueeze(1) for x in moments))
    return sums.scaled(student, teacher)


class RowChunk(NamedTuple):
    """Some rows, in the dtype of the products; their sums in that of the moments."""

    rows: slice
    student: Tensor  # f_i [N, rows, Rs]
    teacher: Tensor  # t_i [N, rows, Rt]
    own: Tensor  # f_i K_s' K_s [N, rows, Rs]
    cross: Tensor  # t_i K_t' K_s [N, rows, Rs]
    sums: Sums  # [N, rows]


def row_chunks(
    student: Side, teacher: Side, moments: Moments, products: torch.dtype | None = None
) -> Iterator[RowChunk]:
    """The rows and their products with the moments; both the sums and dF are made of these."""
    dtype = moments.student.dtype
    products = products or dtype
    moments = moments.to(products)
    for rows in chunks(student.queries):
        s, t = student.queries[:, rows].to(products), teacher.queries[:, rows].to(products)
        own, cross = s @ moments.student, t @ moments.cross.mT
        sums = Sums(_row_dots(own, s), _row_dots(t @ moments.teacher, t), _row_dots(cross, s))
        sums = Sums(*(x.to(dtype) for x in sums))
        yield RowChunk(rows, s, t, own, cross, sums.scaled(student, teacher))


def row_sums(
    student: Side, teacher: Side, moments: Moments, products: torch.dtype | None = None
) -> Sums:
    """Per row [N, Q]."""
    sums = Sums(*(moments.student.new_empty(student.queries.shape[:2]) for _ in range(3)))
    for chunk in row_chunks(student, teacher, moments, products):
        for whole, part in zip(sums, chunk.sums, strict=True):
            whole[:, chunk.rows] = part
    return sums


def zero_moments(moments: Moments) -> tuple[Tensor, Tensor]:
    """Where F_s' diag(alpha) F_s and F_t' diag(beta) F_s are summed up."""
    return torch.zeros_like(moments.student), torch.zeros_like(moments.cross.mT.contiguous())


def weighted_moments(
    student: Side,
    teacher: Side,
    weights: tuple[Tensor, Tensor],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """scale_s F_s' diag(alpha) F_s and scale_t F_t' diag(beta) F_s, [N, R, Rs].

    In ``dtype`` (None: that of the weights), of products in that of the weights.
    """
    alpha, beta = weights
    dtype = dtype or alpha.dtype
    n, _, rank = student.queries.shape
    own = alpha.new_zeros((n, rank, rank), dtype=dtype)
    cross = alpha.new_zeros((n, teacher.queries.shape[2], rank), dtype=dtype)
    for rows in chunks(student.queries):
        s, t = student.queries[:, rows].to(alpha.dtype), teacher.queries[:, rows].to(alpha.dtype)
        add_product(own, (s * alpha[:, rows]).mT, s)
        add_product(cross, (t * beta[:, rows]).mT, s)
    return own * student.scale, cross * teacher.scale


def combined(
    operands: tuple[Tensor, Tensor],
    maps: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor] | None = None,
    minus: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """w_x x @ to_x + w_y y @ to_y - c z, row by row; [N, rows, Rs] in the dtype of x.

    Computed in the dtype of the maps: these sums nearly cancel, and are rounded at the end only.

    Args:
        operands: x [N, rows, Rx] and y [N, rows, Ry].
        maps: to_x [N, Rx, Rs] and to_y [N, Ry, Rs].
        weights: w_x and w_y [N, rows, 1]; None: 1.
        minus: c [N, rows, 1] and z [N, rows, Rs]; None: nothing to subtract.
    """
    (x, y), (to_x, to_y) = operands, maps
    out = x.new_empty((*x.shape[:2], to_x.shape[2]))
    for rows in chunks(x):
        x_rows, y_rows = x[:, rows].to(to_x.dtype), y[:, rows].to(to_x.dtype)
        if weights is not None:
            x_rows, y_rows = x_rows * weights[0][:, rows], y_rows * weights[1][:, rows]
        part = torch.baddbmm(x_rows @ to_x, y_rows, to_y)
        if minus is not None:
            part = part - minus[0][:, rows] * minus[1][:, rows]
        out[:, rows] = part
    return out


def diagonal_of(student: Side, teacher: Side, offset: int, dtype: torch.dtype) -> Diagonal:
    own_keys, other_keys = (
        shifted(side.keys, offset, side.queries.shape[1]) for side in (student, teacher)
    )
    return Diagonal(
        own_keys,
        student.scale * _row_dots(student.queries.to(dtype), own_keys.to(dtype)),
        teacher.scale * _row_dots(teacher.queries.to(dtype), other_keys.to(dtype)),
        offset,
    )


def shifted(x: Tensor, offset: int, length: int) -> Tensor:
    """y [N, length, ...] with y_i = x_{i + offset}, and 0 beyond the ends."""
    out = x.new_zeros((x.shape[0], length, *x.shape[2:]))
    start, stop = max(0, -offset), min(length, x.shape[1] - offset)
    if start < stop:
        out[:, start:stop] = x[:, start + offset : stop + offset]
    return out


def chunks(x: Tensor) -> Iterator[slice]:
    """Row slices of x [N, rows, R] small enough to be copied in a wider dtype."""
    n, rows, rank = x.shape
    elements = _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    step = max(1, elements // max(1, n * rank))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _row_dots(x: Tensor, y: Tensor) -> Tensor:
    """sum_d x_id y_id [N, rows]."""
    return torch.linalg.vecdot(x, y)
