"""RKD's angle loss and its derivative by the squared distances, over all triples of items.

With h half a squared distance and r one over a distance, the cosine of the angle at vertex j
between i and k is psi_ijk = (h_ij + h_kj - h_ik) r_ij r_kj. A program owns a tile of pairs (a, b)
and takes every third item c twice: b as the vertex between a and c, and c as the vertex between a
and b. So it finds all that the loss asks of its pairs, and meets no other program.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import on_device

# items of a tile, in both directions
BLOCK = 32
# with half as many warps float64 spills
OPTIONS = {"num_warps": 8}


@triton.jit
def halves(squared, SPLIT: tl.constexpr):
    """Half of a squared distance, in float32 as two numbers.

    The distances are at most 1. Multiples of 2^-24 up to 1/2 are added and subtracted in float32
    without rounding, and what they leave of a number is at most 2^-25: a difference of squares
    keeps its digits.
    """
    half = 0.5 * squared
    if SPLIT:
        # adding it rounds to a multiple of 2^-24
        rounder = 402653184.0
        rounded = (half + rounder) - rounder
        return rounded.to(tl.float32), (half - rounded).to(tl.float32)
    else:
        return half, half * 0.0


@triton.jit
def edges(squared, inverse, at, exists, SPLIT: tl.constexpr):
    """Halves and inverse of the distances from one item to some."""
    high, low = halves(tl.load(squared + at, mask=exists, other=0.0), SPLIT)
    return high, low, tl.load(inverse + at, mask=exists, other=0.0)


@triton.jit
def cosines(
    high, low, inverse, a_high, a_low, a_inverse, b_high, b_low, b_inverse, SPLIT: tl.constexpr
):
    """psi of (a, b, c) at vertex b and at vertex c, and the products of inverses of the latter."""
    at_b = (high + b_high) - a_high
    at_c = (a_high + b_high) - high
    if SPLIT:
        at_b += (low + b_low) - a_low
        at_c += (a_low + b_low) - low
    reach = a_inverse * b_inverse
    return at_b * (inverse * b_inverse), at_c * reach, reach


@triton.jit
def loss_slope(error, beta, LINEAR: tl.constexpr):
    """The derivative w of smooth L1, which itself is w error - beta w^2 / 2; NaN passes."""
    if LINEAR:
        return tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))
    else:
        scaled = error / beta
        return tl.where(scaled > 1, 1.0, tl.where(scaled < -1, -1.0, scaled))


@triton.jit(do_not_specialize=["count"])
def angle_kernel(
    student_squared, student_inverse, teacher_squared, teacher_inverse, losses, slopes, count,
    beta: tl.float64,
    SPLIT: tl.constexpr, LINEAR: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of each tile [programs], and d loss / d squared distance [N, L, L], up to symmetry.

    The squared distances are float64, the inverse ones float32 (`SPLIT`) or float64.
    """
    blocks = tl.cdiv(count, BLOCK)
    matrix = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    rows = tl.program_id(0) // blocks % blocks * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = (rows < count)[:, None] & (columns < count)[None, :]
    first = matrix * count * count
    at = first + rows.to(tl.int64)[:, None] * count + columns[None, :]
    high, low = halves(tl.load(student_squared + at, mask=exists, other=0.0), SPLIT)
    inverse = tl.load(student_inverse + at, mask=exists, other=0.0)
    other_high, other_low = halves(tl.load(teacher_squared + at, mask=exists, other=0.0), SPLIT)
    other_inverse = tl.load(teacher_inverse + at, mask=exists, other=0.0)
    square = inverse * inverse
    beta = tl.full((), beta, tl.float64).to(inverse.dtype)
    loss = tl.zeros((BLOCK, BLOCK), inverse.dtype)
    slope = tl.zeros((BLOCK, BLOCK), inverse.dtype)
    from_third = first
    for _ in range(0, count):
        to_rows = from_third + rows
        to_columns = from_third + columns
        from_third += count
        a_high, a_low, a_inverse = edges(
            student_squared, student_inverse, to_rows, rows < count, SPLIT
        )
        b_high, b_low, b_inverse = edges(
            student_squared, student_inverse, to_columns, columns < count, SPLIT
        )
        psi, turned, reach = cosines(
            high, low, inverse, a_high[:, None], a_low[:, None], a_inverse[:, None],
            b_high[None, :], b_low[None, :], b_inverse[None, :], SPLIT,
        )  # fmt: skip
        c_high, c_low, c_inverse = edges(
            teacher_squared, teacher_inverse, to_rows, rows < count, SPLIT
        )
        d_high, d_low, d_inverse = edges(
            teacher_squared, teacher_inverse, to_columns, columns < count, SPLIT
        )
        other, other_turned, _ = cosines(
            other_high, other_low, other_inverse, c_high[:, None], c_low[:, None],
            c_inverse[:, None], d_high[None, :], d_low[None, :], d_inverse[None, :], SPLIT,
        )  # fmt: skip
        error = psi - other
        weight = loss_slope(error, beta, LINEAR)
        loss += weight * (error - 0.5 * beta * weight)
        if GRADIENT:
            slope += weight * (inverse * b_inverse[None, :] - psi * square)
            slope -= 0.5 * loss_slope(turned - other_turned, beta, LINEAR) * reach
    total = tl.sum(tl.sum(tl.where(exists, loss, 0.0).to(tl.float64), 1), 0)
    tl.store(losses + tl.program_id(0), total)
    if GRADIENT:
        tl.store(slopes + at, slope, mask=exists)


def constants(dtype: torch.dtype, linear: bool, gradient: bool) -> dict[str, Any]:
    split = dtype == torch.float32
    return {"SPLIT": split, "LINEAR": linear, "GRADIENT": gradient, "BLOCK": BLOCK}


def sweep(s: Any, t: Any, beta: float, need_slope: bool) -> tuple[Tensor, Tensor | None]:
    """What `kernels.angle.eager_sweep` returns.

    Args:
        s, t: `kernels.angle.Distances` of student and teacher.
        beta: of smooth L1; 0 gives L1.
        need_slope: whether the gradient is wanted.

    Returns:
        The loss [], and d loss / d squared distance [N, L, L], up to symmetry, or None.
    """
    matrices, count, _ = s.squared.shape
    blocks = -(-count // BLOCK)
    device, dtype = s.squared.device, s.inverse.dtype
    programs = matrices * blocks * blocks
    losses = torch.empty(programs, dtype=torch.float64, device=device)
    slopes = torch.empty_like(s.inverse) if need_slope else None
    # a beta that underflows is none
    linear = beta < torch.finfo(dtype).tiny
    if programs:
        with on_device(device):
            angle_kernel[(programs,)](
                s.squared.contiguous(), s.inverse.contiguous(), t.squared.contiguous(),
                t.inverse.contiguous(), losses, s.inverse if slopes is None else slopes, count,
                0.0 if linear else beta, **constants(dtype, linear, need_slope), **OPTIONS,
            )  # fmt: skip
    return losses.sum(), slopes
