"""From the partial sums of the losses to the loss, the constants of the backward, and the scale of
all gradients. Adds up in float64, always in the same order.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from .combine import rows_of_program, store_correction, total_part
from .layout import (
    CORRECTION,
    ITEM_TERMS,
    LOSS_PARTS,
    MATRIX_TERMS,
    PAIRS,
    POISON,
    ROW_TERMS,
    SLOPE_SCALE,
    TEACHER_ITEM,
    WEIGHT,
)
from .scalings import row_weights


@triton.jit
def poison_of(terms, matrix, count, ROWS: tl.constexpr):
    """NaN where an item of the matrix is not finite, else 0."""
    poison = tl.zeros((ROWS,), tl.float64)
    for start in range(0, count, ROWS):
        items = start + tl.arange(0, ROWS)
        at = terms + (matrix * count + items) * ITEM_TERMS + POISON
        poison += tl.load(at, mask=items < count, other=0.0).to(tl.float64)
        poison += tl.load(at + TEACHER_ITEM, mask=items < count, other=0.0).to(tl.float64)
    return tl.sum(poison, 0)


@triton.jit
def divisor(
    rows_total, keys, matrices, rows_with, pairs_with, HOW: tl.constexpr, REDUCTION: tl.constexpr
):
    """What the reduction divides by, at least 1."""
    if HOW.counted:
        rows, pairs = rows_with, pairs_with
    else:
        rows = rows_total.to(tl.float64)
        pairs = rows * keys
    count = tl.full((), 1.0, tl.float64)
    if REDUCTION == "mean":
        count = pairs
    elif REDUCTION == "batchmean":
        count = rows
    elif REDUCTION == "matrixmean":
        count = matrices.to(tl.float64)
    return tl.where(count > 0, count, 1.0)


@triton.jit(do_not_specialize=["queries", "keys", "splits"])
def combine_losses_kernel(
    pairs, partials, matrix_terms, row_losses, totals, queries, keys, splits,
    HOW: tl.constexpr, CORRECTIONS: tl.constexpr, REDUCTION: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The row losses [N, Q], times weight and row weight, and c from the parts of a sweep.

    A program takes a block of rows, or (`WHOLE`) a matrix. With a `REDUCTION`, for a single matrix
    only, it also does what `finish_kernel` does.
    """
    matrix, first_block, last_block = rows_of_program(queries, WHOLE, ROWS)
    poison = poison_of(pairs.query_terms, matrix, queries, ROWS)
    if not HOW.self_affinity:
        poison += poison_of(pairs.key_terms, matrix, keys, ROWS)
    weight = tl.load(pairs.numbers + WEIGHT)
    corrections = tl.zeros((ROWS,), tl.float64)
    losses = tl.zeros((ROWS,), tl.float64)
    rows_with = tl.zeros((ROWS,), tl.float64)
    pairs_with = tl.zeros((ROWS,), tl.float64)
    for block in range(first_block, last_block):
        rows = block * ROWS + tl.arange(0, ROWS)
        exists = rows < queries
        row = matrix * queries + rows
        loss = total_part(partials, row, exists, splits, LOSS_PARTS, 0, ROWS)
        some = exists
        terms = pairs.row_terms + row * ROW_TERMS
        if HOW.counted:
            count = total_part(partials, row, exists, splits, LOSS_PARTS, 2, ROWS)
            some = count > 0
            tl.store(terms + PAIRS, count.to(HOW.number), mask=exists)
            pairs_with += count
            rows_with += tl.where(some, 1.0, 0.0)
        row_weight = row_weights(pairs.row_weight, row, exists, HOW)
        loss = tl.where(some, weight * row_weight * (loss + poison), 0.0)
        losses += loss
        tl.store(row_losses + row, loss.to(HOW.number), mask=exists)
        if CORRECTIONS:
            correction = total_part(partials, row, exists, splits, LOSS_PARTS, 1, ROWS)
            correction = tl.where(some, row_weight * correction, 0.0)
            corrections += correction
            if not HOW.whole:
                tl.store(terms + CORRECTION, correction.to(HOW.number), mask=exists)
    if CORRECTIONS and HOW.whole:
        total = tl.sum(corrections, 0)
        total *= tl.load(matrix_terms + matrix * MATRIX_TERMS + SLOPE_SCALE)
        store_correction(pairs, total, matrix, queries, HOW, ROWS)
    if REDUCTION != "none":
        one = tl.full((), 1, tl.int32)
        count = divisor(
            queries, keys, one, tl.sum(rows_with, 0), tl.sum(pairs_with, 0), HOW, REDUCTION
        )
        tl.store(totals, (tl.sum(losses, 0) / count).to(HOW.number))
        tl.store(totals + 1, (weight / count).to(HOW.number))


@triton.jit(do_not_specialize=["rows_total", "keys", "matrices"])
def finish_kernel(
    pairs, row_losses, totals, rows_total, keys, matrices,
    HOW: tl.constexpr, REDUCTION: tl.constexpr, LOSS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """totals: (`LOSS`) the loss; and weight / count, which every gradient is multiplied by."""
    loss = tl.zeros((ROWS,), tl.float64)
    rows_with = tl.zeros((ROWS,), tl.float64)
    pairs_with = tl.zeros((ROWS,), tl.float64)
    if LOSS or HOW.counted:
        for start in range(0, rows_total, ROWS):
            rows = start + tl.arange(0, ROWS)
            exists = rows < rows_total
            if LOSS:
                loss += tl.load(row_losses + rows, mask=exists, other=0.0).to(tl.float64)
            if HOW.counted:
                at = pairs.row_terms + rows.to(tl.int64) * ROW_TERMS + PAIRS
                count = tl.load(at, mask=exists, other=0.0).to(tl.float64)
                pairs_with += count
                rows_with += tl.where(count > 0, 1.0, 0.0)
    count = divisor(
        rows_total, keys, matrices, tl.sum(rows_with, 0), tl.sum(pairs_with, 0), HOW, REDUCTION
    )
    if LOSS:
        tl.store(totals, (tl.sum(loss, 0) / count).to(HOW.number))
    tl.store(totals + 1, (tl.load(pairs.numbers + WEIGHT) / count).to(HOW.number))


@triton.jit(do_not_specialize=["parts"])
def scale_gradient_kernel(partials, totals, out, parts, HOW: tl.constexpr, ROWS: tl.constexpr):
    """d loss / d student_scale, from sums of V * g: a self-affinity's V holds dA twice."""
    total = tl.zeros((ROWS,), tl.float64)
    for start in range(0, parts, ROWS):
        at = start + tl.arange(0, ROWS)
        term = partials + at.to(tl.int64) * LOSS_PARTS + 3
        total += tl.load(term, mask=at < parts, other=0.0).to(tl.float64)
    factor = tl.load(totals + 1).to(tl.float64)
    if HOW.self_affinity:
        factor = 0.5 * factor
    tl.store(out, (tl.sum(total, 0) * factor).to(HOW.number))
