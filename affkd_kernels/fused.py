"""How a fused kernel becomes differentiable in eager mode: an autograd.Function.

Loss and gradients are computed in the forward call, and the backward multiplies by the incoming
gradient. ``reduction="none"`` cannot know the gradients beforehand: its backward asks for the
gradient of the sum with ``row_weight`` multiplied by the incoming gradient. Graphs see an op
(:mod:`affkd_kernels.ops`), whose overhead is three times that of an autograd.Function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dispatch import make_plan
from .inputs import (
    Inputs,
    canonical_inputs,
    from_items,
    full_precision,
    known_inputs,
)
from .kernels.lookup import module_of
from .kernels.result import LossAndGrad, Needs, PlainCall
from .spec import LossSpec

NUM_TENSORS = len(Inputs._fields)
# positions of what gets a gradient
DIFFERENTIABLE = [Inputs._fields.index(field) for field in Needs._fields]


def run_loss_and_grad(
    spec: LossSpec, inputs: Inputs, needs: Needs, backend: str, algorithm: str
) -> LossAndGrad:
    if inputs.num_pairs == 0:
        return _nothing(inputs, needs)
    if backend == "auto":
        backend, algorithm, _ = make_plan(spec, inputs)
    device = inputs.student.device.type
    with full_precision(device):
        return module_of(backend, device).loss_and_grad(spec, inputs, needs, algorithm)


def run_row_losses(spec: LossSpec, inputs: Inputs, backend: str, algorithm: str) -> Tensor:
    rows = inputs.num_keys if spec.axis == "column" else inputs.student.shape[1]
    if inputs.num_pairs == 0:
        return inputs.student.new_zeros((inputs.student.shape[0], rows), dtype=inputs.dtype)
    if backend == "auto":
        backend, algorithm, _ = make_plan(spec, inputs)
    device = inputs.student.device.type
    with full_precision(device):
        return module_of(backend, device).row_losses(spec, inputs, algorithm)


def _nothing(inputs: Inputs, needs: Needs) -> LossAndGrad:
    """No pair at all: 0.0 with zero gradients."""
    dtype, keys = inputs.dtype, inputs.student_keys
    zero = inputs.student.new_zeros((), dtype=dtype)
    return LossAndGrad(
        zero,
        torch.zeros_like(inputs.student, dtype=dtype) if needs.student else None,
        torch.zeros_like(keys, dtype=dtype) if needs.student_keys and keys is not None else None,
        zero.clone() if needs.student_scale else None,
    )


def without_gradient(
    spec: LossSpec, backend: str, algorithm: str, tensors: tuple[Any, ...]
) -> Tensor:
    """The loss alone, as under ``torch.no_grad``."""
    inputs, rows_shape = canonical_inputs(spec, *tensors)
    if spec.reduction == "none":
        return run_row_losses(spec, inputs, backend, algorithm).reshape(rows_shape)
    return run_loss_and_grad(spec, inputs, Needs(student=False), backend, algorithm).loss


def plain_call(
    spec: LossSpec, inputs: Inputs, student: Tensor, teacher: Tensor, backend: str, algorithm: str
) -> PlainCall | None:
    """What :class:`PlainLoss` runs for features with this metadata, None where it cannot.

    A plain call has two tensors and nothing else: no keys, masks, weights or scales, both features
    in the computation dtype, and canonical as they are or lacking only the axis of matrices. All
    that is left to do in it is to run the kernel, which small batches notice.
    """
    pairs = ((student, inputs.student), (teacher, inputs.teacher))
    canonical = all(x.shape in (y.shape, y.shape[1:]) for x, y in pairs)
    prepare = getattr(module_of(backend, student.device.type), "plain_call", None)
    if prepare is None or not canonical or not inputs.num_pairs or spec.reduction == "none":
        return None
    return prepare(spec, inputs, algorithm)


_NO_OPTIONS = (None,) * (NUM_TENSORS - 2)


def _validated(spec: LossSpec, tensors: tuple[Any, ...]) -> Inputs:
    """The canonical tensors of a call that has a plan, and so was validated."""
    if tensors[2:] == _NO_OPTIONS:
        return known_inputs(spec, tensors[0], tensors[1])
    return canonical_inputs(spec, *tensors)[0]


# Whether this backward keeps the graph for another one; where torch cannot tell, it does.
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient * factor``, in the gradient's own memory where nobody asks for it again."""
    again = torch.is_grad_enabled() or torch.compiler.is_compiling() or _keeps_graph()
    return gradient * factor if again else gradient.mul_(factor)


class FusedLoss(torch.autograd.Function):
    """The scalar loss of the caller's own tensors; the layout is undone in the backward.

    The gradients are outputs too, which no caller sees. Saved as outputs they are tied to this
    node, so that to differentiate them, however far from here, ends in an error. The features would
    do as well, but to keep one that the loss is later added to in place would be a cycle of
    references.
    """

    @staticmethod
    def forward(
        ctx: Any, spec: LossSpec, backend: str, algorithm: str, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs = _validated(spec, tensors)
        needs = Needs(*(ctx.needs_input_grad[3 + i] for i in DIFFERENTIABLE))
        result = run_loss_and_grad(spec, inputs, needs, backend, algorithm)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*result[1:])
        ctx.items = spec.items
        features = (tensors[i] for i in DIFFERENTIABLE)
        ctx.kinds = [(x.dtype, x.shape) if isinstance(x, Tensor) else None for x in features]
        return tuple(result)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, *grad_gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(*grad_gradients)
        out: list[Tensor | None] = [None] * (3 + NUM_TENSORS)
        for i, known, saved in zip(DIFFERENTIABLE, ctx.kinds, ctx.saved_tensors, strict=True):
            if saved is not None and grad_loss is not None:
                dtype, shape = known
                out[3 + i] = from_items(_scaled(saved, grad_loss).to(dtype), shape, ctx.items)
        return tuple(out)


class PlainLoss(torch.autograd.Function):
    """`FusedLoss` of a call without options: nothing is left to be decided or converted."""

    @staticmethod
    def forward(
        ctx: Any, call: PlainCall, student: Tensor, teacher: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        loss, gradient = call(student, teacher, ctx.needs_input_grad[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient)
        return loss, gradient

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_gradient is not None:
            refuse_second_derivative(grad_gradient)
        (gradient,) = ctx.saved_tensors
        return None, None if grad_loss is None else _scaled(gradient, grad_loss), None


def plain_loss(call: PlainCall, student: Tensor, teacher: Tensor) -> Tensor:
    # the teacher is a constant
    teacher = teacher.detach() if teacher.requires_grad else teacher
    # a student without requires_grad may still carry a tangent, which the raw op would lose
    if torch.is_grad_enabled():
        return PlainLoss.apply(call, student, teacher)[0]
    return call(student, teacher, False)[0]


class FusedRowLosses(torch.autograd.Function):
    """The row losses [..., Q] of ``reduction="none"``; the backward recomputes."""

    @staticmethod
    def forward(
        ctx: Any, spec: LossSpec, backend: str, algorithm: str, *tensors: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*map(saved_constant, tensors))
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in tensors]
        ctx.shadows = [shadow_of(tensors[i]) for i in DIFFERENTIABLE]
        ctx.plan = (spec, backend, algorithm)
        return without_gradient(spec, backend, algorithm, tensors)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        spec, backend, algorithm = ctx.plan
        saved = zip(ctx.saved_tensors, ctx.numbers, strict=True)
        tensors = [x if number is None else number for x, number in saved]
        needs = Needs(*(ctx.needs_input_grad[3 + i] for i in DIFFERENTIABLE))
        with torch.no_grad():
            inputs, rows_shape = canonical_inputs(spec, *tensors)
            rows = grad_rows.reshape(inputs.student.shape[0], rows_shape[-1])
            weighted = inputs._replace(row_weight=times(rows, inputs.row_weight))
            result = run_loss_and_grad(summed(spec), weighted, needs, backend, algorithm)
        out: list[Tensor | None] = [None] * (3 + NUM_TENSORS)
        for i, gradient, shadow in zip(DIFFERENTIABLE, result[1:], ctx.shadows, strict=True):
            if gradient is not None:
                gradient = from_items(gradient, tensors[i].shape, spec.items)
                out[3 + i] = no_second_derivative(gradient, shadow)
        return tuple(out)


def summed(spec: LossSpec) -> LossSpec:
    """The spec whose loss is the sum of this one's row losses."""
    return dataclasses.replace(spec, reduction="sum")


def times(rows: Tensor, row_weight: Tensor | None) -> Tensor:
    return rows if row_weight is None else rows * row_weight


def saved_constant(x: Tensor | float | None) -> Tensor | None:
    """What save_for_backward takes: a teacher computed in inference mode must be copied.

    Detached: the graph of a feature that the losses are later added to in place would be a cycle.
    Changes in place are found all the same, as both have one version.
    """
    if not isinstance(x, Tensor):
        return None
    return x.clone() if x.is_inference() else x.detach()


def shadow_of(x: Any) -> Tensor | None:
    """An empty tensor that depends on what x depends on, in its dtype, and keeps none of it alive.

    A node that keeps x itself is in a cycle with it once x is changed in place by what the node has
    computed: nobody would free x, nor all that its graph has saved.
    """
    if not isinstance(x, Tensor):
        return None
    with torch.enable_grad():
        return _Shadow.apply(x)


def no_second_derivative(gradient: Tensor, shadow: Tensor) -> Tensor:
    """The gradient in the dtype of what `shadow` is of.

    Under create_graph, a second differentiation becomes an error instead of a silent zero.
    """
    gradient = gradient.to(shadow.dtype)
    return _NoSecondDerivative.apply(gradient, shadow) if torch.is_grad_enabled() else gradient


# functions of ours, because the dispatcher records nothing while an op's own derivative is set up
class _Shadow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        refuse_second_derivative(grad)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, shadow: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        refuse_second_derivative(grad)


def refuse_second_derivative(*incoming: Tensor | None) -> None:
    """An error where anything flows back into a gradient that a fused path has computed."""
    if any(x is not None for x in incoming):
        raise RuntimeError(
            "the fused affinity losses have no second derivative; "
            'use backend="reference", which has'
        )
