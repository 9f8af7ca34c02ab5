"""The last product: V with the features, and stage 1 backwards where it is one of each row."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from . import stages
from .tiles import program_of, valid_items


@triton.jit
def slope_times_features(slopes, features, acc, SHAPE: tl.constexpr, SPLIT: tl.constexpr,
                         HOW: tl.constexpr):  # fmt: skip
    """acc + V X in float32 accuracy: bfloat16 features take V as two bfloat16 numbers."""
    if SPLIT:
        high = slopes.to(tl.bfloat16)
        low = (slopes - high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(low, features, acc, out_dtype=HOW.number)
        return tl.dot(high, features, acc, out_dtype=HOW.number)
    else:
        return tl.dot(
            slopes, features.to(HOW.number), acc,
            input_precision=SHAPE.precision, out_dtype=HOW.number,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["outer", "inner", "first_matrix", "outer_start", "outer_count",
                       "inner_start", "inner_count"]
)  # fmt: skip
def product_kernel(
    slopes, out, x, outer_features, mask, outer_mask, scale, totals,
    outer, inner, first_matrix, outer_start, outer_count, inner_start, inner_count, dim, strides,
    HOW: tl.constexpr, SHAPE: tl.constexpr, TRANSPOSED: tl.constexpr, MASKED: tl.constexpr,
    OUTER_MASKED: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The gradient of some items (outer) of some matrices, from those of the other side (inner).

    V is [matrices, outer_count, inner_count], or, where `TRANSPOSED`, the other way round. Gram:
    sum_j V_ij x_j; a distance: 2 (sum_j V_ij x_i - sum_j V_ij x_j). With `ADD` it joins what is
    there.
    """
    rows_block: tl.constexpr = SHAPE.rows
    features_block: tl.constexpr = SHAPE.columns
    inner_block: tl.constexpr = SHAPE.inner
    blocks = tl.cdiv(outer_count, rows_block)
    program, chunk = program_of(tl.cdiv(dim, features_block))
    panel = (program // blocks).to(tl.int64)
    matrix = first_matrix + panel
    panel_rows = program % blocks * rows_block + tl.arange(0, rows_block)
    features = chunk * features_block + tl.arange(0, features_block)
    exists = panel_rows < outer_count
    inside = features < dim
    acc = tl.zeros((rows_block, features_block), HOW.number)
    sums = tl.zeros((rows_block,), HOW.number)
    x_matrix = x + matrix * strides.inner_matrix
    v_matrix = slopes + panel * outer_count * inner_count
    for start in range(0, inner_count, inner_block):
        items = start + tl.arange(0, inner_block)
        if TRANSPOSED:
            at = items.to(tl.int64)[None, :] * outer_count + panel_rows[:, None]
        else:
            at = panel_rows.to(tl.int64)[:, None] * inner_count + items[None, :]
        v = tl.load(v_matrix + at, mask=exists[:, None] & (items < inner_count)[None, :], other=0.0)
        valid = (items < inner_count) & valid_items(
            mask, matrix, inner_start + items, inner, MASKED
        )
        rows = x_matrix + (inner_start + items).to(tl.int64)[:, None] * strides.inner_row
        y = tl.load(rows + features[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        if HOW.counted:
            y = stages.zero_unless_finite(y.to(HOW.number)).to(y.dtype)
        acc = slope_times_features(v, y, acc, SHAPE, SPLIT, HOW)
        if HOW.distance and not HOW.unit:
            sums += tl.sum(v, 1)
    row = outer_start + panel_rows
    factor = tl.load(totals + 1)
    if HOW.distance:
        factor = 2.0 * factor
        acc = -acc
        if not HOW.unit:
            valid = exists & valid_items(outer_mask, matrix, row, outer, OUTER_MASKED)
            at = outer_features + matrix * strides.outer_matrix
            at += row.to(tl.int64)[:, None] * strides.outer_row
            own = tl.load(at + features[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
            own = own.to(HOW.number)
            if HOW.counted:
                own = stages.zero_unless_finite(own)
            acc += sums[:, None] * own
    if HOW.pair == "linear":
        factor = factor * tl.load(scale).to(HOW.number)
    to = out + (matrix * outer + row)[:, None] * dim + features[None, :]
    mask_out = exists[:, None] & inside[None, :]
    acc = acc * factor
    if ADD:
        acc += tl.load(to, mask=mask_out, other=0.0)
    tl.store(to, acc, mask=mask_out)
