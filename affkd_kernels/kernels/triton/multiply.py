"""The last kernel of held pairs: W with the features, and the loss on the way.

With V = W + W' of a self-affinity, or W, the gradient of an item is
  of a Gram matrix: sum_j V_ij x_j;
  of a distance: 2 (sum_j V_ij x_i - sum_j V_ij x_j), in which any point may be the origin;
  of directions: 1/|x_i| (sum_j V_ij u_j - sum_j V_ij cos_ij u_i), V that of the cosine.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import stages
from .finish import divisor
from .layout import (
    ITEM_TERMS,
    LENGTH,
    STASH_CORRECTION,
    STASH_LOSS,
    STASH_PAIRS,
    STASH_ROWS,
    STASH_SCALE,
    WEIGHT,
)
from .product import slope_times_features
from .tiles import program_of, valid_items


@triton.jit
def sum_of_parts(partials, programs, first, count, PART: tl.constexpr, LANES: tl.constexpr):
    """Over some of the programs of `rows_kernel`, always in the same order."""
    total = tl.zeros((LANES,), tl.float64)
    for start in range(0, count, LANES):
        at = start + tl.arange(0, LANES)
        term = partials + PART * programs + first + at
        total += tl.load(term, mask=at < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def gradient_scale(
    pairs, partials, matrices, queries, keys, programs,
    HOW: tl.constexpr, REDUCTION: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """weight and count, whose quotient every gradient is multiplied by."""
    rows_with = tl.full((), 0.0, tl.float64)
    pairs_with = rows_with
    if HOW.counted and REDUCTION == "batchmean":
        rows_with = sum_of_parts(partials, programs, 0, programs, STASH_ROWS, LANES)
    if HOW.counted and REDUCTION == "mean":
        pairs_with = sum_of_parts(partials, programs, 0, programs, STASH_PAIRS, LANES)
    count = divisor(matrices * queries, keys, matrices, rows_with, pairs_with, HOW, REDUCTION)
    return tl.load(pairs.numbers + WEIGHT), count


@triton.jit
def finish_call(
    pairs, partials, loss, scale_gradient, matrices, queries, keys, programs,
    HOW: tl.constexpr, REDUCTION: tl.constexpr, SCALE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The loss and (`SCALE`) its gradient by the student's scale, by the first program."""
    if tl.program_id(0) == 0:
        weight, count = gradient_scale(
            pairs, partials, matrices, queries, keys, programs, HOW, REDUCTION, LANES
        )
        total = sum_of_parts(partials, programs, 0, programs, STASH_LOSS, LANES)
        tl.store(loss, (total / count).to(HOW.number))
        if SCALE:
            gradient = tl.full((), 0.0, tl.float64)
            of_matrix = programs // matrices
            for matrix in range(0, matrices):
                first = matrix * of_matrix
                gradient += sum_of_parts(partials, programs, first, of_matrix, STASH_SCALE, LANES)
                if HOW.matrix_correction:
                    c = sum_of_parts(partials, programs, first, of_matrix, STASH_CORRECTION, LANES)
                    other = sum_of_parts(
                        partials, programs, first, of_matrix, STASH_SCALE + 1, LANES
                    )
                    gradient -= c * other
            tl.store(scale_gradient, (gradient * weight / count).to(HOW.number))


@triton.jit(do_not_specialize=["matrices", "queries", "keys", "programs"])
def finish_stash_kernel(
    pairs, partials, loss, scale_gradient, matrices, queries, keys, programs,
    HOW: tl.constexpr, REDUCTION: tl.constexpr, SCALE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """For a call that has no product, whose first program would do it."""
    finish_call(
        pairs, partials, loss, scale_gradient, matrices, queries, keys, programs,
        HOW, REDUCTION, SCALE, LANES,
    )  # fmt: skip


@triton.jit
def held_tile(held, outer, inner, keys, inside, HOW: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[outer, inner] of a matrix [Q, K] whose rows are the outer items, or the inner ones."""
    if TRANSPOSED:
        at = inner.to(tl.int64)[None, :] * keys + outer[:, None]
    else:
        at = outer.to(tl.int64)[:, None] * keys + inner[None, :]
    return tl.load(held + at, mask=inside, other=0.0)


@triton.jit
def slope_tile(held, outer, inner, keys, inside, HOW: tl.constexpr, TRANSPOSED: tl.constexpr):
    """W + W' of a self-affinity, of which one half is enough where the two are the same."""
    w = held_tile(held, outer, inner, keys, inside, HOW, TRANSPOSED)
    if HOW.self_affinity and not HOW.alike:
        w += held_tile(held, outer, inner, keys, inside, HOW, True)
    return w


class Items(NamedTuple):
    """Inside a kernel: queries or keys of a matrix."""

    features: Any
    stride: Any
    mask: Any
    terms: Any
    count: Any


@triton.jit
def load_items(items, at, valid, features, inside, HOW: tl.constexpr, WIDE: tl.constexpr):
    """Features [items, features]; of an item that takes part in nothing, only what is finite."""
    x = items.features + at.to(tl.int64)[:, None] * items.stride + features[None, :]
    x = tl.load(x, mask=valid[:, None] & inside[None, :], other=0.0)
    if HOW.counted:
        x = stages.zero_unless_finite(x.to(HOW.number)).to(x.dtype)
    if WIDE:
        return x.to(HOW.number)
    else:
        return x


@triton.jit
def items_of(pairs, matrix, queries, keys, KEYS: tl.constexpr):
    """The student's keys of a matrix, or its queries."""
    side = pairs.student
    if KEYS:
        x = side.keys + matrix * side.key_matrix
        return Items(x, side.key_stride, pairs.key_mask, pairs.key_terms, keys)
    else:
        x = side.queries + matrix * side.query_matrix
        return Items(x, side.query_stride, pairs.query_mask, pairs.query_terms, queries)


@triton.jit
def inverse_lengths(items, matrix, at, valid):
    at = items.terms + (matrix * items.count + at) * ITEM_TERMS + LENGTH
    return tl.load(at, mask=valid, other=0.0)


@triton.jit
def multiply(
    pairs, first, second, correction, inner_items, matrix, outer, exists, features, inside, origin,
    queries, keys,
    HOW: tl.constexpr, SHAPE: tl.constexpr, TRANSPOSED: tl.constexpr, MOVED: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """sum_j V_ij x_j (of directions: u_j), and sum_j V_ij (of directions: V_ij cos_ij)."""
    rows_block: tl.constexpr = SHAPE.rows
    block: tl.constexpr = SHAPE.columns
    inner_block: tl.constexpr = SHAPE.inner
    masked: tl.constexpr = HOW.query_mask if TRANSPOSED else HOW.key_mask
    first += matrix * queries * keys
    second += matrix * queries * keys
    held = pairs.student_held + matrix * queries * keys
    count = inner_items.count
    acc = tl.zeros((rows_block, block), HOW.number)
    sums = tl.zeros((rows_block,), HOW.number)
    for start in range(0, count, inner_block):
        inner = start + tl.arange(0, inner_block)
        here = exists[:, None] & (inner < count)[None, :]
        v = slope_tile(first, outer, inner, keys, here, HOW, TRANSPOSED)
        if HOW.matrix_correction:
            v -= correction * slope_tile(second, outer, inner, keys, here, HOW, TRANSPOSED)
        valid = valid_items(inner_items.mask, matrix, inner, count, masked)
        x = load_items(inner_items, inner, valid, features, inside, HOW, MOVED)
        if HOW.unit:
            cosine = stages.cosine_of(
                held_tile(held, outer, inner, keys, here, HOW, TRANSPOSED), HOW
            )
            if HOW.counted:
                cosine = tl.where(v == 0, 0.0, cosine)
            inverse = inverse_lengths(inner_items, matrix, inner, valid)[None, :]
            if HOW.distance:
                # an item without a direction is at distance 1 from all that have one
                cosine = tl.where(inverse == 0, 0.0, cosine)
            sums += tl.sum(v * cosine, 1)
            v = v * inverse
        elif HOW.distance:
            sums += tl.sum(v, 1)
        if MOVED:
            x = tl.where(valid[:, None], x - origin[None, :], 0.0)
        acc = slope_times_features(v, x, acc, SHAPE, SPLIT, HOW)
    return acc, sums


@triton.jit(do_not_specialize=["matrices", "queries", "keys", "of_matrix"])
def multiply_kernel(
    pairs, first, second, partials, out, loss, scale_gradient, matrices, queries, keys, of_matrix,
    HOW: tl.constexpr, SHAPE: tl.constexpr, TRANSPOSED: tl.constexpr, MOVED: tl.constexpr,
    SPLIT: tl.constexpr, REDUCTION: tl.constexpr, FINISHES: tl.constexpr, SCALE: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The gradient [N, Q, D] of the student's queries, or (`TRANSPOSED`) that of its keys.

    `MOVED`: features less the mean of the program's own items; `FINISHES`: the first program also
    does what `finish_call` does. Programs of `rows_kernel` are `of_matrix` a matrix.
    """
    dim = pairs.student.dim
    masked: tl.constexpr = HOW.key_mask if TRANSPOSED else HOW.query_mask
    count = keys if TRANSPOSED else queries
    program, chunk = program_of(tl.cdiv(dim, SHAPE.columns))
    blocks = tl.cdiv(count, SHAPE.rows)
    matrix = (program // blocks).to(tl.int64)
    outer = program % blocks * SHAPE.rows + tl.arange(0, SHAPE.rows)
    features = chunk * SHAPE.columns + tl.arange(0, SHAPE.columns)
    exists = outer < count
    inside = features < dim
    items = items_of(pairs, matrix, queries, keys, TRANSPOSED)
    valid = exists & valid_items(items.mask, matrix, outer, count, masked)
    own = load_items(items, outer, valid, features, inside, HOW, True)
    origin = tl.zeros_like(features).to(HOW.number)
    if MOVED:
        valid_count = tl.sum(valid.to(HOW.number), 0)
        origin = tl.sum(own, 0) / tl.where(valid_count > 0, valid_count, 1.0)
    programs = of_matrix * matrices
    correction = tl.full((), 0.0, HOW.number)
    if HOW.matrix_correction:
        c = sum_of_parts(partials, programs, matrix * of_matrix, of_matrix, STASH_CORRECTION, LANES)
        correction = c.to(HOW.number)
    acc, sums = multiply(
        pairs, first, second, correction, items_of(pairs, matrix, queries, keys, not TRANSPOSED),
        matrix, outer, exists, features, inside, origin, queries, keys,
        HOW, SHAPE, TRANSPOSED, MOVED, SPLIT,
    )  # fmt: skip
    if HOW.unit:
        inverse = inverse_lengths(items, matrix, outer, valid)[:, None]
        acc = inverse * (acc - sums[:, None] * (inverse * own))
        # of a single feature the direction is a constant
        acc = tl.where(dim > 1, acc, 0.0)
    elif HOW.distance:
        acc -= sums[:, None] * (own - origin[None, :])
    weight, divided_by = gradient_scale(
        pairs, partials, matrices, queries, keys, programs, HOW, REDUCTION, LANES
    )
    factor = (weight / divided_by).to(HOW.number)
    if HOW.distance:
        factor = -2.0 * factor
    if HOW.self_affinity and HOW.alike:
        factor = 2.0 * factor
    if HOW.pair == "linear":
        factor = factor * tl.load(pairs.student.scale).to(HOW.number)
    to = out + (matrix * count + outer)[:, None] * dim + features[None, :]
    acc = tl.where(valid[:, None], acc * factor, 0.0)
    tl.store(to, acc, mask=exists[:, None] & inside[None, :])
    if FINISHES:
        finish_call(
            pairs, partials, loss, scale_gradient, matrices, queries, keys, programs,
            HOW, REDUCTION, SCALE, LANES,
        )  # fmt: skip
