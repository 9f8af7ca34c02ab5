"""What a kernel is given at run time: where things lie in the tensors that it reads and writes.

Numbers (temperatures, eps, weights) come in a small float64 tensor, so that a schedule of them
compiles nothing; the first kernel of a call fills it. Positions are tl.constexpr because kernels
may read no other globals.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

# of the tensor of numbers
STUDENT_SCALE = tl.constexpr(0)
TEACHER_SCALE = tl.constexpr(1)
OFFSET = tl.constexpr(2)
AFFINITY_EPS = tl.constexpr(3)
CLAMP_MIN = tl.constexpr(4)
STATISTIC_EPS = tl.constexpr(5)
STUDENT_INVERSE_TAU = tl.constexpr(6)
TEACHER_INVERSE_TAU = tl.constexpr(7)
BETA = tl.constexpr(8)
LOG_EPS = tl.constexpr(9)
WEIGHT = tl.constexpr(10)

# what is kept of an item of one side: 1 / |x| of a unit feature, |x|^2 of a distance, x.mean of a
# feature that is centered; and a NaN where the item is not finite
ITEM_TERMS = tl.constexpr(4)
LENGTH = tl.constexpr(0)
POISON = tl.constexpr(1)
TEACHER_ITEM = tl.constexpr(2)

# what normalizes the entries of a row: 1 / statistic and the statistic, or peak and log sum of a
# softmax
ROW_TERMS = tl.constexpr(16)
STUDENT_FIRST = tl.constexpr(0)
STUDENT_SECOND = tl.constexpr(1)
TEACHER_FIRST = tl.constexpr(2)
TEACHER_SECOND = tl.constexpr(3)
CORRECTION = tl.constexpr(4)  # c: what flows back through the statistic
PAIRS = tl.constexpr(5)  # how many of the row take part
STUDENT_MEAN = tl.constexpr(6)  # of a centered matrix, less the grand mean
TEACHER_MEAN = tl.constexpr(7)
GRADIENT_MEAN = tl.constexpr(8)

# the means of columns: student, teacher, gradient
COLUMN_TERMS = tl.constexpr(4)
GRADIENT_COLUMN_MEAN = tl.constexpr(2)

MATRIX_TERMS = tl.constexpr(8)
SLOPE_SCALE = tl.constexpr(0)  # 1 / count of a mean, 1 / ties of a maximum
STUDENT_SQUARES = tl.constexpr(1)  # sum of A^2 before centering; the teacher's comes next
STUDENT_GRAND = tl.constexpr(3)  # m.m of the means of queries and keys; the teacher's comes next

# partial sums of a sweep, [N * Q, splits, terms]
STATISTIC_PARTS = tl.constexpr(8)  # student, student, teacher, teacher, product, pairs, alignment
LOSS_PARTS = tl.constexpr(4)  # loss, correction, pairs, scale gradient
MEAN_PARTS = tl.constexpr(4)  # student, teacher, squares of both

# sums over the rows of a program, [terms, programs], float64
STASH_PARTS = tl.constexpr(8)
STASH_LOSS = tl.constexpr(0)
STASH_CORRECTION = tl.constexpr(1)
STASH_PAIRS = tl.constexpr(2)
STASH_ROWS = tl.constexpr(3)  # with pairs
STASH_SCALE = tl.constexpr(4)  # of W1 g; of W2 g comes next

# arguments that only masks and loops use: their values must not compile a kernel anew
SIZES = ["queries", "keys", "offset", "tiles", "first_matrix", "row_start", "row_count"]


class Side(NamedTuple):
    """Queries and keys of student or teacher; a self-affinity's keys are its queries."""

    queries: Any  # [N, Q, D]
    keys: Any  # [N, K, D]
    scale: Any  # [1]
    query_stride: Any
    query_matrix: Any
    key_stride: Any
    key_matrix: Any
    dim: Any


class Pairs(NamedTuple):
    """All that a sweep over pairs reads; what a call lacks is some other pointer, never read."""

    student: Side
    teacher: Side
    numbers: Any
    query_mask: Any  # [N, Q]
    key_mask: Any  # [N, K]
    pair_mask: Any  # [N, Q, K]
    row_weight: Any  # [N, Q]
    query_terms: Any  # [N * Q, ITEM_TERMS]
    key_terms: Any  # [N * K, ITEM_TERMS]
    row_terms: Any  # [N * Q, ROW_TERMS]
    column_terms: Any  # [N * K, COLUMN_TERMS]
    student_held: Any  # [N, Q, K] of `stages.pair_argument`, where they are held
    teacher_held: Any


class Terms(NamedTuple):
    """Inside a kernel: what normalizes the entries of a tile, as columns or rows of it."""

    student_first: Any
    student_second: Any
    teacher_first: Any
    teacher_second: Any
    weight: Any
    correction: Any
