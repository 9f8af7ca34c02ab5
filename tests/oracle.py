"""The whole contract in NumPy float64, with loops over pairs: slow, obvious, forward only.

It shares no code with the package and was written from the specification alone, so an agreement
with `affkd_kernels.reference` is the agreement of two independent readings. The formulas are in
`formulas.py`, gradients come from central differences (`differences.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from formulas import (
    Array,
    affinity_matrix,
    log_softmax,
    normalize,
    pair_loss,
    pair_loss_softmax,
    unit,
    with_defaults,
)


class Stages(NamedTuple):
    """What one matrix goes through; entries that take no part are 0 and must not be read."""

    student_affinity: Array  # [Q, K]
    teacher_affinity: Array  # [Q, K]
    student: Array  # [Q, K] P_s
    teacher: Array  # [Q, K] P_t
    pair_loss: Array  # [Q, K]
    part: Array  # [Q, K] bool, the pairs that take part
    own: Array  # [Q, K] bool, the diagonal


def array(value: Any) -> Array:
    """Float64 copy of features, or a bool copy of a mask, from a tensor or an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.numpy() if str(value.dtype) != "torch.bfloat16" else value.float().numpy()
    value = np.asarray(value)
    return value.copy() if value.dtype == bool else value.astype(np.float64)


def as_items(x: Any, items: str) -> tuple[Array, tuple[int, ...]]:
    """Features as [M, Q, D] and the leading shape that M stands for."""
    x = array(x)
    if items == "samples":
        return x.reshape(1, x.shape[0], math.prod(x.shape[1:])), ()
    if items == "tokens":
        leading = x.shape[:-2]
        return x.reshape(math.prod(leading), *x.shape[-2:]), leading
    n, c, h, w = x.shape
    x = x.reshape(n, c, h * w)
    return (x, (n,)) if items == "channels" else (np.swapaxes(x, 1, 2), (n,))


def stages(
    student: Any,
    teacher: Any,
    affinity: Any,
    normalization: Any,
    loss: Any,
    *,
    items: str = "samples",
    mask: Any = None,
    key_mask: Any = None,
    pair_mask: Any = None,
    diagonal: str = "keep",
    diagonal_offset: int | None = None,
    student_keys: Any = None,
    teacher_keys: Any = None,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    statistic_student: Any = None,
) -> Iterator[Stages]:
    """The stages of every matrix; axis "column" transposes right after the affinity."""
    sides = [_side(student, student_keys, items), _side(teacher, teacher_keys, items)]
    (q, k), (q_teacher, k_teacher) = sides
    anchor = (q, k) if statistic_student is None else _side(statistic_student, student_keys, items)
    crossed = student_keys is not None
    offset = diagonal_offset if crossed else 0
    name, o = with_defaults(normalization)
    for m in range(len(q)):
        shape = (q.shape[1], k.shape[1])
        own = np.zeros(shape, dtype=bool)
        for i, j in product(*map(range, shape)):
            own[i, j] = offset is not None and j == i + offset
        row_mask = _mask_of(mask, m, shape[:1])
        column_mask = _mask_of(key_mask, m, shape[1:]) if crossed else row_mask
        part = row_mask[:, None] & column_mask[None, :] & _mask_of(pair_mask, m, shape)
        if diagonal == "exclude":
            part &= ~own
        scales = {"student": student_scale, "teacher": teacher_scale}
        matrices = [
            affinity_matrix(affinity, rows[m], columns[m], part, own, diagonal, side, scales[side])
            for rows, columns, side in (
                (q, k, "student"),
                (q_teacher, k_teacher, "teacher"),
                (*anchor, "student"),
            )
        ]
        if name == "softmax" and o["axis"] == "column":
            matrices, part, own = [a.T for a in matrices], part.T, own.T
        yield _finish(normalization, loss, matrices, part, own)


def _side(x: Any, keys: Any, items: str) -> tuple[Array, Array]:
    queries, _ = as_items(x, items)
    if keys is None:
        return queries, queries
    # keys are always [.., K, D]; only samples have more to flatten
    return queries, as_items(keys, "samples" if items == "samples" else "tokens")[0]


def _mask_of(mask: Any, m: int, shape: tuple[int, ...]) -> Array:
    if mask is None:
        return np.ones(shape, dtype=bool)
    return array(mask).reshape(-1, *shape)[m]


def _finish(
    normalization: Any, loss: Any, matrices: list[Array], part: Array, own: Array
) -> Stages:
    a_student, a_teacher, anchor = matrices
    s = normalize(normalization, a_student, part, own, "student", anchor)
    t = normalize(normalization, a_teacher, part, own, "teacher")
    name, o = with_defaults(normalization)
    values = np.zeros_like(s)
    if name == "softmax":
        log_s = log_softmax(o, a_student, part, "student")
        log_t = log_softmax(o, a_teacher, part, "teacher")
    for i, j in zip(*np.nonzero(part), strict=True):
        if name == "softmax":
            values[i, j] = pair_loss_softmax(loss, log_s[i, j], log_t[i, j])
        else:
            values[i, j] = pair_loss(loss, s[i, j], t[i, j])
    return Stages(a_student, a_teacher, s, t, values, part, own)


def affinity_loss(
    student: Any,
    teacher: Any,
    affinity: Any = "gram",
    normalization: Any = "none",
    loss: Any = "mse",
    *,
    reduction: str = "mean",
    weight: float = 1.0,
    row_weight: Any = None,
    items: str = "samples",
    **call: Any,
) -> float | Array:
    """The loss of the contract, a float, or an array [.., Q] for reduction "none"."""
    name, o = with_defaults(normalization)
    if name == "softmax" and o["axis"] == "both":
        halves = [
            affinity_loss(
                student, teacher, affinity, (name, {**o, "axis": axis}), loss,
                reduction=reduction, weight=weight, items=items, **call,
            )
            for axis in ("row", "column")
        ]  # fmt: skip
        return 0.5 * (halves[0] + halves[1])
    matrices = list(stages(student, teacher, affinity, normalization, loss, items=items, **call))
    rows = [one.pair_loss.sum(1) for one in matrices]
    if row_weight is not None and rows:
        weights = array(row_weight).reshape(len(rows), -1)
        rows = [w * r for w, r in zip(weights, rows, strict=True)]
    if reduction == "none":
        leading = as_items(student, items)[1]
        width = rows[0].shape[0] if rows else as_items(student, items)[0].shape[1]
        return weight * np.array(rows).reshape(*leading, width)
    divisor = {
        "sum": 1,
        "batchmean": sum(int(one.part.any(1).sum()) for one in matrices),
        "mean": sum(int(one.part.sum()) for one in matrices),
        "matrixmean": len(matrices),
    }[reduction]
    total = float(sum(r.sum() for r in rows))
    return weight * total / divisor if divisor else 0.0


def angle_loss(student: Any, teacher: Any, mask: Any = None, beta: float = 1.0) -> float:
    """Relational angle (Park et al. 2019), every triple written out."""
    x, y = as_items(student, "samples")[0][0], as_items(teacher, "samples")[0][0]
    if mask is not None:
        x, y = x[array(mask)], y[array(mask)]
    total, n = 0.0, len(x)
    for i, j, k in product(range(n), repeat=3):
        angles = [float(np.sum(_edge(z[i], z[j]) * _edge(z[k], z[j]))) for z in (x, y)]
        total += pair_loss(("smooth_l1", {"beta": beta}), *angles)
    return total / n**3 if n else 0.0


def _edge(x: Array, vertex: Array) -> Array:
    return unit(x - vertex, 0.0)
