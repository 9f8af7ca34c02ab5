"""Derivatives of the oracle by central differences, and how far the nearest kink is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import oracle
from formulas import Array, with_defaults


def numerical_gradient(function: Callable[[Array], float], x: Any, step: float = 1e-5) -> Array:
    """Central differences of a scalar function, one entry of x at a time."""
    x = oracle.array(x)
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2.0 * step)
    return gradient


def student_gradient(student: Any, teacher: Any, *components: Any, **call: Any) -> Array:
    """d loss / d student by central differences; a detached statistic stays where it was."""

    def function(x: Array) -> float:
        value = oracle.affinity_loss(x, teacher, *components, statistic_student=student, **call)
        return float(np.sum(value))

    return numerical_gradient(function, student)


def distance_to_kink(student: Any, teacher: Any, *components: Any, **call: Any) -> float:
    """How far the nearest point is at which the loss is not differentiable in the student.

    In units of A or P, whichever the kink lives in. An entry that sits on a kink to 12 digits is
    there by construction (a diagonal of zeros, P = 1 at both maxima) and does not move: left out.
    """
    affinity, normalization, loss = map(with_defaults, components)
    axis = normalization[1].get("axis")
    call = {key: value for key, value in call.items() if key not in _NOT_STAGES}
    margins = [_clamp_margin(student, teacher, affinity, **call)]
    for one_axis in ("row", "column") if axis == "both" else (axis,):
        options = {**normalization[1], "axis": one_axis} if axis else normalization[1]
        form = (normalization[0], options)
        for one in oracle.stages(student, teacher, affinity, form, loss, **call):
            margins += [*_affinity_margins(form, one), _loss_margin(form, loss, one)]
    return min(float(margin.min(initial=math.inf)) for margin in margins)


_NOT_STAGES = ("reduction", "weight", "row_weight")
_AT_REST = 1e-12


def _clamp_margin(student: Any, teacher: Any, affinity: Any, **call: Any) -> Array:
    name, options = affinity
    if options["clamp_min"] is None:
        return np.zeros(0)
    free = (name, {**options, "clamp_min": None})
    matrices = oracle.stages(student, teacher, free, "none", "mse", **call)
    entries = [one.student_affinity[one.part] for one in matrices]
    return np.abs(np.concatenate(entries) - options["clamp_min"])


def _affinity_margins(normalization: Any, one: oracle.Stages) -> Iterator[Array]:
    n_name, n_options = normalization
    a = one.student_affinity[one.part]
    positive_mean = n_name == "mean" and n_options["over"] == "positive"
    distances: list[Array] = []
    if n_name == "row_l1" or positive_mean:
        distances.append(np.abs(a))
    if n_name == "max":
        # a pair and its mirror image tie for ever and move together
        distances.append(a.max(initial=-math.inf) - a)
    if n_name == "max" or positive_mean:
        # P jumps to 0 where the maximum does, and is steep long before
        distances.append(0.1 * a.max(initial=0.0, keepdims=True))
    return (distance[distance > _AT_REST] for distance in distances)


def _loss_margin(normalization: Any, loss: Any, one: oracle.Stages) -> Array:
    (n_name, n_options), (l_name, l_options) = normalization, loss
    if l_name not in ("l1", "smooth_l1"):
        return np.zeros(0)
    s, difference = one.student, np.abs(one.student - one.teacher)
    distance = difference if l_name == "l1" else np.abs(difference - l_options["beta"])
    at_rest = distance <= _AT_REST
    if n_name == "max" and n_options["detach"]:
        # the largest entry is 1 and moves all the same, unless the diagonal is a constant
        diagonal = one.student_affinity[one.own]
        constant = diagonal.size > 0 and np.ptp(diagonal) <= _AT_REST
        at_rest &= (s < 1.0 - _AT_REST) | (one.own & constant)
    # a matrix of large P moves faster
    return distance[one.part & ~at_rest] / max(1.0, float(np.abs(s).max(initial=0.0)))
