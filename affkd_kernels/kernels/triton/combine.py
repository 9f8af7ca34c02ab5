"""From the partial sums of a sweep to statistics, the constants of the backward, and the loss.

Small kernels that add up in float64, always in the same order. Of a statistic per matrix one
program takes a whole matrix, in blocks of rows; else each block of rows is a program.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from .layout import (
    CORRECTION,
    ITEM_TERMS,
    LENGTH,
    MATRIX_TERMS,
    PAIRS,
    ROW_TERMS,
    SLOPE_SCALE,
    STATISTIC_EPS,
    STATISTIC_PARTS,
    STUDENT_GRAND,
    STUDENT_INVERSE_TAU,
    STUDENT_SQUARES,
    TEACHER_ITEM,
)
from .tiles import valid_items


@triton.jit
def rows_of_program(queries, WHOLE: tl.constexpr, ROWS: tl.constexpr):
    """The matrix, and the first block of rows and the last."""
    blocks = tl.cdiv(queries, ROWS)
    if WHOLE:
        return tl.program_id(0).to(tl.int64), 0, blocks
    else:
        block = tl.program_id(0) % blocks
        return (tl.program_id(0) // blocks).to(tl.int64), block, block + 1


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
def row_state(partials, numbers, row, exists, splits, HOW: tl.constexpr, ROWS: tl.constexpr,
              TEACHER: tl.constexpr):  # fmt: skip
    """The state of rows, from those of the splits; float64."""
    lowest = 0.0
    inverse_tau = tl.load(numbers + STUDENT_INVERSE_TAU + TEACHER)
    if HOW.softmax or HOW.largest:
        lowest = float("-inf")
    first = tl.full((ROWS,), lowest, tl.float64)
    second = tl.zeros((ROWS,), tl.float64)
    for split in range(0, splits):
        part = partials + (row * splits + split) * STATISTIC_PARTS + 2 * TEACHER
        other_first = tl.load(part, mask=exists, other=lowest).to(tl.float64)
        other_second = tl.load(part + 1, mask=exists, other=0.0).to(tl.float64)
        first, second = merged(first, second, other_first, other_second, inverse_tau, HOW)
    return first, second


@triton.jit
def total_part(partials, row, exists, splits, PARTS: tl.constexpr, PART: tl.constexpr,
               ROWS: tl.constexpr):  # fmt: skip
    total = tl.zeros((ROWS,), tl.float64)
    for split in range(0, splits):
        at = partials + (row * splits + split) * PARTS + PART
        total += tl.load(at, mask=exists, other=0.0).to(tl.float64)
    return total


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
def store_terms(
    row_terms, row, exists, first, second, statistic, numbers,
    HOW: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """The two terms that normalize the entries of rows."""
    if HOW.softmax:
        # a row without pairs has neither peak nor sum
        nothing = second == 0
        first = tl.where(nothing, 0.0, first)
        second = tl.log(tl.where(nothing, 1.0, second))
    else:
        second = divisor_of(statistic, numbers)
        first = 1.0 / second
    first = first.to(HOW.number)
    out = row_terms + row * ROW_TERMS + 2 * TEACHER
    tl.store(out, first, mask=exists)
    tl.store(out + 1, second.to(HOW.number), mask=exists)
    # as rounded: c takes out what the sweep, which reads these, puts along the statistic
    return first.to(tl.float64)


@triton.jit
def store_correction(pairs, correction, matrix, queries, HOW: tl.constexpr, ROWS: tl.constexpr):
    """The same c for all rows of a matrix."""
    for start in range(0, queries, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = pairs.row_terms + (matrix * queries + rows) * ROW_TERMS + CORRECTION
        tl.store(at, (correction + rows * 0.0).to(HOW.number), mask=rows < queries)


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
def statistics_of_matrix(
    pairs, partials, matrix_terms, matrix, queries, keys, splits,
    HOW: tl.constexpr, ROWS: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """The statistic of a whole matrix and what its slope lacks."""
    lowest = 0.0
    if HOW.largest:
        lowest = float("-inf")
    first = tl.full((ROWS,), lowest, tl.float64)
    second = tl.zeros((ROWS,), tl.float64)
    for start in range(0, queries, ROWS):
        rows = start + tl.arange(0, ROWS)
        row = matrix * queries + rows
        other_first, other_second = row_state(
            partials, pairs.numbers, row, rows < queries, splits, HOW, ROWS, TEACHER
        )
        first, second = merged(first, second, other_first, other_second, 1.0, HOW)
    squares = 0.0
    if HOW.centered:
        at = matrix_terms + matrix * MATRIX_TERMS + STUDENT_SQUARES + TEACHER
        squares = tl.load(at).to(tl.float64)
    if HOW.centered_features:
        squares = tl.sum(first, 0) + squares_taken_out(
            pairs, matrix_terms, matrix, queries, keys, HOW, ROWS, TEACHER
        )
    return statistic_of_matrix(first, second, squares, HOW)


@triton.jit
def closed_correction(partials, row, exists, splits, m_s, m_t, ROWS: tl.constexpr):
    """2 sum_j (P - T) P of rows, from sums of the splits (sweeps.add_alignment)."""
    total = tl.zeros((ROWS,), tl.float64)
    for split in range(0, splits):
        part = partials + (row * splits + split) * STATISTIC_PARTS
        product = tl.load(part + 4, mask=exists, other=0.0).to(tl.float64)
        difference = tl.load(part + 6, mask=exists, other=0.0).to(tl.float64)
        ratio = tl.load(part + 7, mask=exists, other=0.0).to(tl.float64)
        total += m_s * difference - (m_t - ratio * m_s) * product
    return 2.0 * m_s * total


@triton.jit(do_not_specialize=["queries", "keys", "splits"])
def combine_statistics_kernel(
    pairs, partials, matrix_terms, queries, keys, splits, HOW: tl.constexpr, ROWS: tl.constexpr
):
    """Row terms from the parts of `statistics_kernel`, with c where it is closed."""
    matrix, first_block, last_block = rows_of_program(queries, HOW.whole, ROWS)
    numbers = pairs.numbers
    student_statistic = 0.0
    teacher_statistic = 0.0
    nothing = tl.zeros((ROWS,), tl.float64)
    correction_total = nothing
    if HOW.whole:
        student_statistic, slope_scale = statistics_of_matrix(
            pairs, partials, matrix_terms, matrix, queries, keys, splits, HOW, ROWS, 0
        )
        teacher_statistic, _ = statistics_of_matrix(
            pairs, partials, matrix_terms, matrix, queries, keys, splits, HOW, ROWS, 1
        )
        tl.store(matrix_terms + matrix * MATRIX_TERMS + SLOPE_SCALE, slope_scale)
    for block in range(first_block, last_block):
        rows = block * ROWS + tl.arange(0, ROWS)
        exists = rows < queries
        row = matrix * queries + rows
        s1, s2 = row_state(partials, numbers, row, exists, splits, HOW, ROWS, 0)
        t1, t2 = row_state(partials, numbers, row, exists, splits, HOW, ROWS, 1)
        student = s1
        teacher = t1
        if HOW.whole:
            student = nothing + student_statistic
            teacher = nothing + teacher_statistic
        elif HOW.l2:
            student = tl.sqrt(s1)
            teacher = tl.sqrt(t1)
        m_s = store_terms(pairs.row_terms, row, exists, s1, s2, student, numbers, HOW, 0)
        m_t = store_terms(pairs.row_terms, row, exists, t1, t2, teacher, numbers, HOW, 1)
        if HOW.counted:
            count = total_part(partials, row, exists, splits, STATISTIC_PARTS, 5, ROWS)
            at = pairs.row_terms + row * ROW_TERMS + PAIRS
            tl.store(at, count.to(HOW.number), mask=exists)
        weight = row_weights(pairs.row_weight, row, exists, HOW)
        correction = nothing
        if HOW.closed_correction:
            correction = weight * closed_correction(partials, row, exists, splits, m_s, m_t, ROWS)
        elif HOW.softmax:
            # sum_j s dl/ds = -sum_j t = -1, in the losses that this is stored for
            correction = tl.where(s2 > 0, -weight, 0.0)
        if HOW.whole:
            correction_total += correction
        else:
            at = pairs.row_terms + row * ROW_TERMS + CORRECTION
            tl.store(at, correction.to(HOW.number), mask=exists)
    if HOW.whole and HOW.closed_correction:
        store_correction(pairs, tl.sum(correction_total, 0), matrix, queries, HOW, ROWS)
