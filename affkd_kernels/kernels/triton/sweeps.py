"""The sweeps over the pairs that find means, statistics and losses.

A program takes a block of rows of one matrix and one of `splits` runs of column tiles, and leaves
partial sums [N * Q, splits, parts] that combine.py adds up in a fixed order. There are no atomics,
so that two calls agree bit by bit. With `HELD` the pairs are read, not computed.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from . import stages
from .affinities import tile_affinities
from .layout import (
    BETA,
    CORRECTION,
    LOG_EPS,
    LOSS_PARTS,
    MEAN_PARTS,
    ROW_TERMS,
    SIZES,
    STATISTIC_PARTS,
    STUDENT_FIRST,
    STUDENT_INVERSE_TAU,
    STUDENT_SECOND,
    TEACHER_FIRST,
    TEACHER_INVERSE_TAU,
    TEACHER_SECOND,
    Terms,
)
from .runs import part_address, run_of, tile_of_run
from .scalings import lowest_of
from .tiles import number, on_diagonal, taking_part


@triton.jit(do_not_specialize=SIZES)
def means_kernel(
    pairs, partials, queries, keys, offset, tiles,
    HOW: tl.constexpr, SHAPE: tl.constexpr, HELD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Partial sums of A, and of A^2, along the rows, or (`COLUMNS`) along the columns."""
    block: tl.constexpr = SHAPE.columns if COLUMNS else SHAPE.rows
    axis: tl.constexpr = 0 if COLUMNS else 1
    run = run_of(queries, keys, tiles, SHAPE, COLUMNS)
    student = tl.zeros((block,), HOW.number)
    teacher = tl.zeros((block,), HOW.number)
    student_squares = tl.zeros((block,), HOW.number)
    teacher_squares = tl.zeros((block,), HOW.number)
    for step in tl.range(run.first, run.first + tiles, num_stages=1):
        tile = tile_of_run(pairs, run, step, queries, keys, offset, HOW, SHAPE, COLUMNS)
        a, b, _ = tile_affinities(pairs, tile, HOW, SHAPE, HELD, False)
        part = taking_part(pairs, tile, HOW, False)
        a = tl.where(part, a, 0.0)
        b = tl.where(part, b, 0.0)
        student += tl.sum(a, axis)
        teacher += tl.sum(b, axis)
        student_squares += tl.sum(a * a, axis)
        teacher_squares += tl.sum(b * b, axis)
    items = run.item + tl.arange(0, block)
    count = keys if COLUMNS else queries
    out = part_address(partials, run, items, count, MEAN_PARTS)
    exists = items < count
    tl.store(out, student, mask=exists)
    tl.store(out + 1, teacher, mask=exists)
    tl.store(out + 2, student_squares, mask=exists)
    tl.store(out + 3, teacher_squares, mask=exists)


@triton.jit
def add_statistic(first, second, affinity, part, inverse_tau, HOW: tl.constexpr):
    """The row's (first, second): a sum and a count, or a maximum and a sum relative to it."""
    if HOW.softmax or HOW.largest:
        largest = tl.max(tl.where(part, affinity, float("-inf")), 1)
        peak = tl.where(largest > first, largest, first)
        if HOW.softmax:
            # a row without pairs so far has no peak: any other number will do
            base = tl.where(peak == float("-inf"), 0.0, peak)
            terms = tl.exp((affinity - base[:, None]) * inverse_tau)
            second = second * tl.exp((first - base) * inverse_tau)
        else:
            terms = tl.where(affinity == peak[:, None], 1.0, 0.0)
            second = tl.where(peak == first, second, 0.0)
        return peak, second + tl.sum(tl.where(part, terms, 0.0), 1)
    else:
        counted = part
        if HOW.l2:
            terms = affinity * affinity
        elif HOW.normalization == "row_l1":
            terms = tl.abs(affinity)
        else:
            terms = affinity
            if HOW.normalization == "mean_positive":
                counted = part & (affinity > 0)
        first += tl.sum(tl.where(counted, terms, 0.0), 1)
        if HOW.whole:
            second += tl.sum(tl.where(counted, 1.0, 0.0), 1)
        return first, second


@triton.jit
def add_alignment(ratio, a, b, HOW: tl.constexpr):
    """Of a tile: sum_j a b and, r being about a / b, sum_j a (a - r b), along the rows.

    c is sum_j a (a - k b) up to a factor, for a k that all tiles decide. Where a and b are nearly
    proportional it vanishes, and sums of a^2 and of a b, rounded, would leave nothing of it; with
    any r, that of the first tile that has one, it is the second sum less (k - r) times the first.
    """
    product = tl.sum(a * b, 1)
    squares = tl.sum(b * b, 1)
    # where it is 0 no earlier tile's sums depend on it
    ratio = tl.where(ratio == 0, product / tl.where(squares > 0, squares, 1.0), ratio)
    rest = stages.multiply_add(-ratio[:, None], b, a, HOW)
    return ratio, product, tl.sum(a * rest, 1)


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    pairs, partials, queries, keys, offset, tiles,
    HOW: tl.constexpr, SHAPE: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Partial sums of the statistics of both sides; `tiles` are the column tiles of a split."""
    block: tl.constexpr = SHAPE.rows
    run = run_of(queries, keys, tiles, SHAPE)
    lowest = lowest_of(HOW)
    student_first = tl.full((block,), lowest, HOW.number)
    teacher_first = tl.full((block,), lowest, HOW.number)
    student_second = tl.zeros((block,), HOW.number)
    teacher_second = tl.zeros((block,), HOW.number)
    product = tl.zeros((block,), HOW.number)
    difference = tl.zeros((block,), HOW.number)
    ratio = tl.zeros((block,), HOW.number)
    count = tl.zeros((block,), HOW.number)
    student_inverse_tau = number(pairs, STUDENT_INVERSE_TAU, HOW)
    teacher_inverse_tau = number(pairs, TEACHER_INVERSE_TAU, HOW)
    for step in tl.range(run.first, run.first + tiles, num_stages=1):
        tile = tile_of_run(pairs, run, step, queries, keys, offset, HOW, SHAPE)
        a, b, _ = tile_affinities(pairs, tile, HOW, SHAPE, HELD, HOW.centered)
        part = taking_part(pairs, tile, HOW, False)
        if HOW.closed_correction:
            a_part = tl.where(part, a, 0.0)
            b_part = tl.where(part, b, 0.0)
            ratio, more_product, more_difference = add_alignment(ratio, a_part, b_part, HOW)
            product += more_product
            difference += more_difference
        if HOW.counted:
            count += tl.sum(tl.where(part, 1.0, 0.0), 1)
        if HOW.normalization == "mean_offdiag" and HOW.has_diagonal:
            part = part & ~on_diagonal(tile)
        student_first, student_second = add_statistic(
            student_first, student_second, a, part, student_inverse_tau, HOW
        )
        teacher_first, teacher_second = add_statistic(
            teacher_first, teacher_second, b, part, teacher_inverse_tau, HOW
        )
    rows = run.item + tl.arange(0, block)
    out = part_address(partials, run, rows, queries, STATISTIC_PARTS)
    exists = rows < queries
    tl.store(out, student_first, mask=exists)
    tl.store(out + 1, student_second, mask=exists)
    tl.store(out + 2, teacher_first, mask=exists)
    tl.store(out + 3, teacher_second, mask=exists)
    tl.store(out + 4, product, mask=exists)
    tl.store(out + 5, count, mask=exists)
    tl.store(out + 6, difference, mask=exists)
    tl.store(out + 7, ratio, mask=exists)


@triton.jit
def along(x, AXIS: tl.constexpr):
    """A term of the rows [rows, 1], or of the columns [1, columns]."""
    return x[:, None] if AXIS == 0 else x[None, :]


@triton.jit
def terms_of(pairs, tile, HOW: tl.constexpr, AXIS: tl.constexpr):
    """What normalizes the entries of the tile's rows, or (`AXIS` 1) of a self-affinity, as
    A_ij = A_ji, of the rows that have the tile's columns as theirs."""
    item = tile.matrix * tile.queries + (tile.rows if AXIS == 0 else tile.columns)
    valid = tile.row_valid if AXIS == 0 else tile.column_valid
    at = pairs.row_terms + item * ROW_TERMS
    zero = along(tl.zeros_like(item).to(HOW.number), AXIS)
    student_first = zero
    student_second = zero
    teacher_first = zero
    teacher_second = zero
    weight = zero
    correction = zero
    if HOW.normalization != "none":
        student_first = along(tl.load(at + STUDENT_FIRST, mask=valid, other=0.0), AXIS)
        teacher_first = along(tl.load(at + TEACHER_FIRST, mask=valid, other=0.0), AXIS)
    if HOW.needs_second:
        student_second = along(tl.load(at + STUDENT_SECOND, mask=valid, other=1.0), AXIS)
        teacher_second = along(tl.load(at + TEACHER_SECOND, mask=valid, other=1.0), AXIS)
    if HOW.has_correction:
        correction = along(tl.load(at + CORRECTION, mask=valid, other=0.0), AXIS)
    if HOW.row_weight:
        weight = along(tl.load(pairs.row_weight + item, mask=valid, other=0.0), AXIS)
    return Terms(student_first, student_second, teacher_first, teacher_second, weight, correction)


@triton.jit
def normalized_pair(pairs, a, b, terms, HOW: tl.constexpr):
    """s - t, s, log s, t, log t of a tile; the logarithms are those of a softmax."""
    student_inverse_tau = number(pairs, STUDENT_INVERSE_TAU, HOW)
    teacher_inverse_tau = number(pairs, TEACHER_INVERSE_TAU, HOW)
    s, log_s = stages.normalized(
        a, terms.student_first, terms.student_second, student_inverse_tau, HOW
    )
    t, log_t = stages.normalized(
        b, terms.teacher_first, terms.teacher_second, teacher_inverse_tau, HOW
    )
    difference = stages.normalized_difference(
        a, b, s, t, terms.student_first, terms.teacher_first, HOW
    )
    return difference, s, log_s, t, log_t


@triton.jit
def tile_losses(pairs, a, b, part, terms, HOW: tl.constexpr, CORRECTION: tl.constexpr):
    """Sums along the rows of a tile: losses, and (`CORRECTION`) dl/ds * s, which is c."""
    beta = number(pairs, BETA, HOW)
    eps = number(pairs, LOG_EPS, HOW)
    difference, s, log_s, t, log_t = normalized_pair(pairs, a, b, terms, HOW)
    balanced = 1.0
    if HOW.divergence and not HOW.softmax:
        nothing = (terms.student_first == 0) | (terms.teacher_first == 0)
        balanced = tl.where(nothing, 0.0, 1.0).to(HOW.number)
    value = stages.loss_value(difference, s, log_s, t, log_t, beta, eps, balanced, HOW)
    loss = tl.sum(tl.where(part, value, 0.0), 1)
    correction = tl.zeros_like(loss)
    if CORRECTION:
        slope = stages.loss_slope(difference, s, log_s, t, log_t, beta, eps, HOW)
        if not HOW.softmax:
            slope = slope * s
        correction = tl.sum(tl.where(part, slope, 0.0), 1)
    return loss, correction


@triton.jit(do_not_specialize=SIZES)
def losses_kernel(
    pairs, partials, queries, keys, offset, tiles,
    HOW: tl.constexpr, SHAPE: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Partial sums of the row losses and of c, both without the row weight."""
    block: tl.constexpr = SHAPE.rows
    run = run_of(queries, keys, tiles, SHAPE)
    loss = tl.zeros((block,), HOW.number)
    correction = tl.zeros((block,), HOW.number)
    count = tl.zeros((block,), HOW.number)
    for step in tl.range(run.first, run.first + tiles, num_stages=1):
        tile = tile_of_run(pairs, run, step, queries, keys, offset, HOW, SHAPE)
        a, b, _ = tile_affinities(pairs, tile, HOW, SHAPE, HELD, HOW.centered)
        part = taking_part(pairs, tile, HOW, False)
        terms = terms_of(pairs, tile, HOW, 0)
        more_loss, more_correction = tile_losses(
            pairs, a, b, part, terms, HOW, not HOW.known_correction
        )
        loss += more_loss
        correction += more_correction
        if HOW.counted:
            count += tl.sum(tl.where(part, 1.0, 0.0), 1)
    rows = run.item + tl.arange(0, block)
    out = part_address(partials, run, rows, queries, LOSS_PARTS)
    exists = rows < queries
    tl.store(out, loss, mask=exists)
    tl.store(out + 1, correction, mask=exists)
    tl.store(out + 2, count, mask=exists)
