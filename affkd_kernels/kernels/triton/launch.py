"""The entry points: loss and gradients, or row losses, of canonical inputs."""

from __future__ import annotations

import dataclasses
import functools

from torch import Tensor

from ...inputs import Inputs
from ...spec import LossSpec
from ..result import LossAndGrad, Needs
from . import panels, stash
from .call import Call
from .plan import Form, make_plan, on_device


def loss_and_grad(spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str) -> LossAndGrad:
    """The loss and the gradients that ``needs`` asks for; see the package's own docstring."""
    if spec.axis == "row":
        return _one_direction(spec, inputs, needs, algorithm, 1.0)
    if spec.axis == "column":
        return _other_direction(spec, inputs, needs, algorithm, 1.0)
    by_row = _one_direction(spec, inputs, needs, algorithm, 0.5)
    by_column = _other_direction(spec, inputs, needs, algorithm, 0.5)
    return by_row.plus(by_column)


def row_losses(spec: LossSpec, inputs: Inputs, algorithm: str) -> Tensor:
    """The weighted row losses [N, Q], or [N, K] of a softmax over columns; no gradients."""
    if spec.axis == "column" and inputs.student_keys is not None:
        spec, inputs = _exchanged(spec), inputs.exchanged()
    plan = make_plan(Form.of(spec, inputs, None, algorithm, 1.0))
    with on_device(plan.form.device):
        if plan.replay is not None:
            (again,) = plan.replay(inputs)
            assert again is not None
            return again
        call = Call(plan, inputs)
        if plan.stashed:
            rows = stash.row_losses(call)
        else:
            call.statistics()
            rows, _ = call.losses()
        call.finished(rows)
        return rows


def _one_direction(
    spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str, factor: float
) -> LossAndGrad:
    plan = make_plan(Form.of(spec, inputs, needs, algorithm, factor))
    with on_device(plan.form.device):
        if plan.replay is not None:
            return LossAndGrad(*plan.replay(inputs))  # type: ignore[arg-type]
        call = Call(plan, inputs)
        result = compute(call, needs)
        call.finished(*result)
        return result


def compute(call: Call, needs: Needs) -> LossAndGrad:
    """All launches of a call from its pairs on."""
    if call.plan.stashed:
        return stash.loss_and_grad(call, needs)
    if any(needs):
        return panels.loss_and_grad(call, needs)
    call.statistics()
    return LossAndGrad(call.losses()[1][0])


def _other_direction(
    spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str, factor: float
) -> LossAndGrad:
    """The row form of A': queries and keys trade places, and so do their gradients."""
    if inputs.student_keys is None:
        return _one_direction(spec, inputs, needs, algorithm, factor)
    spec, inputs, needs = _exchanged(spec), inputs.exchanged(), needs.exchanged()
    return _one_direction(spec, inputs, needs, algorithm, factor).exchanged()


@functools.lru_cache(maxsize=128)
def _exchanged(spec: LossSpec) -> LossSpec:
    """The spec of A', whose diagonal lies on the other side."""
    if not spec.diagonal_offset:
        return spec
    return dataclasses.replace(spec, diagonal_offset=-spec.diagonal_offset)
