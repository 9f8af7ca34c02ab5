"""The sweep that turns pairs into V = dA dphi (+ its transpose), and the means that center dA."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from . import stages
from .affinities import lengths, less_means, tile_affinities
from .layout import (
    AFFINITY_EPS,
    BETA,
    CLAMP_MIN,
    GRADIENT_COLUMN_MEAN,
    GRADIENT_MEAN,
    LOG_EPS,
    LOSS_PARTS,
    MEAN_PARTS,
    OFFSET,
    SIZES,
    STUDENT_INVERSE_TAU,
)
from .runs import Run, part_address, run_of, tile_of_run
from .sweeps import normalized_pair, terms_of, tile_losses
from .tiles import number, on_diagonal, pair_offsets, taking_part


@triton.jit
def normalized_slope(pairs, a, b, terms, HOW: tl.constexpr):
    """d loss / dP of the entries of rows with these terms (of a softmax, times P); and P."""
    difference, s, log_s, t, log_t = normalized_pair(pairs, a, b, terms, HOW)
    beta = number(pairs, BETA, HOW)
    eps = number(pairs, LOG_EPS, HOW)
    slope = stages.loss_slope(difference, s, log_s, t, log_t, beta, eps, HOW)
    if HOW.row_weight:
        slope = slope * terms.weight
    return slope, s


@triton.jit
def slope_of_statistic(a, s, tile, terms, HOW: tl.constexpr):
    """d statistic / dA, but for what is the same in a whole row."""
    slope = stages.statistic_slope(a, s, terms.student_first, terms.student_second, HOW)
    if HOW.normalization == "mean_offdiag" and HOW.has_diagonal:
        slope = tl.where(on_diagonal(tile), 0.0, slope)
    return slope


@triton.jit
def through_statistic(pairs, slope, terms, HOW: tl.constexpr):
    """From P to A."""
    if HOW.softmax:
        return slope * number(pairs, STUDENT_INVERSE_TAU, HOW)
    elif HOW.normalization != "none":
        return slope * terms.student_first
    else:
        return slope


@triton.jit
def corrected_slope(pairs, a, b, tile, terms, HOW: tl.constexpr):
    """d loss / dA of the entries of rows with these terms, c among them."""
    slope, s = normalized_slope(pairs, a, b, terms, HOW)
    if HOW.has_correction:
        slope = slope - terms.correction * slope_of_statistic(a, s, tile, terms, HOW)
    return through_statistic(pairs, slope, terms, HOW)


@triton.jit
def slope_in_rows(pairs, a, b, tile, HOW: tl.constexpr, AXIS: tl.constexpr):
    """d loss / dA of the pairs (i, j) as entries of row i, or of (j, i) as entries of row j."""
    slope = corrected_slope(pairs, a, b, tile, terms_of(pairs, tile, HOW, AXIS), HOW)
    return tl.where(taking_part(pairs, tile, HOW, AXIS == 1), slope, 0.0)


@triton.jit
def affinity_gradient(pairs, a, b, tile, HOW: tl.constexpr):
    """d loss / dA_ij of a tile; of a self-affinity, of A_ij and A_ji together."""
    gradient = slope_in_rows(pairs, a, b, tile, HOW, 0)
    if HOW.self_affinity:
        if HOW.alike:
            gradient = gradient + gradient
        else:
            gradient += slope_in_rows(pairs, a, b, tile, HOW, 1)
    return gradient


@triton.jit
def through_pair_function(pairs, gradient, value, tile, HOW: tl.constexpr):
    """d loss / dA becomes d loss / dg, of directions where there are some, or d loss / dsq.

    A constant factor of a function linear in g is left to the end.
    """
    scale = tl.load(pairs.student.scale).to(HOW.number)
    eps = number(pairs, AFFINITY_EPS, HOW)
    slope = gradient * stages.affinity_slope(value, scale, eps, HOW)
    if HOW.clamped:
        affinity = stages.affinity_of(value, scale, number(pairs, OFFSET, HOW), HOW)
        slope = tl.where(affinity < number(pairs, CLAMP_MIN, HOW), 0.0, slope)
    if HOW.flat_diagonal:
        slope = tl.where(on_diagonal(tile), 0.0, slope)
    return slope


@triton.jit
def zero_where_nothing_flows(slope, gradient, HOW: tl.constexpr):
    """An item that takes part in nothing may hold NaN."""
    if HOW.counted:
        return tl.where(gradient == 0, 0.0, slope)
    else:
        return slope


@triton.jit(do_not_specialize=SIZES)
def gradient_means_kernel(
    pairs, partials, queries, keys, offset, tiles,
    HOW: tl.constexpr, SHAPE: tl.constexpr, HELD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Partial sums of d loss / dA along the rows, or (`COLUMNS`) along the columns."""
    block: tl.constexpr = SHAPE.columns if COLUMNS else SHAPE.rows
    axis: tl.constexpr = 0 if COLUMNS else 1
    run = run_of(queries, keys, tiles, SHAPE, COLUMNS)
    total = tl.zeros((block,), HOW.number)
    for step in tl.range(run.first, run.first + tiles, num_stages=1):
        tile = tile_of_run(pairs, run, step, queries, keys, offset, HOW, SHAPE, COLUMNS)
        a, b, _ = tile_affinities(pairs, tile, HOW, SHAPE, HELD, True)
        total += tl.sum(affinity_gradient(pairs, a, b, tile, HOW), axis)
    items = run.item + tl.arange(0, block)
    count = keys if COLUMNS else queries
    out = part_address(partials, run, items, count, MEAN_PARTS)
    tl.store(out, total, mask=items < count)


@triton.jit
def store_slopes(
    pairs, slopes, tile,
    HOW: tl.constexpr, SHAPE: tl.constexpr, HELD: tl.constexpr, LOSSES: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """V of a tile, to `slopes`, and sums along its rows: losses, pairs, dA * g."""
    a, b, value = tile_affinities(pairs, tile, HOW, SHAPE, HELD, HOW.centered)
    loss = 0.0
    count = 0.0
    scale = 0.0
    if LOSSES:
        part = taking_part(pairs, tile, HOW, False)
        terms = terms_of(pairs, tile, HOW, 0)
        loss, _ = tile_losses(pairs, a, b, part, terms, HOW, False)
        if HOW.counted:
            count = tl.sum(tl.where(part, 1.0, 0.0), 1)
    gradient = affinity_gradient(pairs, a, b, tile, HOW)
    if HOW.centered_gradient:
        inside = tile.row_valid[:, None] & tile.column_valid[None, :]
        gradient = less_means(pairs, gradient, tile, GRADIENT_MEAN, GRADIENT_COLUMN_MEAN)
        gradient = tl.where(inside, gradient, 0.0)
    v = through_pair_function(pairs, gradient, value, tile, HOW)
    if HOW.unit:
        # 1 / |x_i| |x_j|, from directions to features
        row_lengths, column_lengths = lengths(pairs, tile, 0)
        v = v * row_lengths[:, None] * column_lengths[None, :]
    v = zero_where_nothing_flows(v, gradient, HOW)
    if SCALE:
        scale = tl.sum(v * value, 1)
    exists = tile.row_exists[:, None] & (tile.columns < tile.keys)[None, :]
    tl.store(slopes + tile.column + pair_offsets(tile), v, mask=exists)
    return loss, count, scale


@triton.jit(do_not_specialize=SIZES)
def gradients_kernel(
    pairs, slopes, partials, queries, keys, offset, tiles, first_matrix, row_start, row_count,
    HOW: tl.constexpr, SHAPE: tl.constexpr, HELD: tl.constexpr, LOSSES: tl.constexpr,
    SCALE: tl.constexpr, LOOPED: tl.constexpr,
):  # fmt: skip
    """V [matrices, row_count, K] of some rows of some matrices, from `row_start` on.

    With `LOSSES` also the partial sums of `losses_kernel`, with `SCALE` those of dA * g: of a
    self-affinity twice, as V holds dA_ij and dA_ji. Without them, and with one tile a program,
    there need be no loop over tiles (`LOOPED`), which takes registers.
    """
    block: tl.constexpr = SHAPE.rows
    panel = run_of(row_count, keys, tiles, SHAPE)
    slopes += (panel.matrix * row_count + panel.item) * keys
    run = Run(
        first_matrix + panel.matrix, row_start + panel.item, panel.first, panel.split,
        panel.splits, row_start + row_count,
    )  # fmt: skip
    if LOOPED:
        loss = tl.zeros((block,), HOW.number)
        count = tl.zeros((block,), HOW.number)
        scale = tl.zeros((block,), HOW.number)
        for step in tl.range(run.first, run.first + tiles, num_stages=1):
            tile = tile_of_run(pairs, run, step, queries, keys, offset, HOW, SHAPE)
            sums = store_slopes(pairs, slopes, tile, HOW, SHAPE, HELD, LOSSES, SCALE)
            loss += sums[0]
            count += sums[1]
            scale += sums[2]
        rows = run.item + tl.arange(0, block)
        out = part_address(partials, run, rows, queries, LOSS_PARTS)
        if LOSSES:
            tl.store(out, loss, mask=rows < run.end)
            tl.store(out + 2, count, mask=rows < run.end)
        if SCALE:
            tl.store(out + 3, scale, mask=rows < run.end)
    else:
        tile = tile_of_run(pairs, run, run.first, queries, keys, offset, HOW, SHAPE)
        store_slopes(pairs, slopes, tile, HOW, SHAPE, HELD, LOSSES, SCALE)
