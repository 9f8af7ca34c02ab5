"""Tiles of pairs: their products, their affinities, and which of them take part.

Queries are rows i, keys are columns j. Addresses are 64-bit: a batch may hold more than 2^31 pairs.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import stages
from .layout import (
    AFFINITY_EPS,
    CLAMP_MIN,
    COLUMN_TERMS,
    ITEM_TERMS,
    LENGTH,
    OFFSET,
    ROW_TERMS,
    STUDENT_MEAN,
    TEACHER_ITEM,
)


class Tile(NamedTuple):
    """A tile of a matrix: `rows` and `columns` are those of the matrix, the inner ones start at 0.

    An address is a 64-bit one of the tile's corner plus a 32-bit one inside, as 64-bit numbers of
    every pair would take up half of the registers.
    """

    matrix: Any  # 64-bit
    row: Any  # the first
    column: Any
    inner_rows: Any  # [rows]
    inner_columns: Any  # [columns]
    rows: Any
    columns: Any
    row_exists: Any
    row_valid: Any
    column_valid: Any
    queries: Any
    keys: Any
    offset: Any  # row i has key i + offset on the diagonal


@triton.jit
def program_of(inner):
    """Where a program is in a grid [outer, inner], of which the first index changes faster.

    All programs lie along a launch's first axis, which takes 2^31 - 1: the others end at 65535.
    """
    outer = tl.num_programs(0) // inner
    return tl.program_id(0) % outer, tl.program_id(0) // outer


@triton.jit
def number(pairs, INDEX: tl.constexpr, HOW: tl.constexpr):
    return tl.load(pairs.numbers + INDEX).to(HOW.number)


@triton.jit
def valid_items(mask, matrix, items, count, MASKED: tl.constexpr):
    """Which of the items exist and are valid."""
    valid = items < count
    if MASKED:
        valid = valid & (tl.load(mask + matrix * count + items, mask=valid, other=0) != 0)
    return valid


@triton.jit
def tile_of(
    pairs, matrix, row, column, end, queries, keys, offset,
    HOW: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """The tile with this first row and column; rows from `end` on do not exist in it."""
    inner_rows = tl.arange(0, SHAPE.rows)
    inner_columns = tl.arange(0, SHAPE.columns)
    rows = row + inner_rows
    columns = column + inner_columns
    row_valid = valid_items(pairs.query_mask, matrix, rows, queries, HOW.query_mask)
    column_valid = valid_items(pairs.key_mask, matrix, columns, keys, HOW.key_mask)
    exists = rows < end
    return Tile(
        matrix, row, column, inner_rows, inner_columns, rows, columns,
        exists, exists & row_valid, column_valid, queries, keys, offset,
    )  # fmt: skip


@triton.jit
def pair_offsets(tile):
    """Of the pairs of a tile in [N, Q, K], from the first on."""
    return tile.inner_rows[:, None] * tile.keys + tile.inner_columns[None, :]


@triton.jit
def first_pair(tile):
    return (tile.matrix * tile.queries + tile.row) * tile.keys + tile.column


@triton.jit
def mirrored_first_pair(tile):
    return (tile.matrix * tile.queries + tile.column) * tile.keys + tile.row


@triton.jit
def on_diagonal(tile):
    return tile.rows[:, None] + tile.offset == tile.columns[None, :]


@triton.jit
def taking_part(pairs, tile, HOW: tl.constexpr, MIRRORED: tl.constexpr):
    """Which pairs (i, j) take part; `MIRRORED`: which (j, i) of a self-affinity, at [i, j]."""
    part = tile.row_valid[:, None] & tile.column_valid[None, :]
    if HOW.diagonal == "exclude" and HOW.has_diagonal:
        part = part & ~on_diagonal(tile)
    if HOW.pair_mask:
        at = pairs.pair_mask + first_pair(tile)
        offsets = pair_offsets(tile)
        if MIRRORED:
            at = pairs.pair_mask + mirrored_first_pair(tile)
            offsets = tile.inner_columns[None, :] * tile.keys + tile.inner_rows[:, None]
        part = part & (tl.load(at + offsets, mask=part, other=0) != 0)
    return part


@triton.jit
def inner_products(side, tile, HOW: tl.constexpr, SHAPE: tl.constexpr):
    """x_i.y_j [rows, columns]; an item that is not valid counts as 0, whatever it holds."""
    block_rows: tl.constexpr = SHAPE.rows
    block_columns: tl.constexpr = SHAPE.columns
    block_inner: tl.constexpr = SHAPE.inner
    inner = tl.arange(0, block_inner)
    row = tile.row.to(tl.int64) * side.query_stride
    column = tile.column.to(tl.int64) * side.key_stride
    x = side.queries + tile.matrix * side.query_matrix + row
    y = side.keys + tile.matrix * side.key_matrix + column
    x_offsets = tile.inner_rows[:, None] * side.query_stride + inner[None, :]
    y_offsets = tile.inner_columns[None, :] * side.key_stride + inner[:, None]
    products = tl.zeros((block_rows, block_columns), HOW.number)
    for start in range(0, side.dim, block_inner):
        inside = inner < side.dim - start
        row_inside = tile.row_valid[:, None] & inside[None, :]
        column_inside = tile.column_valid[None, :] & inside[:, None]
        a = tl.load(x + start + x_offsets, mask=row_inside, other=0.0)
        b = tl.load(y + start + y_offsets, mask=column_inside, other=0.0)
        if SHAPE.upcast:
            a = a.to(HOW.number)
            b = b.to(HOW.number)
        products = tl.dot(a, b, products, input_precision=SHAPE.precision, out_dtype=HOW.number)
    return products


@triton.jit
def lengths(pairs, tile, TEACHER: tl.constexpr):
    """1 / |x| or |x|^2 of the rows [rows, 1] and of the columns [1, columns]."""
    row = (tile.matrix * tile.queries + tile.rows) * ITEM_TERMS + TEACHER * TEACHER_ITEM
    column = (tile.matrix * tile.keys + tile.columns) * ITEM_TERMS + TEACHER * TEACHER_ITEM
    of_rows = tl.load(pairs.query_terms + row + LENGTH, mask=tile.row_valid, other=0.0)
    of_columns = tl.load(pairs.key_terms + column + LENGTH, mask=tile.column_valid, other=0.0)
    return of_rows[:, None], of_columns[None, :]


@triton.jit
def computed_values(
    pairs, side, tile, HOW: tl.constexpr, SHAPE: tl.constexpr, TEACHER: tl.constexpr
):
    """The values (stages.pair_value) of a tile of one side."""
    if SHAPE.mirrored:
        upper = tile_of(
            pairs, tile.matrix, tl.minimum(tile.row, tile.column),
            tl.maximum(tile.row, tile.column), tile.queries, tile.queries, tile.keys,
            tile.offset, HOW, SHAPE,
        )  # fmt: skip
        value = values_of_tile(pairs, side, upper, HOW, SHAPE, TEACHER)
        below = tile.rows[:, None] > tile.columns[None, :]
        return tl.where(below, tl.trans(value), value)
    else:
        return values_of_tile(pairs, side, tile, HOW, SHAPE, TEACHER)


@triton.jit
def values_of_tile(
    pairs, side, tile, HOW: tl.constexpr, SHAPE: tl.constexpr, TEACHER: tl.constexpr
):
    g = inner_products(side, tile, HOW, SHAPE)
    row_norm = 0.0
    column_norm = 0.0
    if HOW.unit or HOW.distance:
        row_norm, column_norm = lengths(pairs, tile, TEACHER)
    if HOW.unit:
        # the product first: A_ij and A_ji of a self-affinity must agree to the last bit
        g = stages.of_directions(g * (row_norm * column_norm), side.dim)
        # of a direction, which is 0 where the feature is
        row_norm = tl.where(row_norm == 0, 0.0, 1.0).to(HOW.number)
        column_norm = tl.where(column_norm == 0, 0.0, 1.0).to(HOW.number)
    scale = tl.load(side.scale).to(HOW.number)
    offset = number(pairs, OFFSET, HOW)
    eps = number(pairs, AFFINITY_EPS, HOW)
    value = stages.pair_value(g, row_norm, column_norm, scale, offset, eps, HOW)
    if HOW.distance and HOW.has_diagonal:
        # rounding under a root would leave 1e-3 of the distance from an item to itself
        same = 0.0
        if HOW.pair == "gaussian":
            same = 1.0
        value = tl.where(on_diagonal(tile), same, value)
    return value


@triton.jit
def pair_values(
    pairs, side, held, tile,
    HOW: tl.constexpr, SHAPE: tl.constexpr, HELD: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """The same, or what `held` [N, Q, K] has of them."""
    if HELD:
        inside = tile.row_valid[:, None] & tile.column_valid[None, :]
        return tl.load(held + first_pair(tile) + pair_offsets(tile), mask=inside, other=0.0)
    else:
        return computed_values(pairs, side, tile, HOW, SHAPE, TEACHER)


@triton.jit
def affinities(
    pairs, side, value, tile, HOW: tl.constexpr, MEANS: tl.constexpr, TEACHER: tl.constexpr
):
    """A of values: clamped, with its diagonal and, with `MEANS`, centered."""
    scale = tl.load(side.scale).to(HOW.number)
    affinity = stages.affinity_of(value, scale, number(pairs, OFFSET, HOW), HOW)
    if HOW.clamped:
        affinity = stages.at_least(affinity, number(pairs, CLAMP_MIN, HOW))
    if HOW.diagonal == "zero" and HOW.has_diagonal:
        affinity = tl.where(on_diagonal(tile), 0.0, affinity)
    if MEANS:
        affinity = less_means(pairs, affinity, tile, STUDENT_MEAN + TEACHER, TEACHER)
    return affinity


@triton.jit
def less_means(pairs, x, tile, ROW_TERM: tl.constexpr, COLUMN_TERM: tl.constexpr):
    """x less the means of its rows and columns."""
    row = (tile.matrix * tile.queries + tile.rows) * ROW_TERMS + ROW_TERM
    column = (tile.matrix * tile.keys + tile.columns) * COLUMN_TERMS + COLUMN_TERM
    row_mean = tl.load(pairs.row_terms + row, mask=tile.row_valid, other=0.0)
    column_mean = tl.load(pairs.column_terms + column, mask=tile.column_valid, other=0.0)
    return x - row_mean[:, None] - column_mean[None, :]


@triton.jit
def tile_affinities(
    pairs, tile,
    HOW: tl.constexpr, SHAPE: tl.constexpr, HELD: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """A of the student and of the teacher, and the student's values."""
    student, teacher = pairs.student, pairs.teacher
    value = pair_values(pairs, student, pairs.student_values, tile, HOW, SHAPE, HELD, 0)
    other = pair_values(pairs, teacher, pairs.teacher_values, tile, HOW, SHAPE, HELD, 1)
    a = affinities(pairs, student, value, tile, HOW, MEANS, 0)
    b = affinities(pairs, teacher, other, tile, HOW, MEANS, 1)
    return a, b, value
