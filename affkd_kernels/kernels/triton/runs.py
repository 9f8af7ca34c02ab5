"""Which tiles of pairs a program of a sweep takes, and where it leaves what it sums up."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import program_of, tile_of


class Run(NamedTuple):
    """What a program takes of a matrix: a block of rows (or columns), and some tiles across it.

    The tiles across a block are divided among `splits` programs.
    """

    matrix: Any  # 64-bit
    item: Any  # the first of the block
    first: Any  # of the tiles
    split: Any
    splits: Any
    end: Any  # rows from here on do not exist in its tiles


@triton.jit
def run_of(rows, columns, tiles, SHAPE: tl.constexpr, COLUMNS: tl.constexpr = False):
    """The run of a program, `tiles` tiles of a [rows, columns] matrix."""
    row_blocks = tl.cdiv(rows, SHAPE.rows)
    column_blocks = tl.cdiv(columns, SHAPE.columns)
    blocks = column_blocks if COLUMNS else row_blocks
    splits = tl.cdiv(row_blocks if COLUMNS else column_blocks, tiles)
    size: tl.constexpr = SHAPE.columns if COLUMNS else SHAPE.rows
    program, split = program_of(splits)
    matrix = (program // blocks).to(tl.int64)
    return Run(matrix, program % blocks * size, split * tiles, split, splits, rows)


@triton.jit
def tile_of_run(
    pairs, run, step, queries, keys, offset,
    HOW: tl.constexpr, SHAPE: tl.constexpr, COLUMNS: tl.constexpr = False,
):  # fmt: skip
    """The tile at a step across the block of a run."""
    row = step * SHAPE.rows if COLUMNS else run.item
    column = run.item if COLUMNS else step * SHAPE.columns
    return tile_of(pairs, run.matrix, row, column, run.end, queries, keys, offset, HOW, SHAPE)


@triton.jit
def part_address(partials, run, items, count, PARTS: tl.constexpr):
    """Where the partial sums of a run's items go, [N * count, splits, PARTS]."""
    item = run.matrix * count + items
    return partials + (item * run.splits + run.split) * PARTS
