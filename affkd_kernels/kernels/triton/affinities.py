"""The affinities of a tile of pairs: its products, what the pair function makes of them, and A."""

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
from .tiles import first_pair, number, on_diagonal, pair_offsets, tile_of


class PairNumbers(NamedTuple):
    """What a pair function of one side takes besides pairs."""

    scale: Any
    offset: Any
    eps: Any
    clamp_min: Any


@triton.jit
def origin_of(x, y, row_valid, column_valid, HOW: tl.constexpr):
    """The mean of the valid items of a tile, feature by feature."""
    count = tl.sum(row_valid.to(HOW.number), 0) + tl.sum(column_valid.to(HOW.number), 0)
    return (tl.sum(x, 0) + tl.sum(y, 1)) / tl.where(count > 0, count, 1.0)


@triton.jit
def inner_products(
    side, tile, HOW: tl.constexpr, SHAPE: tl.constexpr, MOVED: tl.constexpr, SQUARES: tl.constexpr
):  # fmt: skip
    """x_i.y_j [rows, columns], and (`SQUARES`) |x_i|^2 and |y_j|^2, else 0.

    An item that is not valid counts as 0, whatever it holds. `MOVED`: of items less their mean.
    """
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
    x_squares = tl.zeros((block_rows,), HOW.number)
    y_squares = tl.zeros((block_columns,), HOW.number)
    for start in range(0, side.dim, block_inner):
        inside = inner < side.dim - start
        row_inside = tile.row_valid[:, None] & inside[None, :]
        column_inside = tile.column_valid[None, :] & inside[:, None]
        a = tl.load(x + start + x_offsets, mask=row_inside, other=0.0)
        b = tl.load(y + start + y_offsets, mask=column_inside, other=0.0)
        if SHAPE.upcast or MOVED:
            a = a.to(HOW.number)
            b = b.to(HOW.number)
        if MOVED:
            origin = origin_of(a, b, tile.row_valid, tile.column_valid, HOW)
            a = tl.where(row_inside, a - origin[None, :], 0.0)
            b = tl.where(column_inside, b - origin[:, None], 0.0)
        if SQUARES:
            x_squares += tl.sum(a.to(HOW.number) * a.to(HOW.number), 1)
            y_squares += tl.sum(b.to(HOW.number) * b.to(HOW.number), 0)
        products = tl.dot(a, b, products, input_precision=SHAPE.precision, out_dtype=HOW.number)
    return products, x_squares, y_squares


@triton.jit
def lengths(pairs, tile, TEACHER: tl.constexpr):
    """1 / |x| or |x|^2 of the rows and of the columns."""
    row = (tile.matrix * tile.queries + tile.rows) * ITEM_TERMS + TEACHER * TEACHER_ITEM
    column = (tile.matrix * tile.keys + tile.columns) * ITEM_TERMS + TEACHER * TEACHER_ITEM
    of_rows = tl.load(pairs.query_terms + row + LENGTH, mask=tile.row_valid, other=0.0)
    of_columns = tl.load(pairs.key_terms + column + LENGTH, mask=tile.column_valid, other=0.0)
    return of_rows, of_columns


@triton.jit
def pair_arguments(g, row_norms, column_norms, dim, HOW: tl.constexpr):
    """What the pair function takes (stages.pair_argument), from products and lengths."""
    row_norm = row_norms[:, None]
    column_norm = column_norms[None, :]
    if HOW.unit:
        # the product first: A_ij and A_ji of a self-affinity must agree to the last bit
        g = stages.of_directions(g * (row_norm * column_norm), dim)
        # of a direction, which is 0 where the feature is
        row_norm = tl.where(row_norm == 0, 0.0, 1.0).to(HOW.number)
        column_norm = tl.where(column_norm == 0, 0.0, 1.0).to(HOW.number)
    return stages.pair_argument(g, row_norm, column_norm, HOW)


@triton.jit
def computed_arguments(
    pairs, side, tile, HOW: tl.constexpr, SHAPE: tl.constexpr, TEACHER: tl.constexpr
):
    """Of a tile of one side, whatever its shape says of mirroring."""
    g, _, _ = inner_products(side, tile, HOW, SHAPE, False, False)
    if HOW.unit or HOW.distance:
        row_norms, column_norms = lengths(pairs, tile, TEACHER)
        return pair_arguments(g, row_norms, column_norms, side.dim, HOW)
    else:
        return g


@triton.jit
def held_or_computed(
    pairs, side, held, tile,
    HOW: tl.constexpr, SHAPE: tl.constexpr, HELD: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """The arguments of a tile of one side: what `held` [N, Q, K] has of them, or computed."""
    if HELD:
        inside = tile.row_valid[:, None] & tile.column_valid[None, :]
        return tl.load(held + first_pair(tile) + pair_offsets(tile), mask=inside, other=0.0)
    elif SHAPE.mirrored:
        upper = tile_of(
            pairs, tile.matrix, tl.minimum(tile.row, tile.column),
            tl.maximum(tile.row, tile.column), tile.queries, tile.queries, tile.keys,
            tile.offset, HOW, SHAPE,
        )  # fmt: skip
        argument = computed_arguments(pairs, side, upper, HOW, SHAPE, TEACHER)
        below = tile.rows[:, None] > tile.columns[None, :]
        return tl.where(below, tl.trans(argument), argument)
    else:
        return computed_arguments(pairs, side, tile, HOW, SHAPE, TEACHER)


@triton.jit
def pair_numbers(pairs, side, HOW: tl.constexpr):
    scale = tl.load(side.scale).to(HOW.number)
    offset = number(pairs, OFFSET, HOW)
    return PairNumbers(
        scale, offset, number(pairs, AFFINITY_EPS, HOW), number(pairs, CLAMP_MIN, HOW)
    )


@triton.jit
def values_of(argument, tile, numbers, HOW: tl.constexpr):
    """The values (stages.pair_value) of the arguments of a tile."""
    value = stages.pair_value(argument, numbers.scale, numbers.offset, numbers.eps, HOW)
    if HOW.distance and HOW.has_diagonal:
        # rounding under a root would leave 1e-3 of the distance from an item to itself
        same = 0.0
        if HOW.pair == "gaussian":
            same = 1.0
        value = tl.where(on_diagonal(tile), same, value)
    return value


@triton.jit
def affinities(value, tile, numbers, HOW: tl.constexpr):
    """A of values: clamped, with its diagonal."""
    affinity = stages.affinity_of(value, numbers.scale, numbers.offset, HOW)
    if HOW.clamped:
        affinity = stages.at_least(affinity, numbers.clamp_min)
    if HOW.diagonal == "zero" and HOW.has_diagonal:
        affinity = tl.where(on_diagonal(tile), 0.0, affinity)
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
def side_affinities(
    pairs, side, argument, tile, HOW: tl.constexpr, MEANS: tl.constexpr, TEACHER: tl.constexpr
):
    """A of one side, with `MEANS` centered, and its values."""
    numbers = pair_numbers(pairs, side, HOW)
    value = values_of(argument, tile, numbers, HOW)
    affinity = affinities(value, tile, numbers, HOW)
    if MEANS:
        affinity = less_means(pairs, affinity, tile, STUDENT_MEAN + TEACHER, TEACHER)
    return affinity, value


@triton.jit
def tile_affinities(
    pairs, tile,
    HOW: tl.constexpr, SHAPE: tl.constexpr, HELD: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """A of the student and of the teacher, and the student's values."""
    student, teacher = pairs.student, pairs.teacher
    # both products first: nothing else then takes registers beside them
    x = held_or_computed(pairs, student, pairs.student_held, tile, HOW, SHAPE, HELD, 0)
    y = held_or_computed(pairs, teacher, pairs.teacher_held, tile, HOW, SHAPE, HELD, 1)
    a, value = side_affinities(pairs, student, x, tile, HOW, MEANS, 0)
    b, _ = side_affinities(pairs, teacher, y, tile, HOW, MEANS, 1)
    return a, b, value
