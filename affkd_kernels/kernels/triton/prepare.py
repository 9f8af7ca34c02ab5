"""Stage 1: means, lengths and norms of the items, and the way back through it."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from . import stages
from .layout import (
    ITEM_TERMS,
    LENGTH,
    MATRIX_TERMS,
    POISON,
    STUDENT_GRAND,
    TEACHER_ITEM,
)
from .tiles import program_of, valid_items


@triton.jit
def sum_side(
    x, mask, sums, matrix, part, chunk, parts, count, dim, row_stride, matrix_stride,
    HOW: tl.constexpr, MASKED: tl.constexpr, ITEMS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    features = chunk * FEATURES + tl.arange(0, FEATURES)
    inside = features < dim
    total = tl.zeros((FEATURES,), tl.float64)
    valid_count = 0.0
    blocks = tl.cdiv(tl.cdiv(count, ITEMS), parts)
    for block in range(part * blocks, part * blocks + blocks):
        items = block * ITEMS + tl.arange(0, ITEMS)
        valid = valid_items(mask, matrix, items, count, MASKED)
        at = x + matrix * matrix_stride + items.to(tl.int64)[:, None] * row_stride
        values = tl.load(at + features[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        total += tl.sum(values.to(tl.float64), 0)
        valid_count += tl.sum(valid.to(tl.float32), 0)
    out = sums + (matrix * parts + part) * (dim + 1)
    tl.store(out + features, total, mask=inside)
    if chunk == 0:
        tl.store(out + dim, valid_count)


@triton.jit(do_not_specialize=["parts", "chunks", "count"])
def sum_kernel(
    student, teacher, mask, student_sums, teacher_sums, strides, parts, chunks, count,
    HOW: tl.constexpr, MASKED: tl.constexpr, ITEMS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Sums [N, parts, D + 1] of the valid items, the last entry their number; float64."""
    program, chunk = program_of(chunks)
    matrix = (program // parts).to(tl.int64)
    part = program % parts
    if tl.program_id(1) == 0:
        sum_side(
            student, mask, student_sums, matrix, part, chunk, parts, count, strides.student_dim,
            strides.student_row, strides.student_matrix, HOW, MASKED, ITEMS, FEATURES,
        )  # fmt: skip
    else:
        sum_side(
            teacher, mask, teacher_sums, matrix, part, chunk, parts, count, strides.teacher_dim,
            strides.teacher_row, strides.teacher_matrix, HOW, MASKED, ITEMS, FEATURES,
        )  # fmt: skip


@triton.jit
def mean_of(sums, matrix, parts, features, dim, FEATURES: tl.constexpr):
    """In float64."""
    total = tl.zeros((FEATURES,), tl.float64)
    count = tl.full((), 0.0, tl.float64)
    for part in range(0, parts):
        row = sums + (matrix * parts + part) * (dim + 1)
        total += tl.load(row + features, mask=features < dim, other=0.0)
        count += tl.load(row + dim)
    return total / tl.where(count > 0, count, 1.0)


@triton.jit
def inverse_length(squares, eps):
    """1 / |x|, and 0 where x counts as nothing."""
    length = tl.sqrt(squares)
    tiny = length <= eps
    # a norm that overflowed would give a plausible 0
    inverse = 1.0 / tl.where(tiny, 1.0, length) + (length - length)
    return tl.where(tiny, 0.0, inverse)


@triton.jit
def prepare_side(
    x, mask, copy, sums, other_sums, terms, matrix_terms, eps, matrix, items, parts,
    other_parts, count, dim, row_stride, matrix_stride,
    HOW: tl.constexpr, MASKED: tl.constexpr, ITEMS: tl.constexpr, FEATURES: tl.constexpr,
    TEACHER: tl.constexpr,
):  # fmt: skip
    valid = valid_items(mask, matrix, items, count, MASKED)
    item = matrix * count + items
    rows = x + matrix * matrix_stride + items.to(tl.int64)[:, None] * row_stride
    squares = tl.zeros((ITEMS,), HOW.number)
    along_mean = tl.zeros((ITEMS,), HOW.number)
    poison = tl.zeros((ITEMS,), HOW.number)
    grand = tl.full((), 0.0, HOW.number)
    for start in range(0, dim, FEATURES):
        features = start + tl.arange(0, FEATURES)
        inside = valid[:, None] & (features < dim)[None, :]
        values = tl.load(rows + features[None, :], mask=inside, other=0.0).to(HOW.number)
        poison += tl.sum(values * 0.0, 1)
        if HOW.copied:
            exact_mean = mean_of(sums, matrix, parts, features, dim, FEATURES)
            mean = exact_mean.to(HOW.number)
            # what the rounding of the mean leaves would be common to all items
            rest = (exact_mean - mean).to(HOW.number)
            values = tl.where(inside, values - mean[None, :] - rest[None, :], 0.0)
            to = copy + item[:, None] * dim + features[None, :]
            tl.store(to, values, mask=(items < count)[:, None] & (features < dim)[None, :])
            if HOW.centered_features:
                other = mean_of(other_sums, matrix, other_parts, features, dim, FEATURES)
                other = other.to(HOW.number)
                along_mean += tl.sum(values * other[None, :], 1)
                grand += tl.sum(mean * other, 0)
        squares += tl.sum(values * values, 1)
    if HOW.unit:
        length = inverse_length(squares, eps)
    elif HOW.centered_features:
        length = along_mean
    else:
        length = squares
    out = terms + item * ITEM_TERMS + TEACHER * TEACHER_ITEM
    tl.store(out + LENGTH, length, mask=items < count)
    tl.store(out + POISON, poison, mask=items < count)
    if HOW.centered_features:
        # every program of the matrix stores the same
        tl.store(matrix_terms + matrix * MATRIX_TERMS + STUDENT_GRAND + TEACHER, grand)


@triton.jit
def store_numbers(out, numbers):
    """By the first program of a launch."""
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        for position in tl.static_range(len(numbers)):
            tl.store(out + position, tl.full((), numbers[position], tl.float64))


@triton.jit(do_not_specialize=["parts", "other_parts", "count"])
def prepare_kernel(
    student, teacher, mask, copies, sums, other_sums, terms, matrix_terms, numbers, strides,
    parts, other_parts, count,
    student_scale: tl.float64, teacher_scale: tl.float64, offset: tl.float64,
    affinity_eps: tl.float64, clamp_min: tl.float64, statistic_eps: tl.float64,
    student_inverse_tau: tl.float64, teacher_inverse_tau: tl.float64,
    beta: tl.float64, log_eps: tl.float64, weight: tl.float64,
    HOW: tl.constexpr, MASKED: tl.constexpr, ITEMS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The terms [N * items, ITEM_TERMS] of queries or keys and, where wanted, centered copies.

    It also puts the numbers of the call where all other kernels find them. They are arguments, and
    no tensor that outlives the call, so that a captured graph holds all that it needs.
    """
    eps = tl.full((), affinity_eps, tl.float64).to(HOW.number)
    store_numbers(
        numbers,
        (student_scale, teacher_scale, offset, affinity_eps, clamp_min, statistic_eps,
         student_inverse_tau, teacher_inverse_tau, beta, log_eps, weight),
    )  # fmt: skip
    blocks = tl.cdiv(count, ITEMS)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    items = tl.program_id(0) % blocks * ITEMS + tl.arange(0, ITEMS)
    if tl.program_id(1) == 0:
        prepare_side(
            student, mask, copies[0], sums[0], other_sums[0], terms, matrix_terms,
            eps, matrix, items, parts, other_parts, count, strides.student_dim,
            strides.student_row, strides.student_matrix, HOW, MASKED, ITEMS, FEATURES, 0,
        )  # fmt: skip
    else:
        prepare_side(
            teacher, mask, copies[1], sums[1], other_sums[1], terms, matrix_terms,
            eps, matrix, items, parts, other_parts, count, strides.teacher_dim,
            strides.teacher_row, strides.teacher_matrix, HOW, MASKED, ITEMS, FEATURES, 1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["parts", "count"])
def center_kernel(
    gradient, mask, sums, parts, count, dim,
    HOW: tl.constexpr, MASKED: tl.constexpr, ITEMS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Back through x - mean(x), in place: what comes loses its own mean, of which `sums` are."""
    blocks = tl.cdiv(count, ITEMS)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    items = tl.program_id(0) % blocks * ITEMS + tl.arange(0, ITEMS)
    valid = valid_items(mask, matrix, items, count, MASKED)
    rows = gradient + (matrix * count + items)[:, None] * dim
    for start in range(0, dim, FEATURES):
        features = start + tl.arange(0, FEATURES)
        inside = valid[:, None] & (features < dim)[None, :]
        mean = mean_of(sums, matrix, parts, features, dim, FEATURES).to(HOW.number)
        at = rows + features[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) - mean[None, :], mask=inside)


@triton.jit(do_not_specialize=["count"])
def unit_length_kernel(
    x, mask, terms, gradient, count, dim, row_stride, matrix_stride,
    HOW: tl.constexpr, MASKED: tl.constexpr, ITEMS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Back through u = x / |x|, in place: what comes is du / |x|, and loses its part along u."""
    blocks = tl.cdiv(count, ITEMS)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    items = tl.program_id(0) % blocks * ITEMS + tl.arange(0, ITEMS)
    valid = valid_items(mask, matrix, items, count, MASKED)
    item = matrix * count + items
    rows = x + matrix * matrix_stride + items.to(tl.int64)[:, None] * row_stride
    inverse = tl.load(terms + item * ITEM_TERMS + LENGTH, mask=valid, other=0.0)
    along = tl.zeros((ITEMS,), HOW.number)
    for start in range(0, dim, FEATURES):
        features = start + tl.arange(0, FEATURES)
        inside = valid[:, None] & (features < dim)[None, :]
        u = tl.load(rows + features[None, :], mask=inside, other=0.0).to(HOW.number)
        u = stages.of_directions(u * inverse[:, None], dim)
        if HOW.counted:
            u = stages.zero_unless_finite(u)
        at = gradient + item[:, None] * dim + features[None, :]
        along += tl.sum(u * tl.load(at, mask=inside, other=0.0), 1)
    for start in range(0, dim, FEATURES):
        features = start + tl.arange(0, FEATURES)
        inside = valid[:, None] & (features < dim)[None, :]
        u = tl.load(rows + features[None, :], mask=inside, other=0.0).to(HOW.number)
        u = stages.of_directions(u * inverse[:, None], dim)
        if HOW.counted:
            u = stages.zero_unless_finite(u)
        at = gradient + item[:, None] * dim + features[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) - along[:, None] * u, mask=inside)
