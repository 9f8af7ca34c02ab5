"""The means that double centering subtracts, from partial sums of rows and columns.

One program a matrix, adding up in float64. For rows: their mean less the grand mean; for columns:
their mean. Only valid items count.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from .combine import total_part
from .layout import (
    COLUMN_TERMS,
    GRADIENT_COLUMN_MEAN,
    GRADIENT_MEAN,
    MATRIX_TERMS,
    MEAN_PARTS,
    ROW_TERMS,
    STUDENT_MEAN,
    STUDENT_SQUARES,
)
from .scalings import valid_count


@triton.jit
def matrix_total(partials, matrix, count, splits, PART: tl.constexpr, ROWS: tl.constexpr):
    total = tl.zeros((ROWS,), tl.float64)
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        row = matrix * count + rows
        total += total_part(partials, row, rows < count, splits, MEAN_PARTS, PART, ROWS)
    return tl.sum(total, 0)


@triton.jit
def store_means(
    partials, out, matrix, count, splits, divisor, less,
    HOW: tl.constexpr, PART: tl.constexpr, TERMS: tl.constexpr, TERM: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    for start in range(0, count, ROWS):
        items = start + tl.arange(0, ROWS)
        item = matrix * count + items
        exists = items < count
        total = total_part(partials, item, exists, splits, MEAN_PARTS, PART, ROWS)
        mean = (total / divisor - less).to(HOW.number)
        tl.store(out + item * TERMS + TERM, mean, mask=exists)


@triton.jit(do_not_specialize=["queries", "keys", "row_splits", "column_splits"])
def combine_means_kernel(
    pairs, row_partials, column_partials, matrix_terms, queries, keys, row_splits, column_splits,
    HOW: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Means of A of both sides and the sums of A^2, or (`GRADIENT`) the means of d loss / dA."""
    matrix = tl.program_id(0).to(tl.int64)
    valid_rows = valid_count(pairs.query_mask, matrix, queries, HOW.query_mask, ROWS)
    valid_columns = valid_count(pairs.key_mask, matrix, keys, HOW.key_mask, ROWS)
    sides: tl.constexpr = 1 if GRADIENT else 2
    row_term: tl.constexpr = GRADIENT_MEAN if GRADIENT else STUDENT_MEAN
    column_term: tl.constexpr = GRADIENT_COLUMN_MEAN if GRADIENT else 0
    for side in tl.static_range(sides):
        total = matrix_total(row_partials, matrix, queries, row_splits, side, ROWS)
        grand_mean = total / (valid_rows * valid_columns)
        store_means(
            row_partials, pairs.row_terms, matrix, queries, row_splits, valid_columns, grand_mean,
            HOW, side, ROW_TERMS, row_term + side, ROWS,
        )  # fmt: skip
        store_means(
            column_partials, pairs.column_terms, matrix, keys, column_splits, valid_rows, 0.0,
            HOW, side, COLUMN_TERMS, column_term + side, ROWS,
        )  # fmt: skip
        if not GRADIENT:
            squares = matrix_total(row_partials, matrix, queries, row_splits, 2 + side, ROWS)
            at = matrix_terms + matrix * MATRIX_TERMS + STUDENT_SQUARES + side
            tl.store(at, squares.to(HOW.number))
