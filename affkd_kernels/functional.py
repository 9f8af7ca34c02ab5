"""The functional face: :func:`affinity_loss` and its two companions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fused, ops, reference
from .components import Affinity, Loss, Normalization
from .dispatch import (
    Plan,
    fused_missing,
    in_functorch,
    make_plan,
    num_threads,
    reference_only,
)
from .inputs import Inputs, canonical_inputs, has_tangent, to_items
from .kernels.result import PlainCall
from .spec import LossSpec, make_spec, traced_spec

# the arguments of a call that hold tensors, in the order of `Inputs`
PER_CALL = (
    "student_keys",
    "teacher_keys",
    "mask",
    "key_mask",
    "pair_mask",
    "row_weight",
    "student_scale",
    "teacher_scale",
)

_MAX_PLANS = 4096
# validated calls without per-call options: metadata -> plan, and the call with all decided where
# there is one; never keyed by data or identity
_plans: dict[tuple[Any, ...], tuple[Plan, PlainCall | None]] = {}


def affinity_loss(
    student: Tensor,
    teacher: Tensor,
    affinity: Affinity | str = "gram",
    normalization: Normalization | str = "none",
    loss: Loss | str = "mse",
    *,
    reduction: str = "mean",
    weight: float = 1.0,
    items: str = "samples",
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    pair_mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    diagonal: str = "keep",
    diagonal_offset: int | None = None,
    student_keys: Tensor | None = None,
    teacher_keys: Tensor | None = None,
    student_scale: Tensor | float | None = None,
    teacher_scale: Tensor | float | None = None,
    process_group: Any = None,
    detach_teacher: bool = True,
    backend: str = "auto",
    algorithm: str = "auto",
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """How differently student and teacher relate the same items to each other.

    The loss is a triple *affinity x normalization x loss* after Li & Maki, "Towards a Unified View
    of Affinity-Based Knowledge Distillation" (arXiv 2209.15555).

    Args:
        student: features of the items, float16, bfloat16, float32 or float64, shaped after
            ``items``. Any strides.
        teacher: features of the same items in the same order; its feature length and dtype may
            differ. A constant, unless ``detach_teacher=False``.
        affinity: a component or its shorthand, such as ``"rbf(gamma=0.4)"``; likewise
            ``normalization`` and ``loss``.
        reduction: ``"mean"`` over the pairs that take part, ``"batchmean"`` over the rows that have
            one, ``"matrixmean"`` over the matrices, ``"sum"``, or ``"none"``, the row losses.
        weight: multiplies the result.
        items: ``"samples"`` [B, ...], ``"tokens"`` [..., L, D] (one L x L affinity each),
            ``"pixels"`` [N, C, H, W] (H*W items of length C), or ``"channels"`` [N, C, H, W] (C
            items of length H*W).
        mask: [..., Q] bool, True = valid. A masked item takes part in nothing, and its gradient is
            exactly 0. A size may be 1.
        key_mask: [..., K] bool, for keys.
        pair_mask: [..., Q, K] bool, True = the pair takes part.
        row_weight: [..., Q], multiplies each row's loss ([..., K] for a softmax over columns).
        diagonal: ``"keep"``, ``"zero"`` (A_ii := 0), or ``"exclude"`` (takes part in nothing).
        diagonal_offset: with keys, row i's own key is i + offset; None: there is no diagonal.
        student_keys, teacher_keys: shaped as the features, with K items in place of Q: a
            cross-affinity. They get a gradient where they require one.
        student_scale, teacher_scale: numbers or 0-dim tensors in place of the Gram affinity's
            scale; the student's gets a gradient.
        process_group: every rank passes its own rows (possibly none) and gets the loss of all
            ranks' rows; averaging gradients over the ranks, as DDP and FSDP do, then gives the
            gradient of one process. See docs/distributed.md for keys and masks.
        detach_teacher: False lets the teacher have a gradient too (on the reference path).
        backend: ``"auto"``, ``"reference"``, ``"torch"`` (the factored form), ``"cpp"`` or
            ``"triton"``.
        algorithm: ``"auto"``, ``"dense"``, ``"tiled"`` or ``"factored"``.
        max_workspace_bytes: what an algorithm may hold besides its inputs and gradients.

    Returns:
        A 0-dim tensor, float64 if any feature is float64, else float32; for ``reduction="none"``
        the row losses [..., Q].

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, or an invalid triple;
            the text names the argument, what came and what is valid.
        RuntimeError: a backend or algorithm asked for by name is not usable here.
    """
    # a weight that changes from step to step must not become a constant of a compiled graph
    compiling = torch.compiler.is_compiling()
    resolve, factor = (traced_spec, 1.0) if compiling else (make_spec, weight)
    spec = resolve(
        affinity,
        normalization,
        loss,
        reduction=reduction,
        weight=factor,
        items=items,
        diagonal=diagonal,
        diagonal_offset=diagonal_offset,
        detach_teacher=detach_teacher,
        backend=backend,
        algorithm=algorithm,
        max_workspace_bytes=max_workspace_bytes,
    )
    value = evaluate(
        spec,
        student,
        teacher,
        student_keys,
        teacher_keys,
        mask,
        key_mask,
        pair_mask,
        row_weight,
        student_scale,
        teacher_scale,
        process_group=process_group,
    )
    return value * weight if compiling else value


def evaluate(
    spec: LossSpec,
    student: Tensor,
    teacher: Tensor,
    student_keys: Tensor | None = None,
    teacher_keys: Tensor | None = None,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    pair_mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    student_scale: Tensor | float | None = None,
    teacher_scale: Tensor | float | None = None,
    *,
    process_group: Any = None,
) -> Tensor:
    """:func:`affinity_loss` for a validated spec."""
    tensors = (
        student,
        teacher,
        student_keys,
        teacher_keys,
        mask,
        key_mask,
        pair_mask,
        row_weight,
        student_scale,
        teacher_scale,
    )
    if process_group is not None:
        # torch may be built without what this imports
        from . import distributed

        return distributed.evaluate(spec, process_group, tensors)
    if torch.compiler.is_compiling() or in_functorch() or has_tangent(tensors):
        return _evaluate_in_graph(spec, tensors)
    plan, plain_call = _eager_plan(spec, tensors)
    if plain_call is not None:
        return fused.plain_loss(plain_call, student, teacher)
    if plan.backend == "reference":
        return reference.evaluate(spec, *canonical_inputs(spec, *tensors))
    if not torch.is_grad_enabled():
        return fused.without_gradient(spec, plan.backend, plan.algorithm, tensors)
    arguments = (spec, plan.backend, plan.algorithm, *_constants_detached(tensors))
    if spec.reduction == "none":
        return fused.FusedRowLosses.apply(*arguments)
    return fused.FusedLoss.apply(*arguments)[0]


def _evaluate_in_graph(spec: LossSpec, tensors: tuple[Any, ...]) -> Tensor:
    if spec.detach_teacher:
        tensors = _constants_detached(tensors)
    inputs, rows_shape = canonical_inputs(spec, *tensors)
    if reference_only(spec, inputs) is None and (spec.backend, spec.algorithm) == ("auto", "auto"):
        # leave the choice to the call, which knows the sizes: the graph serves them all
        backend = algorithm = "auto"
        if fused_missing(inputs.student.device.type) is not None:
            backend, algorithm, _ = make_plan(spec, inputs)
    else:
        backend, algorithm, _ = make_plan(spec, inputs)
    if backend == "reference":
        return reference.evaluate(spec, inputs, rows_shape)
    result = ops.call_op(spec, inputs, backend, algorithm)
    return result.reshape(rows_shape) if spec.reduction == "none" else result


def _eager_plan(spec: LossSpec, tensors: tuple[Any, ...]) -> tuple[Plan, PlainCall | None]:
    student, teacher = tensors[0], tensors[1]
    if tensors[2:] != _NO_OPTIONS or type(student) is not Tensor or type(teacher) is not Tensor:
        return make_plan(spec, canonical_inputs(spec, *tensors)[0]), None
    key = (
        spec,
        student.shape,
        teacher.shape,
        student.dtype,
        teacher.dtype,
        student.layout,
        teacher.layout,
        student.device,
        teacher.device,
        num_threads(),
    )
    known = _plans.get(key)
    if known is None:
        inputs = canonical_inputs(spec, *tensors)[0]
        plan = make_plan(spec, inputs)
        plain_call = None
        if plan.backend != "reference":
            plain_call = fused.plain_call(spec, inputs, student, teacher, *plan[:2])
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        known = _plans[key] = (plan, plain_call)
    return known


_NO_OPTIONS = (None,) * len(PER_CALL)


def _constants_detached(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The teacher is a constant: else its requires_grad or its tangent would reach the loss."""
    constants = [tensors[i] for i in _TEACHER]
    differentiated = any(isinstance(x, Tensor) and x.requires_grad for x in constants)
    if not differentiated and not has_tangent(constants):
        return tensors
    return tuple(
        x.detach() if i in _TEACHER and isinstance(x, Tensor) else x for i, x in enumerate(tensors)
    )


_TEACHER = [i for i, field in enumerate(Inputs._fields) if field.startswith("teacher")]


def affinity_matrix(
    x: Tensor,
    affinity: Affinity | str = "gram",
    normalization: Normalization | str = "none",
    keys: Tensor | None = None,
    *,
    items: str = "samples",
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    diagonal: str = "keep",
    diagonal_offset: int | None = None,
) -> Tensor:
    """The normalized affinity matrix itself, to look at: [..., Q, K], differentiable.

    Arguments as in :func:`affinity_loss`, for one network; a component with options per side uses
    the student's. Entries that take no part are 0. Holds the whole matrix.
    """
    to_items("x", x, items)
    spec = make_spec(
        affinity,
        normalization,
        "mse",
        items=items,
        diagonal=diagonal,
        diagonal_offset=diagonal_offset,
    )
    if spec.axis == "both":
        raise ValueError("axis='both' has no one matrix; valid: axis='row', axis='column'")
    inputs, rows_shape = canonical_inputs(spec, x, x.detach(), keys, keys, mask, key_mask)
    matrix = reference.normalized_affinity(spec, inputs)
    lead = rows_shape[:-1]
    return matrix.reshape(*lead, *matrix.shape[1:])


def explain_plan(
    student: Tensor,
    teacher: Tensor,
    affinity: Affinity | str = "gram",
    normalization: Normalization | str = "none",
    loss: Loss | str = "mse",
    **options: Any,
) -> Plan:
    """Which backend and algorithm :func:`affinity_loss` would run for these arguments, and why."""
    per_call = {name: options.pop(name) for name in PER_CALL if name in options}
    options.pop("process_group", None)
    spec = make_spec(affinity, normalization, loss, **options)
    return make_plan(spec, canonical_inputs(spec, student, teacher, **per_call)[0])
