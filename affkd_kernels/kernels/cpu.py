"""The C++ CPU kernels: loss and gradient of every valid triple in one call.

A call is canonical tensors in the computation dtype plus two flat lists
(:mod:`affkd_kernels.kernels.options`), to which is added whether columns have losses as rows do.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..inputs import Inputs
from ..spec import LossSpec
from . import extension
from .options import static_options
from .result import LossAndGrad, Needs, PlainCall


def available(device_type: str = "cpu") -> tuple[bool, str]:
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
    if spec.axis == "column" and inputs.student_keys is not None:
        return _call_exchanged(spec, inputs, needs, algorithm)
    return _call(spec, inputs, needs, algorithm)


def plain_call(spec: LossSpec, inputs: Inputs, algorithm: str) -> PlainCall | None:
    """`loss_and_grad` with all decided that does not depend on values, or None where it cannot be.

    Small batches pay more for deciding than for computing. The call takes features of the same
    metadata as ``inputs``, [Q, D] or [N, Q, D], and needs no options.
    """
    plain = inputs.student_keys is None and not any(x is not None for x in inputs[4:])
    if not plain or inputs.student.dtype != inputs.dtype or inputs.teacher.dtype != inputs.dtype:
        return None
    _require()
    run = torch.ops.affkd_kernels.cpu_loss_and_grad.default
    nothing = (None,) * 6
    options = [_options(spec, inputs, Needs(student=need), algorithm) for need in (False, True)]

    def call(student: Tensor, teacher: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
        student, teacher = student.contiguous(), teacher.contiguous()
        return run(student, teacher, *nothing, *options[need])[:2]

    return call


def row_losses(spec: LossSpec, inputs: Inputs, algorithm: str) -> Tensor:
    """The weighted row losses [N, Q], or [N, K] of a softmax over columns; no gradients.

    Arguments and errors are those of :func:`loss_and_grad`.
    """
    _require()
    inputs = _contiguous(inputs)
    exchanged = spec.axis == "column"
    choices, numbers = _options(spec, inputs, Needs(student=False), algorithm, exchanged)
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
    exchanged: bool = False,
) -> LossAndGrad:
    choices, numbers = _options(spec, inputs, needs, algorithm, exchanged)
    return LossAndGrad(*torch.ops.affkd_kernels.cpu_loss_and_grad(*inputs[:8], choices, numbers))


def _call_exchanged(spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str) -> LossAndGrad:
    """The row form of A': queries and keys trade places, and so do their gradients."""
    traded = _call(spec, inputs.exchanged(), needs.exchanged(), algorithm, exchanged=True)
    return traded.exchanged()


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
    spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str, exchanged: bool = False
) -> tuple[list[int], list[float]]:
    has_keys = inputs.student_keys is not None
    dims = (inputs.student.shape[-1], inputs.teacher.shape[-1])
    choices, numbers = _static_options(
        spec, needs, algorithm, exchanged and has_keys, has_keys, dims
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
    exchanged: bool,
    has_keys: bool,
    dims: tuple[int, int],
) -> tuple[list[int], list[float]]:
    choices, numbers = static_options(spec, needs, algorithm, 1.0, exchanged, has_keys, dims)
    # the columns of a self-affinity are its rows
    columns_too = spec.axis == "both" and has_keys
    return [*choices, int(columns_too)], numbers
