"""What a call asks of the compiled kernels: the choices that pick a stage, the numbers stages use.

Two flat lists, which csrc/options.h reads by position.
"""

from __future__ import annotations

import functools

from .. import components as c
from ..spec import LossSpec
from . import choices as stage
from .result import Needs

# positions are the values of the enumerations in csrc/settings.h
PAIR_FUNCTIONS = ("linear", "squared_distance", "distance", "gaussian", "taylor", "power")
NORMALIZATIONS = (
    *("none", "row_l2", "row_l1", "row_sum", "softmax", "frobenius", "frobenius_centered"),
    *("mean_positive", "mean_all", "mean_offdiag", "max", "max_detached"),
)
LOSSES = (*("mse", "l1", "smooth_l1", "kl_forward", "kl_reverse", "kl_symmetric", "cross_entropy"),)
DIAGONALS = ("keep", "zero", "exclude")
REDUCTIONS = ("mean", "batchmean", "matrixmean", "sum")
ALGORITHMS = ("dense", "tiled")


@functools.lru_cache(maxsize=512)
def static_options(
    spec: LossSpec,
    needs: Needs,
    algorithm: str,
    factor: float,
    exchanged: bool,
    has_keys: bool,
    dims: tuple[int, int],
) -> tuple[list[int], list[float]]:
    """The choices and the numbers of all calls that agree in these arguments.

    Args:
        factor: multiplies the weight.
        exchanged: whether queries and keys have traded places.
        dims: features of student and teacher.
    """
    a, n, loss = spec.affinity, spec.normalization, spec.loss
    offset = spec.diagonal_offset if has_keys else 0
    softmax = n if isinstance(n, c.Softmax) else c.Softmax()
    bound = stage.lower_bound(a)
    reduction = "sum" if spec.reduction == "none" else spec.reduction
    choices = [
        PAIR_FUNCTIONS.index(stage.pair_function(a)),
        stage.unit(a),
        stage.order(a),
        bound is not None,
        NORMALIZATIONS.index(stage.normalization_kind(n)),
        LOSSES.index(stage.loss_kind(loss)),
        DIAGONALS.index(spec.diagonal),
        offset is not None,
        (-offset if exchanged else offset) if offset is not None else 0,
        REDUCTIONS.index(reduction),
        ALGORITHMS.index(algorithm),
        *needs,
    ]
    student_scale, teacher_scale = stage.scales(a, dims)
    numbers = [
        student_scale,
        teacher_scale,
        stage.offset(a),
        getattr(a, "eps", 0.0),
        0.0 if bound is None else bound,
        getattr(n, "eps", 0.0),
        softmax.tau_of("student"),
        softmax.tau_of("teacher"),
        getattr(loss, "beta", 0.0),
        getattr(loss, "eps", 0.0),
        spec.weight * factor,
    ]
    return [int(choice) for choice in choices], [float(number) for number in numbers]
