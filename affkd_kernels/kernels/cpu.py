"""The C++ CPU kernels: loss and gradient of every valid triple in one call.

A call is canonical tensors in the computation dtype plus two flat lists, which csrc/ops.cpp reads
by position (`read_options`): the choices that pick a stage, and the numbers the stages use.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import components as c
from ..inputs import Inputs
from ..spec import LossSpec
from . import choices as stage
from . import extension
from .result import LossAndGrad, Needs

# positions are the values of the enumerations in csrc/cpu/call.h and csrc/cpu/batch.h
_PAIR_FUNCTIONS = ("linear", "squared_distance", "distance", "gaussian", "taylor", "power")
_NORMALIZATIONS = (
    *("none", "row_l2", "row_l1", "row_sum", "softmax", "frobenius", "frobenius_centered"),
    *("mean_positive", "mean_all", "mean_offdiag", "max", "max_detached"),
)
_LOSSES = (
    *("mse", "l1", "smooth_l1", "kl_forward", "kl_reverse", "kl_symmetric", "cross_entropy"),
)
_DIAGONALS = ("keep", "zero", "exclude")
_REDUCTIONS = ("mean", "batchmean", "matrixmean", "sum")
_ALGORITHMS = ("dense", "tiled")


def available() -> tuple[bool, str]:
    """Whether the kernels can run here, or why not."""
    reason = extension.load()
    return not reason, reason


def loss_and_grad(spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str) -> LossAndGrad:
    """The loss and the gradients that ``needs`` asks for.

    Args:
        spec: a triple of the contract's own components, with reduction, weight and diagonal;
            reduction ``"none"`` gives the sum of the row losses.
        inputs: canonical CPU tensors of any strides and floating dtypes.
        needs: which of student, student_keys and student_scale get a gradient.
        algorithm: ``"dense"`` holds both affinity matrices, ``"tiled"`` neither.

    Raises:
        RuntimeError: the kernels cannot be used here; says why.
    """
    _require()
    inputs = _contiguous(inputs)
    if spec.axis == "row":
        return _call(spec, inputs, needs, algorithm, 1.0)
    if spec.axis == "column":
        return _call_exchanged(spec, inputs, needs, algorithm, 1.0)
    by_row = _call(spec, inputs, needs, algorithm, 0.5)
    by_column = _call_exchanged(spec, inputs, needs, algorithm, 0.5)
    return LossAndGrad(*map(_sum, by_row, by_column))  # type: ignore[arg-type]


def row_losses(spec: LossSpec, inputs: Inputs, algorithm: str) -> Tensor:
    """The weighted row losses [N, Q], or [N, K] of a softmax over columns; no gradients.

    Arguments and errors are those of :func:`loss_and_grad`.
    """
    _require()
    inputs = _contiguous(inputs)
    exchanged = spec.axis == "column"
    choices, numbers = _options(spec, inputs, Needs(student=False), algorithm, 1.0, exchanged)
    if exchanged:
        inputs = inputs.exchanged()
    return torch.ops.affkd_kernels.cpu_row_losses(*inputs[:8], choices, numbers)


def _require() -> None:
    usable, reason = available()
    if not usable:
        raise RuntimeError(f"backend 'cpp' cannot run here: {reason}")


def _call(
    spec: LossSpec,
    inputs: Inputs,
    needs: Needs,
    algorithm: str,
    factor: float,
    exchanged: bool = False,
) -> LossAndGrad:
    choices, numbers = _options(spec, inputs, needs, algorithm, factor, exchanged)
    return LossAndGrad(*torch.ops.affkd_kernels.cpu_loss_and_grad(*inputs[:8], choices, numbers))


def _call_exchanged(
    spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str, factor: float
) -> LossAndGrad:
    """The row form of A': queries and keys trade places, and so do their gradients."""
    if inputs.student_keys is None:
        return _call(spec, inputs, needs, algorithm, factor)
    traded = Needs(needs.student_keys, needs.student, needs.student_scale)
    result = _call(spec, inputs.exchanged(), traded, algorithm, factor, exchanged=True)
    return result._replace(
        grad_student=result.grad_student_keys, grad_student_keys=result.grad_student
    )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a.add_(b)


def _contiguous(inputs: Inputs) -> Inputs:
    """Contiguous in the computation dtype; what is so already is not touched."""
    dtype = inputs.dtype

    def ready(x: Tensor | None) -> Tensor | None:
        if x is None or (x.is_contiguous() and x.dtype in (dtype, torch.bool)):
            return x
        # the op has no derivative of its own, and sees constants
        return (x if x.dtype == torch.bool else x.detach().to(dtype)).contiguous()

    return Inputs._make((*map(ready, inputs[:8]), inputs.student_scale, inputs.teacher_scale))


def _options(
    spec: LossSpec,
    inputs: Inputs,
    needs: Needs,
    algorithm: str,
    factor: float,
    exchanged: bool,
) -> tuple[list[int], list[float]]:
    has_keys = inputs.student_keys is not None
    dims = (inputs.student.shape[-1], inputs.teacher.shape[-1])
    choices, numbers = _static_options(
        spec, needs, algorithm, factor, exchanged and has_keys, has_keys, dims
    )
    if inputs.student_scale is None and inputs.teacher_scale is None:
        return choices, numbers
    numbers = numbers.copy()
    for position, scale in enumerate((inputs.student_scale, inputs.teacher_scale)):
        if scale is not None:
            numbers[position] = float(scale.detach())
    return choices, numbers


@functools.lru_cache(maxsize=512)
def _static_options(
    spec: LossSpec,
    needs: Needs,
    algorithm: str,
    factor: float,
    exchanged: bool,
    has_keys: bool,
    dims: tuple[int, int],
) -> tuple[list[int], list[float]]:
    a, n, loss = spec.affinity, spec.normalization, spec.loss
    offset = spec.diagonal_offset if has_keys else 0
    softmax = n if isinstance(n, c.Softmax) else c.Softmax()
    bound = stage.lower_bound(a)
    reduction = "sum" if spec.reduction == "none" else spec.reduction
    choices = [
        _PAIR_FUNCTIONS.index(stage.pair_function(a)),
        stage.unit(a),
        stage.order(a),
        bound is not None,
        _NORMALIZATIONS.index(stage.normalization_kind(n)),
        _LOSSES.index(stage.loss_kind(loss)),
        _DIAGONALS.index(spec.diagonal),
        offset is not None,
        (-offset if exchanged else offset) if offset is not None else 0,
        _REDUCTIONS.index(reduction),
        _ALGORITHMS.index(algorithm),
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
