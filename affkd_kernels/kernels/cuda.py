"""The C++ CUDA kernels: loss and gradient of every valid triple in a few launches of one call.

A call is canonical tensors as they come (any strides, each in its own floating dtype), two flat
lists (:mod:`affkd_kernels.kernels.options`), and nothing that would make the host wait for the GPU.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..inputs import Inputs
from ..spec import LossSpec
from . import extension
from .options import static_options
from .precision import float32_precision
from .result import LossAndGrad, Needs, PlainCall

# positions are the values of the enumeration in csrc/cuda/params.cuh
PRECISIONS = ("ieee", "tf32x3", "tf32")
# what a call may hold of the affinity matrices where the spec does not say
WORKSPACE_BYTES = 256 << 20


@functools.cache
def available(device_type: str = "cuda") -> tuple[bool, str]:
    """Whether the kernels can run on every GPU of this process, or why not."""
    if reason := extension.load_cuda():
        return False, reason
    if not torch.cuda.is_available():
        return False, "there is no CUDA device that torch can use"
    oldest = min(extension.cuda_architectures())
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < oldest:
            return False, (
                f"cuda:{device} has compute capability {major}.{minor}, "
                f"and the C++ CUDA kernels need {oldest // 10}.{oldest % 10}"
            )
    return True, ""


def loss_and_grad(spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str) -> LossAndGrad:
    """The loss and the gradients that ``needs`` asks for.

    Args:
        spec: a triple of the contract's own components, with reduction, weight and diagonal;
            reduction ``"none"`` gives the sum of the row losses.
        inputs: canonical CUDA tensors of any strides and floating dtypes.
        needs: which of student, student_keys and student_scale get a gradient.
        algorithm: ``"dense"`` holds both affinity matrices, ``"tiled"`` as many of their rows at a
            time as fit the workspace.

    Raises:
        RuntimeError: the kernels cannot be used here; says why.
    """
    _require()
    # a self-affinity is its own transpose: its columns are its rows
    axis = "row" if inputs.student_keys is None else spec.axis
    if axis == "row":
        return _call(spec, inputs, needs, algorithm, 1.0)
    if axis == "column":
        return _call_exchanged(spec, inputs, needs, algorithm, 1.0)
    if _holds_columns(spec, inputs, algorithm):
        return _call(spec, inputs, needs, algorithm, 0.5, columns=True)
    by_row = _call(spec, inputs, needs, algorithm, 0.5)
    by_column = _call_exchanged(spec, inputs, needs, algorithm, 0.5)
    return by_row.plus(by_column)


def plain_call(spec: LossSpec, inputs: Inputs, algorithm: str) -> PlainCall | None:
    """`loss_and_grad` with all decided that does not depend on values, or None where it cannot be.

    The call takes features of the same metadata as ``inputs``, [Q, D] or [N, Q, D], and needs no
    options. The student's dtype is that of the computation, and so its gradient needs no more.
    """
    plain = inputs.student_keys is None and not any(x is not None for x in inputs[4:])
    if not plain or inputs.student.dtype != inputs.dtype:
        return None
    _require()
    run = torch.ops.affkd_kernels.cuda_loss_and_grad.default
    nothing = (None,) * 8
    lists = [_options(spec, inputs, Needs(student=need), algorithm) for need in (False, True)]

    def call(student: Tensor, teacher: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
        choices, numbers = lists[need]
        return run(student, teacher, *nothing, [*choices, _precision()], numbers)[:2]

    return call


def row_losses(spec: LossSpec, inputs: Inputs, algorithm: str) -> Tensor:
    """The weighted row losses [N, Q], or [N, K] of a softmax over columns; no gradients.

    Arguments and errors are those of :func:`loss_and_grad`.
    """
    _require()
    exchanged = spec.axis == "column" and inputs.student_keys is not None
    choices, numbers = _options(spec, inputs, Needs(student=False), algorithm, exchanged=exchanged)
    if exchanged:
        inputs = inputs.exchanged()
    run = torch.ops.affkd_kernels.cuda_row_losses
    return run(*inputs, [*choices, _precision()], numbers)


def _require() -> None:
    usable, reason = available()
    if not usable:
        raise RuntimeError(f"backend 'cpp' cannot run here: {reason}")


def _holds_columns(spec: LossSpec, inputs: Inputs, algorithm: str) -> bool:
    """Whether the workspace has room for the pairs of both sides and for their transposes."""
    held = 4 * inputs.num_pairs * inputs.dtype.itemsize
    return algorithm == "dense" or held <= _workspace(spec)


def _call(
    spec: LossSpec,
    inputs: Inputs,
    needs: Needs,
    algorithm: str,
    factor: float,
    exchanged: bool = False,
    columns: bool = False,
) -> LossAndGrad:
    """With ``columns`` the loss of the columns is added to that of the rows."""
    choices, numbers = _options(spec, inputs, needs, algorithm, factor, exchanged, columns)
    run = torch.ops.affkd_kernels.cuda_loss_and_grad
    return LossAndGrad(*run(*inputs, [*choices, _precision()], numbers))


def _call_exchanged(
    spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str, factor: float
) -> LossAndGrad:
    """The row form of A': queries and keys trade places, and so do their gradients."""
    traded = _call(spec, inputs.exchanged(), needs.exchanged(), algorithm, factor, exchanged=True)
    return traded.exchanged()


def _options(
    spec: LossSpec,
    inputs: Inputs,
    needs: Needs,
    algorithm: str,
    factor: float = 1.0,
    exchanged: bool = False,
    columns: bool = False,
) -> tuple[list[int], list[float]]:
    """The two lists but for the last choice, which may change between two calls."""
    dims = (inputs.student.shape[-1], inputs.teacher.shape[-1])
    has_keys = inputs.student_keys is not None
    choices, numbers = static_options(spec, needs, algorithm, factor, exchanged, has_keys, dims)
    return [*choices, _workspace(spec), int(columns)], numbers


def _workspace(spec: LossSpec) -> int:
    given = spec.max_workspace_bytes
    return WORKSPACE_BYTES if given is None else given


def _precision() -> int:
    return PRECISIONS.index(float32_precision())
