"""Whole rows of held pairs: their statistics, losses and slopes in one kernel.

A program goes over its rows up to three times: for what normalizes them, for the losses with what
flows back through the statistic, and for W, the slope in pairs of one row, from which V = W + W'.
Where one statistic is that of a whole matrix, c is the sum of what all programs find, which only
the next kernel knows: V = W1 - c W2.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from .affinities import tile_affinities
from .finish import poison_of
from .gradients import (
    corrected_slope,
    normalized_slope,
    slope_of_statistic,
    through_pair_function,
    through_statistic,
    zero_where_nothing_flows,
)
from .layout import (
    SIZES,
    STASH_CORRECTION,
    STASH_LOSS,
    STASH_PAIRS,
    STASH_ROWS,
    STASH_SCALE,
    STUDENT_INVERSE_TAU,
    TEACHER_INVERSE_TAU,
    WEIGHT,
    Terms,
)
from .runs import run_of, tile_of_run
from .scalings import (
    lowest_of,
    merged,
    normalizing_terms,
    row_weights,
    statistic_of_row,
    statistic_of_states,
)
from .sweeps import add_statistic, tile_losses
from .tiles import first_pair, number, pair_offsets, taking_part


@triton.jit
def statistic_of_tiles(
    pairs, states, matrix_terms, matrix, queries, keys, count,
    HOW: tl.constexpr, LANES: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """The statistic of a matrix from the states of its tiles, and what its slope lacks."""
    first = tl.full((LANES,), lowest_of(HOW), tl.float64)
    second = tl.zeros((LANES,), tl.float64)
    states += (matrix * 2 + TEACHER) * count * 2
    for start in range(0, count, LANES):
        tiles = start + tl.arange(0, LANES)
        at = states + 2 * tiles
        other_first = tl.load(at, mask=tiles < count, other=lowest_of(HOW)).to(tl.float64)
        other_second = tl.load(at + 1, mask=tiles < count, other=0.0).to(tl.float64)
        first, second = merged(first, second, other_first, other_second, 1.0, HOW)
    return statistic_of_states(
        pairs, matrix_terms, first, second, matrix, queries, keys, HOW, LANES, TEACHER
    )


@triton.jit
def states_of_rows(
    pairs, run, tiles, queries, keys, offset, HOW: tl.constexpr, SHAPE: tl.constexpr
):  # fmt: skip
    """The states of both sides of the rows of a run."""
    block: tl.constexpr = SHAPE.rows
    student_first = tl.full((block,), lowest_of(HOW), HOW.number)
    teacher_first = tl.full((block,), lowest_of(HOW), HOW.number)
    student_second = tl.zeros((block,), HOW.number)
    teacher_second = tl.zeros((block,), HOW.number)
    student_inverse_tau = number(pairs, STUDENT_INVERSE_TAU, HOW)
    teacher_inverse_tau = number(pairs, TEACHER_INVERSE_TAU, HOW)
    for step in tl.range(0, tiles, num_stages=1):
        tile = tile_of_run(pairs, run, step, queries, keys, offset, HOW, SHAPE)
        a, b, _ = tile_affinities(pairs, tile, HOW, SHAPE, True, False)
        part = taking_part(pairs, tile, HOW, False)
        student_first, student_second = add_statistic(
            student_first, student_second, a, part, student_inverse_tau, HOW
        )
        teacher_first, teacher_second = add_statistic(
            teacher_first, teacher_second, b, part, teacher_inverse_tau, HOW
        )
    return student_first, student_second, teacher_first, teacher_second


@triton.jit
def normalizing_state(first, second, pairs, HOW: tl.constexpr):
    """The terms of rows from their states."""
    first = first.to(tl.float64)
    statistic = statistic_of_row(first, HOW)
    return normalizing_terms(first, second.to(tl.float64), statistic, pairs.numbers, HOW)


@triton.jit
def terms_of_rows(
    pairs, states, matrix_terms, run, weight, tiles, count, queries, keys, offset,
    HOW: tl.constexpr, SHAPE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What normalizes the rows of a run, with the c of a softmax; and the scale of slopes."""
    zero = weight * 0.0
    slope_scale = tl.full((), 1.0, tl.float64)
    student_first = zero.to(HOW.number)
    student_second = student_first
    teacher_first = student_first
    teacher_second = student_first
    correction = student_first
    if HOW.whole:
        student, scale = statistic_of_tiles(
            pairs, states, matrix_terms, run.matrix, queries, keys, count, HOW, LANES, 0
        )
        teacher, _ = statistic_of_tiles(
            pairs, states, matrix_terms, run.matrix, queries, keys, count, HOW, LANES, 1
        )
        slope_scale *= scale
        student_first, student_second = normalizing_terms(
            zero, zero, zero + student, pairs.numbers, HOW
        )
        teacher_first, teacher_second = normalizing_terms(
            zero, zero, zero + teacher, pairs.numbers, HOW
        )
    elif HOW.normalization != "none":
        s1, s2, t1, t2 = states_of_rows(pairs, run, tiles, queries, keys, offset, HOW, SHAPE)
        student_first, student_second = normalizing_state(s1, s2, pairs, HOW)
        teacher_first, teacher_second = normalizing_state(t1, t2, pairs, HOW)
        if HOW.softmax:
            # sum_j s dl/ds = -sum_j t = -1, in the losses that keep this
            correction = tl.where(s2 > 0, -weight, 0.0).to(HOW.number)
    terms = Terms(
        student_first[:, None], student_second[:, None], teacher_first[:, None],
        teacher_second[:, None], weight.to(HOW.number)[:, None], correction[:, None],
    )  # fmt: skip
    return terms, slope_scale


@triton.jit
def store_pair_slopes(
    pairs, first, second, a, b, value, part, tile, terms, slope_scale, HOW: tl.constexpr
):
    """W of a tile, or W1 and W2; returns the sums of W g along the rows."""
    at = first_pair(tile) + pair_offsets(tile)
    exists = tile.row_exists[:, None] & (tile.columns < tile.keys)[None, :]
    if HOW.matrix_correction:
        slope, s = normalized_slope(pairs, a, b, terms, HOW)
        slope = through_statistic(pairs, slope, terms, HOW)
        other = slope_of_statistic(a, s, tile, terms, HOW) * slope_scale.to(HOW.number)
        other = tl.where(part, through_statistic(pairs, other, terms, HOW), 0.0)
        w2 = through_pair_function(pairs, other, value, tile, HOW)
        w2 = zero_where_nothing_flows(w2, other, HOW)
        tl.store(second + at, w2, mask=exists)
        second_scale = tl.sum(w2 * value, 1)
    else:
        slope = corrected_slope(pairs, a, b, tile, terms, HOW)
        second_scale = tl.sum(slope * 0.0, 1)
    slope = tl.where(part, slope, 0.0)
    w = through_pair_function(pairs, slope, value, tile, HOW)
    w = zero_where_nothing_flows(w, slope, HOW)
    tl.store(first + at, w, mask=exists)
    return tl.sum(w * value, 1), second_scale


@triton.jit
def sweep_of_rows(
    pairs, first, second, run, tiles, terms, slope_scale, queries, keys, offset,
    HOW: tl.constexpr, SHAPE: tl.constexpr, LOSSES: tl.constexpr, SLOPES: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """Sums along the rows of a run: losses, c, pairs, and W g of W1 and of W2."""
    block: tl.constexpr = SHAPE.rows
    corrected: tl.constexpr = HOW.row_correction or HOW.matrix_correction
    loss = tl.zeros((block,), HOW.number)
    correction = tl.zeros((block,), HOW.number)
    count = tl.zeros((block,), HOW.number)
    first_scale = tl.zeros((block,), HOW.number)
    second_scale = tl.zeros((block,), HOW.number)
    for step in tl.range(0, tiles, num_stages=1):
        tile = tile_of_run(pairs, run, step, queries, keys, offset, HOW, SHAPE)
        a, b, value = tile_affinities(pairs, tile, HOW, SHAPE, True, False)
        part = taking_part(pairs, tile, HOW, False)
        if LOSSES:
            more_loss, more_correction = tile_losses(pairs, a, b, part, terms, HOW, corrected)
            loss += more_loss
            correction += more_correction
            if HOW.counted:
                count += tl.sum(tl.where(part, 1.0, 0.0), 1)
        if SLOPES:
            scales = store_pair_slopes(
                pairs, first, second, a, b, value, part, tile, terms, slope_scale, HOW
            )
            if SCALE:
                first_scale += scales[0]
                second_scale += scales[1]
    return loss, correction, count, first_scale, second_scale


@triton.jit
def poison_of_matrix(pairs, poison, matrix, queries, keys, count, HOW: tl.constexpr,
                     PREPARED: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """NaN where an item is not finite, else 0: of the items, or of the blocks that grams.py has."""
    if PREPARED:
        total = poison_of(pairs.query_terms, matrix, queries, LANES)
        if not HOW.self_affinity:
            total += poison_of(pairs.key_terms, matrix, keys, LANES)
        return total
    else:
        blocks = tl.zeros((LANES,), tl.float64)
        for start in range(0, count, LANES):
            at = start + tl.arange(0, LANES)
            found = tl.load(poison + matrix * count + at, mask=at < count, other=0.0)
            blocks += found.to(tl.float64)
        return tl.sum(blocks, 0)


@triton.jit
def store_part(partials, PART: tl.constexpr, x):
    tl.store(partials + PART * tl.num_programs(0) + tl.program_id(0), tl.sum(x.to(tl.float64), 0))


@triton.jit(do_not_specialize=[*SIZES, "states_count", "poison_count"])
def rows_kernel(
    pairs, states, poison, matrix_terms, first, second, partials, row_losses,
    queries, keys, offset, tiles, states_count, poison_count,
    HOW: tl.constexpr, SHAPE: tl.constexpr, PREPARED: tl.constexpr, SLOPES: tl.constexpr,
    SCALE: tl.constexpr, ROW_LOSSES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """From held pairs to partial sums [STASH_PARTS, programs], and (`SLOPES`) W, or W1 and W2.

    Args:
        states: [N, 2, states_count, 2] and
        poison: [N, poison_count], as `gram_kernel` leaves them.
        first, second: [N, Q, K], W1 and W2, where held pairs may lie that no other row needs.
        row_losses: (`ROW_LOSSES`) [N, Q], times weight and row weight.
    """
    run = run_of(queries, keys, tiles, SHAPE)
    rows = run.item + tl.arange(0, SHAPE.rows)
    exists = rows < queries
    row = run.matrix * queries + rows
    weight = row_weights(pairs.row_weight, row, exists, HOW)
    terms, slope_scale = terms_of_rows(
        pairs, states, matrix_terms, run, weight, tiles, states_count, queries, keys, offset,
        HOW, SHAPE, LANES,
    )  # fmt: skip
    early: tl.constexpr = SLOPES and not HOW.row_correction
    loss, correction, count, first_scale, second_scale = sweep_of_rows(
        pairs, first, second, run, tiles, terms, slope_scale, queries, keys, offset,
        HOW, SHAPE, True, early, SCALE,
    )  # fmt: skip
    some = exists
    if HOW.counted:
        some = count > 0
    correction = tl.where(some, weight * correction, 0.0)
    if SLOPES and HOW.row_correction:
        known = Terms(
            terms.student_first, terms.student_second, terms.teacher_first, terms.teacher_second,
            terms.weight, correction.to(HOW.number)[:, None],
        )  # fmt: skip
        _, _, _, first_scale, second_scale = sweep_of_rows(
            pairs, first, second, run, tiles, known, slope_scale, queries, keys, offset,
            HOW, SHAPE, False, True, SCALE,
        )  # fmt: skip
    found = poison_of_matrix(
        pairs, poison, run.matrix, queries, keys, poison_count, HOW, PREPARED, LANES
    )
    loss = tl.load(pairs.numbers + WEIGHT) * weight * (loss.to(tl.float64) + found)
    loss = tl.where(some, loss, 0.0)
    if ROW_LOSSES:
        tl.store(row_losses + row, loss.to(HOW.number), mask=exists)
    store_part(partials, STASH_LOSS, loss)
    store_part(partials, STASH_CORRECTION, correction)
    store_part(partials, STASH_PAIRS, count)
    store_part(partials, STASH_ROWS, tl.where(some, 1.0, 0.0))
    if SCALE:
        store_part(partials, STASH_SCALE, first_scale)
        store_part(partials, STASH_SCALE + 1, second_scale)
