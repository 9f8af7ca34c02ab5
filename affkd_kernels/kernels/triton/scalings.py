"""From the states of statistics (sweeps.add_statistic) to what normalizes entries; float64."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from .layout import (
    ITEM_TERMS,
    LENGTH,
    MATRIX_TERMS,
    STATISTIC_EPS,
    STUDENT_GRAND,
    STUDENT_SQUARES,
    TEACHER_ITEM,
)
from .tiles import valid_items


@triton.jit
def lowest_of(HOW: tl.constexpr):
    """The first number of the state of nothing."""
    if HOW.softmax or HOW.largest:
        return float("-inf")
    else:
        return 0.0


@triton.jit
def statistic_of_row(first, HOW: tl.constexpr):
    if HOW.l2:
        return tl.sqrt(first)
    else:
        return first


@triton.jit
def valid_count(mask, matrix, count, MASKED: tl.constexpr, ROWS: tl.constexpr):
    """How many items of a matrix are valid, at least 1."""
    total = tl.zeros((ROWS,), tl.float64)
    for start in range(0, count, ROWS):
        items = start + tl.arange(0, ROWS)
        total += tl.where(valid_items(mask, matrix, items, count, MASKED), 1.0, 0.0)
    total = tl.sum(total, 0)
    return tl.where(total > 0, total, 1.0)


@triton.jit
def merged(first, second, other_first, other_second, inverse_tau, HOW: tl.constexpr):
    """Two states (sweeps.add_statistic) of the same statistic as one."""
    if HOW.softmax or HOW.largest:
        peak = tl.where(other_first > first, other_first, first)
        if HOW.softmax:
            base = tl.where(peak == float("-inf"), 0.0, peak)
            second = second * tl.exp((first - base) * inverse_tau)
            other_second = other_second * tl.exp((other_first - base) * inverse_tau)
        else:
            second = tl.where(first == peak, second, 0.0)
            other_second = tl.where(other_first == peak, other_second, 0.0)
        return peak, second + other_second
    else:
        return first + other_first, second + other_second


@triton.jit
def divisor_of(statistic, numbers):
    """Infinity where the statistic counts as nothing, NaN where it overflowed: the quotient must
    not pass for 0."""
    statistic = statistic + (statistic - statistic)
    return tl.where(statistic <= tl.load(numbers + STATISTIC_EPS), float("inf"), statistic)


@triton.jit
def statistic_of_matrix(first, second, squares, HOW: tl.constexpr):
    """The statistic of the merged rows of a matrix, and what its slope lacks."""
    if HOW.largest:
        largest = tl.max(first, 0)
        ties = tl.sum(tl.where(first == largest, second, 0.0), 0)
        return largest, 1.0 / tl.where(ties > 0, ties, 1.0)
    else:
        total = tl.sum(first, 0)
        count = tl.sum(second, 0)
        if HOW.l2:
            norm = tl.sqrt(total)
            if HOW.normalization == "frobenius_centered":
                # what is left of a constant matrix is rounding
                epsilon = 1.1920928955078125e-07
                if HOW.double:
                    epsilon = 2.220446049250313e-16
                norm = tl.where(norm <= 8.0 * epsilon * tl.sqrt(squares), 0.0, norm)
            return norm, 1.0
        else:
            inverse = tl.where(count > 0, 1.0 / tl.where(count > 0, count, 1.0), 0.0)
            return total * inverse, inverse


@triton.jit
def normalizing_terms(first, second, statistic, numbers, HOW: tl.constexpr):
    """The two terms that normalize the entries of rows, from their states and statistics."""
    if HOW.softmax:
        # a row without pairs has neither peak nor sum
        nothing = second == 0
        first = tl.where(nothing, 0.0, first)
        second = tl.log(tl.where(nothing, 1.0, second))
    else:
        second = divisor_of(statistic, numbers)
        first = 1.0 / second
    return first.to(HOW.number), second.to(HOW.number)


@triton.jit
def row_weights(row_weight, row, exists, HOW: tl.constexpr):
    if HOW.row_weight:
        return tl.load(row_weight + row, mask=exists, other=0.0).to(tl.float64)
    else:
        return tl.where(exists, 1.0, 0.0).to(tl.float64)


@triton.jit
def sum_of_squares(terms, matrix, count, TEACHER: tl.constexpr, ROWS: tl.constexpr):
    """Of the lengths of the items of a matrix."""
    total = tl.zeros((ROWS,), tl.float64)
    for start in range(0, count, ROWS):
        items = start + tl.arange(0, ROWS)
        at = terms + (matrix * count + items) * ITEM_TERMS + TEACHER * TEACHER_ITEM + LENGTH
        length = tl.load(at, mask=items < count, other=0.0).to(tl.float64)
        total += length * length
    return tl.sum(total, 0)


@triton.jit
def squares_taken_out(
    pairs, matrix_terms, matrix, queries, keys,
    HOW: tl.constexpr, ROWS: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """What centering the features took out of the sum of A^2.

    With features x + m, x centered, A = X Y' + X m_y 1' + 1 m_x' Y' + m_x.m_y 11' in orthogonal
    parts: the squared norms of the last three.
    """
    of_rows = sum_of_squares(pairs.query_terms, matrix, queries, TEACHER, ROWS)
    of_columns = sum_of_squares(pairs.key_terms, matrix, keys, TEACHER, ROWS)
    rows = valid_count(pairs.query_mask, matrix, queries, HOW.query_mask, ROWS)
    columns = valid_count(pairs.key_mask, matrix, keys, HOW.key_mask, ROWS)
    grand = tl.load(matrix_terms + matrix * MATRIX_TERMS + STUDENT_GRAND + TEACHER).to(tl.float64)
    side = pairs.teacher if TEACHER else pairs.student
    scale = tl.load(side.scale).to(tl.float64)
    return scale * scale * (columns * of_rows + rows * of_columns + rows * columns * grand * grand)


@triton.jit
def statistic_of_states(
    pairs, matrix_terms, first, second, matrix, queries, keys,
    HOW: tl.constexpr, ROWS: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """The statistic of a whole matrix from states of its parts, and what its slope lacks."""
    squares = 0.0
    if HOW.centered:
        at = matrix_terms + matrix * MATRIX_TERMS + STUDENT_SQUARES + TEACHER
        squares = tl.load(at).to(tl.float64)
    if HOW.centered_features:
        squares = tl.sum(first, 0) + squares_taken_out(
            pairs, matrix_terms, matrix, queries, keys, HOW, ROWS, TEACHER
        )
    return statistic_of_matrix(first, second, squares, HOW)
