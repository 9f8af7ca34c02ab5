"""How a graph sees a fused loss: as an op with a fake kernel and an autograd formula.

``torch.compile``, ``torch.export`` and ``torch.func`` take the op, which is opaque to them and
keeps one graph for all batch sizes; eager calls take what :mod:`affkd_kernels.fused` has. Both
compute the gradients in the forward call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .fused import (
    DIFFERENTIABLE,
    NUM_TENSORS,
    no_second_derivative,
    run_loss_and_grad,
    run_row_losses,
    saved_constant,
    shadow_of,
    summed,
    times,
)
from .inputs import Inputs, refuse_tangents
from .kernels.result import Needs
from .spec import LossSpec, decode

NAMESPACE = "affkd_kernels"

_TENSORS = (
    "Tensor student, Tensor teacher, Tensor? student_keys, Tensor? teacher_keys, Tensor? mask, "
    "Tensor? key_mask, Tensor? pair_mask, Tensor? row_weight, Tensor? student_scale, "
    "Tensor? teacher_scale, str spec, str backend, str algorithm"
)

torch.library.define(
    f"{NAMESPACE}::loss_and_grad", f"({_TENSORS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define(f"{NAMESPACE}::row_losses", f"({_TENSORS}) -> Tensor")


@torch.library.impl(f"{NAMESPACE}::loss_and_grad", "CompositeExplicitAutograd")
def _loss_and_grad_impl(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(*args[:NUM_TENSORS])
    refuse_tangents("a fused loss", inputs)
    text, backend, algorithm, needs = args[NUM_TENSORS:]
    result = run_loss_and_grad(decode(text), inputs, Needs(*needs), backend, algorithm)
    empty = result.loss.new_empty
    # a tensor each: the outputs of an op must not alias
    return tuple(empty(0) if x is None else x.contiguous() for x in result)  # type: ignore[return-value]


@torch.library.register_fake(f"{NAMESPACE}::loss_and_grad")
def _loss_and_grad_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, needs = Inputs(*args[:NUM_TENSORS]), args[-1]
    sources = (inputs.student, inputs.student_keys, inputs.student_scale)
    new_empty = inputs.student.new_empty
    gradients = (
        new_empty(source.shape if need and source is not None else (0,), dtype=inputs.dtype)
        for source, need in zip(sources, needs, strict=True)
    )
    return (new_empty((), dtype=inputs.dtype), *gradients)  # type: ignore[return-value]


def _loss_and_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.shadows = [shadow_of(inputs[i]) for i in DIFFERENTIABLE]
    ctx.needs = inputs[-1]


def _loss_and_grad_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    out: list[Tensor | None] = [None] * (NUM_TENSORS + 4)
    if grad_loss is not None:
        saved = zip(DIFFERENTIABLE, ctx.saved_tensors, ctx.shadows, ctx.needs, strict=True)
        for i, gradient, shadow, need in saved:
            if need:
                out[i] = no_second_derivative(gradient * grad_loss, shadow)
    return tuple(out)


torch.library.register_autograd(
    f"{NAMESPACE}::loss_and_grad", _loss_and_grad_backward, setup_context=_loss_and_grad_setup
)


@torch.library.impl(f"{NAMESPACE}::row_losses", "CompositeExplicitAutograd")
def _row_losses_impl(*args: Any) -> Tensor:
    text, backend, algorithm = args[NUM_TENSORS:]
    inputs = Inputs(*args[:NUM_TENSORS])
    refuse_tangents("a fused loss", inputs)
    return run_row_losses(decode(text), inputs, backend, algorithm).contiguous()


@torch.library.register_fake(f"{NAMESPACE}::row_losses")
def _row_losses_fake(*args: Any) -> Tensor:
    inputs = Inputs(*args[:NUM_TENSORS])
    column = decode(args[NUM_TENSORS]).axis == "column"
    rows = inputs.num_keys if column else inputs.student.shape[1]
    return inputs.student.new_empty((inputs.student.shape[0], rows), dtype=inputs.dtype)


def _row_losses_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*map(saved_constant, inputs[:NUM_TENSORS]))
    ctx.shadows = [shadow_of(inputs[i]) for i in DIFFERENTIABLE]
    ctx.plan = inputs[NUM_TENSORS:]


def _row_losses_backward(ctx: Any, grad_rows: Tensor) -> tuple[Any, ...]:
    inputs = Inputs(*ctx.saved_tensors)
    text, backend, algorithm = ctx.plan
    needs = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
    weighted = inputs._replace(row_weight=times(grad_rows, inputs.row_weight))
    _, *gradients = torch.ops.affkd_kernels.loss_and_grad(
        *weighted, summed(decode(text)).encode(), backend, algorithm, needs
    )
    out: list[Tensor | None] = [None] * (NUM_TENSORS + 3)
    for i, gradient, shadow, need in zip(
        DIFFERENTIABLE, gradients, ctx.shadows, needs, strict=True
    ):
        if need:
            out[i] = no_second_derivative(gradient, shadow)
    return tuple(out)


torch.library.register_autograd(
    f"{NAMESPACE}::row_losses", _row_losses_backward, setup_context=_row_losses_setup
)


def call_op(spec: LossSpec, inputs: Inputs, backend: str, algorithm: str) -> Tensor:
    """The loss, or the row losses [N, Q], through the registered ops."""
    constants = (spec.encode(), backend, algorithm)
    if spec.reduction == "none":
        return torch.ops.affkd_kernels.row_losses(*inputs, *constants)
    needs = _needs(inputs)
    return torch.ops.affkd_kernels.loss_and_grad(*inputs, *constants, needs)[0]


def _needs(inputs: Inputs) -> Sequence[bool]:
    grad = torch.is_grad_enabled()
    sources = (inputs[i] for i in DIFFERENTIABLE)
    return [grad and x is not None and x.requires_grad for x in sources]
