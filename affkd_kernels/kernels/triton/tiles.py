"""Tiles of pairs: where they lie, and which of their pairs take part.

Queries are rows i, keys are columns j. Addresses are 64-bit: a batch may hold more than 2^31 pairs.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """A tile of a matrix: `rows` and `columns` are those of the matrix, the inner ones start at 0.

    An address is a 64-bit one of the tile's corner plus a 32-bit one inside, as 64-bit numbers of
    every pair would take up half of the registers; only of a `wide` shape they are needed.
    """

    matrix: Any  # 64-bit
    row: Any  # the first
    column: Any
    inner_rows: Any  # [rows]
    inner_columns: Any  # [columns]
    rows: Any
    columns: Any
    row_exists: Any
    row_valid: Any
    column_valid: Any
    queries: Any
    keys: Any
    offset: Any  # row i has key i + offset on the diagonal


@triton.jit
def program_of(inner):
    """Where a program is in a grid [outer, inner], of which the first index changes faster.

    All programs lie along a launch's first axis, which takes 2^31 - 1: the others end at 65535.
    """
    outer = tl.num_programs(0) // inner
    return tl.program_id(0) % outer, tl.program_id(0) // outer


@triton.jit
def number(pairs, INDEX: tl.constexpr, HOW: tl.constexpr):
    return tl.load(pairs.numbers + INDEX).to(HOW.number)


@triton.jit
def valid_items(mask, matrix, items, count, MASKED: tl.constexpr):
    """Which of the items exist and are valid."""
    valid = items < count
    if MASKED:
        valid = valid & (tl.load(mask + matrix * count + items, mask=valid, other=0) != 0)
    return valid


@triton.jit
def tile_of(
    pairs, matrix, row, column, end, queries, keys, offset,
    HOW: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """The tile with this first row and column; rows from `end` on do not exist in it."""
    inner_rows = tl.arange(0, SHAPE.rows)
    inner_columns = tl.arange(0, SHAPE.columns)
    if SHAPE.wide:
        inner_rows = inner_rows.to(tl.int64)
        inner_columns = inner_columns.to(tl.int64)
    rows = row + inner_rows
    columns = column + inner_columns
    row_valid = valid_items(pairs.query_mask, matrix, rows, queries, HOW.query_mask)
    column_valid = valid_items(pairs.key_mask, matrix, columns, keys, HOW.key_mask)
    exists = rows < end
    return Tile(
        matrix, row, column, inner_rows, inner_columns, rows, columns,
        exists, exists & row_valid, column_valid, queries, keys, offset,
    )  # fmt: skip


@triton.jit
def pair_offsets(tile):
    """Of the pairs of a tile in [N, Q, K], from the first on."""
    return tile.inner_rows[:, None] * tile.keys + tile.inner_columns[None, :]


@triton.jit
def first_pair(tile):
    return (tile.matrix * tile.queries + tile.row) * tile.keys + tile.column


@triton.jit
def mirrored_first_pair(tile):
    return (tile.matrix * tile.queries + tile.column) * tile.keys + tile.row


@triton.jit
def on_diagonal(tile):
    return tile.rows[:, None] + tile.offset == tile.columns[None, :]


@triton.jit
def taking_part(pairs, tile, HOW: tl.constexpr, MIRRORED: tl.constexpr):
    """Which pairs (i, j) take part; `MIRRORED`: which (j, i) of a self-affinity, at [i, j]."""
    part = tile.row_valid[:, None] & tile.column_valid[None, :]
    if HOW.diagonal == "exclude" and HOW.has_diagonal:
        part = part & ~on_diagonal(tile)
    if HOW.pair_mask:
        at = pairs.pair_mask + first_pair(tile)
        offsets = pair_offsets(tile)
        if MIRRORED:
            at = pairs.pair_mask + mirrored_first_pair(tile)
            offsets = tile.inner_columns[None, :] * tile.keys + tile.inner_rows[:, None]
        part = part & (tl.load(at + offsets, mask=part, other=0) != 0)
    return part
