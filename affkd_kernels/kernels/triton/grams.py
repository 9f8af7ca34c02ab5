"""The pairs of a batch that are held: one product a side, and all that its items tell on the way.

Where nothing has prepared the items (`PREPARED`), a tile finds their lengths from its own product,
and takes a distance from the mean of its own items. Of every matrix that has one statistic it
leaves the tile's part of it.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from .affinities import (
    PairNumbers,
    affinities,
    inner_products,
    lengths,
    pair_arguments,
    pair_numbers,
    values_of,
)
from .layout import ITEM_TERMS, LENGTH, SIZES, TEACHER_ITEM
from .prepare import inverse_length, store_numbers
from .runs import run_of, tile_of_run
from .scalings import lowest_of
from .sweeps import add_statistic
from .tiles import first_pair, mirrored_first_pair, on_diagonal, pair_offsets, taking_part


@triton.jit
def store_arguments(held, argument, tile, HOW: tl.constexpr):
    """Of a self-affinity what lies on or above the diagonal, and its mirror image."""
    rows, columns = tile.rows, tile.columns
    inside = (rows < tile.queries)[:, None] & (columns < tile.keys)[None, :]
    if HOW.self_affinity:
        inside = inside & (rows[:, None] <= columns[None, :])
    tl.store(held + first_pair(tile) + pair_offsets(tile), argument, mask=inside)
    if HOW.self_affinity:
        exists = (columns < tile.keys)[:, None] & (rows < tile.queries)[None, :]
        below = exists & (columns[:, None] > rows[None, :])
        at = held + mirrored_first_pair(tile)
        at += tile.inner_columns[:, None] * tile.keys + tile.inner_rows[None, :]
        tl.store(at, tl.trans(argument), mask=below)


@triton.jit
def tile_statistic(pairs, argument, tile, numbers, HOW: tl.constexpr, SHAPE: tl.constexpr):
    """The state (sweeps.add_statistic) of a tile, and of its mirror image, as two numbers."""
    block: tl.constexpr = SHAPE.rows
    affinity = affinities(values_of(argument, tile, numbers, HOW), tile, numbers, HOW)
    first = tl.full((block,), lowest_of(HOW), HOW.number)
    second = tl.zeros((block,), HOW.number)
    inverse_tau = 1.0
    part = taking_part(pairs, tile, HOW, False)
    if HOW.normalization == "mean_offdiag" and HOW.has_diagonal:
        part = part & ~on_diagonal(tile)
    if HOW.self_affinity:
        rows, columns = tile.rows[:, None], tile.columns[None, :]
        mirrored = taking_part(pairs, tile, HOW, True) & (rows < columns)
        first, second = add_statistic(first, second, affinity, mirrored, inverse_tau, HOW)
        part = part & (rows <= columns)
    first, second = add_statistic(first, second, affinity, part, inverse_tau, HOW)
    if HOW.largest:
        largest = tl.max(first, 0)
        return largest, tl.sum(tl.where(first == largest, second, 0.0), 0)
    else:
        return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def block_poison(x, valid, items, dim, stride, SHAPE: tl.constexpr, HOW: tl.constexpr):
    """NaN where a valid item of a block is not finite, else 0."""
    size: tl.constexpr = SHAPE.inner
    poison = tl.zeros((size,), HOW.number)
    for start in range(0, dim, size):
        features = start + tl.arange(0, size)
        at = x + items[:, None] * stride + features[None, :]
        values = tl.load(at, mask=valid[:, None] & (features < dim)[None, :], other=0.0)
        poison += tl.sum(values.to(HOW.number) * 0.0, 0)
    return tl.sum(poison, 0)


@triton.jit
def store_lengths(terms, norms, matrix, items, count, TEACHER: tl.constexpr):
    out = terms + (matrix * count + items) * ITEM_TERMS + TEACHER * TEACHER_ITEM + LENGTH
    tl.store(out, norms, mask=items < count)


@triton.jit
def tell_of_keys(
    pairs, side, poison, norms, tile, HOW: tl.constexpr, SHAPE: tl.constexpr, TEACHER: tl.constexpr
):
    if tile.row == 0:
        y = side.keys + tile.matrix * side.key_matrix
        y += tile.column.to(tl.int64) * side.key_stride
        found = block_poison(
            y, tile.column_valid, tile.inner_columns, side.dim, side.key_stride, SHAPE, HOW
        )
        tl.store(poison + tile.column // SHAPE.columns, found)
        if HOW.unit:
            store_lengths(pairs.key_terms, norms, tile.matrix, tile.columns, tile.keys, TEACHER)


@triton.jit
def tell_of_items(
    pairs, side, poison, row_norms, column_norms, tile, run,
    HOW: tl.constexpr, SHAPE: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """Lengths of directions, and what is not finite, by the first tile of every block of items.

    poison: [N, 2, blocks of queries + blocks of keys].
    """
    row_blocks = tl.cdiv(tile.queries, SHAPE.rows)
    column_blocks = 0
    first_column = tile.row
    if not HOW.self_affinity:
        column_blocks = tl.cdiv(tile.keys, SHAPE.columns)
        first_column = 0
    out = poison + (tile.matrix * 2 + TEACHER) * (row_blocks + column_blocks)
    if run.first == first_column // SHAPE.columns:
        x = side.queries + tile.matrix * side.query_matrix
        x += tile.row.to(tl.int64) * side.query_stride
        found = block_poison(
            x, tile.row_valid, tile.inner_rows, side.dim, side.query_stride, SHAPE, HOW
        )
        tl.store(out + tile.row // SHAPE.rows, found)
        if HOW.unit:
            store_lengths(
                pairs.query_terms, row_norms, tile.matrix, tile.rows, tile.queries, TEACHER
            )
    if not HOW.self_affinity:
        tell_of_keys(pairs, side, out + row_blocks, column_norms, tile, HOW, SHAPE, TEACHER)


@triton.jit
def gram_of_side(
    pairs, side, held, states, poison, numbers, tile, run,
    HOW: tl.constexpr, SHAPE: tl.constexpr, PREPARED: tl.constexpr, STASHED: tl.constexpr,
    TEACHER: tl.constexpr,
):  # fmt: skip
    moved: tl.constexpr = HOW.copied and not PREPARED
    squares: tl.constexpr = (HOW.unit or HOW.distance) and not PREPARED
    g, row_norms, column_norms = inner_products(side, tile, HOW, SHAPE, moved, squares)
    if PREPARED:
        if HOW.unit or HOW.distance:
            row_norms, column_norms = lengths(pairs, tile, TEACHER)
    elif HOW.unit:
        row_norms = inverse_length(row_norms, numbers.eps)
        column_norms = inverse_length(column_norms, numbers.eps)
    argument = pair_arguments(g, row_norms, column_norms, side.dim, HOW)
    store_arguments(held, argument, tile, HOW)
    if STASHED and HOW.whole:
        first, second = tile_statistic(pairs, argument, tile, numbers, HOW, SHAPE)
        tl.store(states, first)
        tl.store(states + 1, second)
    if not PREPARED:
        tell_of_items(pairs, side, poison, row_norms, column_norms, tile, run, HOW, SHAPE, TEACHER)


@triton.jit(do_not_specialize=SIZES)
def gram_kernel(
    pairs, states, poison, queries, keys, offset,
    student_scale: tl.float64, teacher_scale: tl.float64, affinity_offset: tl.float64,
    affinity_eps: tl.float64, clamp_min: tl.float64, statistic_eps: tl.float64,
    student_inverse_tau: tl.float64, teacher_inverse_tau: tl.float64,
    beta: tl.float64, log_eps: tl.float64, weight: tl.float64,
    HOW: tl.constexpr, SHAPE: tl.constexpr, PREPARED: tl.constexpr, STASHED: tl.constexpr,
    STUDENT_SCALED: tl.constexpr, TEACHER_SCALED: tl.constexpr,
):  # fmt: skip
    """The arguments of all pairs, one tile of one side a program, to where they are held.

    `STASHED`: with the states [N, 2, tiles, 2] of the statistics of whole matrices. Unless items
    are `PREPARED`, it is the first kernel of a call, and stores its numbers; a scale that is a
    tensor (`STUDENT_SCALED`, `TEACHER_SCALED`) is none of them.
    """
    if not PREPARED:
        store_numbers(
            pairs.numbers,
            (student_scale, teacher_scale, affinity_offset, affinity_eps, clamp_min,
             statistic_eps, student_inverse_tau, teacher_inverse_tau, beta, log_eps, weight),
        )  # fmt: skip
    run = run_of(queries, keys, 1, SHAPE)
    tiles = tl.cdiv(queries, SHAPE.rows) * run.splits
    place = (run.matrix * 2 + tl.program_id(1)) * tiles + run.item // SHAPE.rows * run.splits
    states += (place + run.first) * 2
    if not HOW.self_affinity or (run.first + 1) * SHAPE.columns > run.item:
        tile = tile_of_run(pairs, run, run.first, queries, keys, offset, HOW, SHAPE)
        if tl.program_id(1) == 0:
            numbers = side_numbers(
                pairs, pairs.student, student_scale, affinity_offset, affinity_eps, clamp_min,
                HOW, PREPARED, STUDENT_SCALED,
            )  # fmt: skip
            gram_of_side(
                pairs, pairs.student, pairs.student_held, states, poison, numbers, tile, run,
                HOW, SHAPE, PREPARED, STASHED, 0,
            )  # fmt: skip
        else:
            numbers = side_numbers(
                pairs, pairs.teacher, teacher_scale, affinity_offset, affinity_eps, clamp_min,
                HOW, PREPARED, TEACHER_SCALED,
            )  # fmt: skip
            gram_of_side(
                pairs, pairs.teacher, pairs.teacher_held, states, poison, numbers, tile, run,
                HOW, SHAPE, PREPARED, STASHED, 1,
            )  # fmt: skip
    elif STASHED and HOW.whole:
        tl.store(states, tl.full((), lowest_of(HOW), HOW.number))
        tl.store(states + 1, tl.full((), 0.0, HOW.number))


@triton.jit
def side_numbers(
    pairs, side, scale, offset, eps, clamp_min,
    HOW: tl.constexpr, PREPARED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """What another kernel has stored, else what the arguments say."""
    if PREPARED:
        return pair_numbers(pairs, side, HOW)
    else:
        factor = as_number(scale, HOW)
        if SCALED:
            factor = tl.load(side.scale).to(HOW.number)
        return PairNumbers(
            factor, as_number(offset, HOW), as_number(eps, HOW), as_number(clamp_min, HOW)
        )


@triton.jit
def as_number(x, HOW: tl.constexpr):
    return tl.full((), x, tl.float64).to(HOW.number)
