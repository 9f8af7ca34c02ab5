"""From the partial sums of a sweep to statistics, the constants of the backward, and the loss.

Small kernels that add up in float64, always in the same order. Of a statistic per matrix one
program takes a whole matrix, in blocks of rows; else each block of rows is a program.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from .layout import (
    CORRECTION,
    MATRIX_TERMS,
    PAIRS,
    ROW_TERMS,
    SLOPE_SCALE,
    STATISTIC_PARTS,
    STUDENT_INVERSE_TAU,
)
from .scalings import (
    lowest_of,
    merged,
    normalizing_terms,
    row_weights,
    statistic_of_row,
    statistic_of_states,
)


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
def row_state(partials, numbers, row, exists, splits, HOW: tl.constexpr, ROWS: tl.constexpr,
              TEACHER: tl.constexpr):  # fmt: skip
    """The state of rows, from those of the splits; float64."""
    lowest = lowest_of(HOW)
    inverse_tau = tl.load(numbers + STUDENT_INVERSE_TAU + TEACHER)
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
def store_terms(
    row_terms, row, exists, first, second, statistic, numbers,
    HOW: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    first, second = normalizing_terms(first, second, statistic, numbers, HOW)
    out = row_terms + row * ROW_TERMS + 2 * TEACHER
    tl.store(out, first, mask=exists)
    tl.store(out + 1, second, mask=exists)
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
def statistics_of_matrix(
    pairs, partials, matrix_terms, matrix, queries, keys, splits,
    HOW: tl.constexpr, ROWS: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """The statistic of a whole matrix and what its slope lacks."""
    first = tl.full((ROWS,), lowest_of(HOW), tl.float64)
    second = tl.zeros((ROWS,), tl.float64)
    for start in range(0, queries, ROWS):
        rows = start + tl.arange(0, ROWS)
        row = matrix * queries + rows
        other_first, other_second = row_state(
            partials, pairs.numbers, row, rows < queries, splits, HOW, ROWS, TEACHER
        )
        first, second = merged(first, second, other_first, other_second, 1.0, HOW)
    return statistic_of_states(
        pairs, matrix_terms, first, second, matrix, queries, keys, HOW, ROWS, TEACHER
    )


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
        if HOW.whole:
            student = nothing + student_statistic
            teacher = nothing + teacher_statistic
        else:
            student = statistic_of_row(s1, HOW)
            teacher = statistic_of_row(t1, HOW)
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
