"""RKD's angle-wise loss (Park et al., "Relational Knowledge Distillation", CVPR 2019).

An angle is a potential of three items, so it is no affinity matrix; it has an op of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from .dispatch import in_functorch
from .fused import no_second_derivative, shadow_of
from .inputs import Inputs, canonical_inputs, has_tangent, refuse_tangents
from .kernels.angle import COINCIDENT, angle_sum
from .spec import ITEMS, LossSpec, make_spec

__all__ = ["RKDAngleLoss", "rkd_angle_loss"]

REDUCTIONS = ("mean", "batchmean", "matrixmean", "sum")
BACKENDS = ("auto", "reference")
# all that the input contract asks of a triple is how to read the layout
_LAYOUTS = {
    (items, detach): make_spec("euclidean", "none", "mse", items=items, detach_teacher=detach)
    for items in ITEMS
    for detach in (True, False)
}


def rkd_angle_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    reduction: str = "mean",
    weight: float = 1.0,
    items: str = "samples",
    mask: Tensor | None = None,
    process_group: Any = None,
    detach_teacher: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Match the angles that all triples of items form.

    With vertex j, e_ij = (x_i - x_j) / |x_i - x_j| (0 where the two coincide) and psi_ijk =
    e_ij . e_kj, the loss is smooth_l1(psi_s, psi_t) over all (i, j, k), the degenerate ones
    included: their psi is 0 or 1 on both sides.

    The loss and its gradient come from one sweep over the vertices; neither [L, L, D] nor [L, L, L]
    is stored. Two items coincide where their distance is at most 1e-12, or (outside the reference)
    so small next to their norms, about 1e-7, that a float64 Gram matrix cannot tell it from 0;
    they then exert no force on each other.

    Args:
        student, teacher: the same items in the same order, in the layout `items` names; any
            floating dtypes, any two feature lengths.
        beta: where smooth L1 turns from square to linear; 0 gives L1.
        reduction: `"mean"` over the valid triples of all matrices together, `"batchmean"` over
            their vertices, `"matrixmean"` over the matrices, or `"sum"`.
        weight: multiplies the result. Published: 50 in classification, 2 in metric learning.
        items: `"samples"` [B, ...], `"tokens"` [..., L, D], `"pixels"` or `"channels"`
            [N, C, H, W], as in `affinity_loss`.
        mask: [..., L] bool, True = valid. A masked item is in no triple and gets gradient 0.
        process_group: the ranks whose items make one batch, as in `affinity_loss`. Each rank
            computes all angles of `"samples"`.
        detach_teacher: False lets the teacher have a gradient; the reference then computes it.
        backend: `"auto"`, or `"reference"` for the literal eager form, which is differentiable
            twice and stores [L, L, D] and [L, L, L]. Under a `torch.func` transform, and for
            features with a forward-mode tangent, it is taken anyway.

    Returns:
        A 0-dim tensor, float64 if an input is, else float32. 0.0 where there is no item. It is not
        finite where a valid item is not.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is valid.
        RuntimeError: in a second derivative of the `"auto"` path.
    """
    _check_options(beta, reduction, weight, items, detach_teacher, backend)
    layout = _LAYOUTS[(items, detach_teacher)]
    inputs = _inputs(layout, process_group, student, teacher, mask)
    x, y, valid = inputs.student, inputs.teacher, inputs.mask
    y = y.detach() if detach_teacher else y
    transformed = in_functorch() or has_tangent((x, y))
    if backend == "reference" or not detach_teacher or transformed:
        total = _reference_sum(x, y, valid, beta)
    else:
        need_gradient = torch.is_grad_enabled() and x.requires_grad
        total, _ = _angle_op(x, y, valid, beta, need_gradient)
    count = _count(reduction, x, valid)
    if process_group is not None and items != "samples":
        from . import distributed

        return weight * distributed.mean_over_ranks(total, count, process_group)
    return weight * total / (max(count, 1) if isinstance(count, int) else count.clamp(min=1))


def _inputs(
    layout: LossSpec, process_group: Any, student: Tensor, teacher: Tensor, mask: Tensor | None
) -> Inputs:
    """The canonical items: those of all ranks where they make one matrix."""
    if process_group is None or layout.items != "samples":
        return canonical_inputs(layout, student, teacher, mask=mask)[0]
    from . import distributed

    call = Inputs(student, teacher, mask=mask)
    return distributed.rows_of_all_ranks(layout, process_group, call)


class RKDAngleLoss(_Loss):
    """Module form of :func:`rkd_angle_loss`; no parameters, no buffers.

    `forward(student, teacher, mask=None)`. The arguments are those of the function.
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        reduction: str = "mean",
        weight: float = 1.0,
        items: str = "samples",
        process_group: Any = None,
        detach_teacher: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_options(beta, reduction, weight, items, detach_teacher, backend)
        self.beta = beta
        self.reduction = reduction
        self.weight = weight
        self.items = items
        self.process_group = process_group
        self.detach_teacher = detach_teacher
        self.backend = backend

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of student and teacher features, with an optional mask of valid items."""
        return rkd_angle_loss(
            student,
            teacher,
            beta=self.beta,
            reduction=self.reduction,
            weight=self.weight,
            items=self.items,
            mask=mask,
            process_group=self.process_group,
            detach_teacher=self.detach_teacher,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        options = f"beta={self.beta!r}, reduction={self.reduction!r}, weight={self.weight!r}"
        return options if self.items == "samples" else f"{options}, items={self.items!r}"


def _check_options(
    beta: float, reduction: str, weight: float, items: str, detach_teacher: bool, backend: str
) -> None:
    for name, value, choices in (
        ("reduction", reduction, REDUCTIONS),
        ("items", items, ITEMS),
        ("backend", backend, BACKENDS),
        ("detach_teacher", detach_teacher, (True, False)),
    ):
        if value not in choices:
            valid = ", ".join(map(repr, choices))
            raise ValueError(f"{name} must be one of {valid} for the angle loss, got {value!r}")
    for name, number in (("beta", beta), ("weight", weight)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(number).__name__}")
        # math.isfinite cannot be traced into a graph
        if not abs(number) < math.inf:
            raise ValueError(f"{name} must be finite, got {number}")
    if beta < 0:
        raise ValueError(f"beta must be >= 0, got {beta}")


def _count(reduction: str, x: Tensor, mask: Tensor | None) -> int | Tensor:
    """What the reduction divides by; 0 divides by nothing."""
    matrices, length = x.shape[:2]
    if reduction == "sum":
        return 0
    if reduction == "matrixmean":
        return matrices
    power = 3 if reduction == "mean" else 1
    if mask is None:
        return matrices * length**power
    return (mask.sum(1) ** power).sum()


def _reference_sum(student: Tensor, teacher: Tensor, mask: Tensor | None, beta: float) -> Tensor:
    """The definition, as literally as autograd allows."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        psi_s, psi_t = (_reference_angles(x.to(dtype), mask) for x in (student, teacher))
        return torch.nn.functional.smooth_l1_loss(psi_s, psi_t, reduction="sum", beta=beta)


def _reference_angles(x: Tensor, mask: Tensor | None) -> Tensor:
    """[N, L, D] to psi [N, L, L, L], the vertex first; 0 for triples with a masked item."""
    if mask is not None:
        x = torch.where(mask.unsqueeze(2), x, 0)
    difference = x.unsqueeze(2) - x.unsqueeze(1)  # [N, i, j, D]
    squared = difference.square().sum(-1, keepdim=True)
    nothing = squared <= COINCIDENT**2
    if mask is not None:
        nothing = nothing | ~(mask.unsqueeze(2) & mask.unsqueeze(1)).unsqueeze(3)
    # the inner masked_fill keeps an infinite derivative of the root out of the product with 0, and
    # a square that overflowed would give a plausible angle of 0
    distance = squared.masked_fill(nothing, 1).sqrt()
    distance = distance.masked_fill(distance.isinf(), math.nan)
    unit = torch.where(nothing, 0, difference / distance)
    return torch.einsum("nijd,nkjd->njik", unit, unit)


@torch.library.custom_op("affkd_kernels::rkd_angle", mutates_args=())
def _angle_op(
    student: Tensor, teacher: Tensor, mask: Tensor | None, beta: float, need_gradient: bool
) -> tuple[Tensor, Tensor]:
    refuse_tangents("the fused angle loss", (student, teacher))
    return angle_sum(student, teacher, mask, beta, need_gradient)


@_angle_op.register_fake
def _(
    student: Tensor, teacher: Tensor, mask: Tensor | None, beta: float, need_gradient: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    total = student.new_empty((), dtype=dtype)
    return total, student.new_empty(student.shape if need_gradient else 0, dtype=dtype)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.shadow = shadow_of(inputs[0])


def _angle_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    # in the wider dtype until here, so that a small weight or count flushes nothing to zero
    return no_second_derivative(grad * gradient, ctx.shadow), None, None, None, None


_angle_op.register_autograd(_angle_backward, setup_context=_save_gradient)
