"""The factored form over all ranks: moments are summed over them, and no row travels.

The moments of :mod:`affkd_kernels.kernels.factored` are sums over rows, so those of the global
batch are an all-reduce of R x R numbers. With them each rank has the loss and the gradient of its
own rows. Of a self-affinity A is symmetric, and where all rows share alpha and beta so is dL/dA:
dX is twice the gradient of the queries. Else F' diag(alpha) F is a second all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..components import Frobenius, Gram, RowL2, SqEuclidean
from ..dispatch import make_plan
from ..fused import refuse_second_derivative
from ..inputs import Inputs, full_precision
from ..kernels import factored, moments
from ..kernels.factors import Centering, Side, operand_of, without_masked
from ..kernels.result import LossAndGrad, Needs
from ..spec import LossSpec
from .collectives import Shards, all_reduce


def pays(spec: LossSpec, inputs: Inputs, shards: Shards) -> bool:
    """Whether the plan for the global batch is factored, in a form that this module has.

    It depends on nothing that differs between the ranks.
    """
    if spec.reduction == "none" or factored.unsupported(spec, inputs.pair_mask is not None):
        return False
    if isinstance(spec.normalization, Frobenius):
        centered_distances = spec.normalization.center and isinstance(spec.affinity, SqEuclidean)
        if inputs.row_weight is not None or centered_distances:
            return False
    # a plan reads shapes, so one number stands in for the rows that lie elsewhere
    global_rows = (
        x.new_empty(()).expand(1, shards.total, x.shape[2])
        for x in (inputs.student.detach(), inputs.teacher)
    )
    return make_plan(spec, Inputs(*global_rows)).algorithm == "factored"


def loss(spec: LossSpec, inputs: Inputs, shards: Shards) -> Tensor:
    """The loss of the rows of all ranks, for this rank's rows."""
    grad, scale = torch.is_grad_enabled(), inputs.student_scale
    needs = Needs(
        student=grad and inputs.student.requires_grad,
        student_scale=grad and scale is not None and scale.requires_grad,
    )
    return _FactoredLoss.apply(spec, inputs, shards, needs, inputs.student, scale)[0]


class _FactoredLoss(torch.autograd.Function):
    """All communication is in the forward; the backward multiplies.

    The gradients are outputs too, for the reason that `fused.FusedLoss` gives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: LossSpec,
        inputs: Inputs,
        shards: Shards,
        needs: Needs,
        *sources: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        with full_precision(inputs.student.device.type):
            result = _loss_and_grad(spec, inputs, shards, needs)
        gradients = (result.grad_student, result.grad_student_scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in sources]
        ctx.ranks = len(shards.sizes)
        return result.loss, *gradients

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, *grad_gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(*grad_gradients)
        # see collectives.py: averaging over the ranks must give the one gradient
        gradients = (
            None
            if saved is None or grad_loss is None
            else (saved * grad_loss * ctx.ranks).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (None, None, None, None, *gradients)


def _loss_and_grad(spec: LossSpec, inputs: Inputs, shards: Shards, needs: Needs) -> LossAndGrad:
    """This rank's part of the gradients, and the loss of all."""
    items = _valid_items(inputs, shards)
    student, teacher = _sides(spec, inputs, items, shards)
    dtype, products = factored.moment_dtype(inputs), factored.product_dtype(inputs)
    own = moments.key_moments(student, teacher, dtype, products)
    diagonal = None
    if factored.lacks_diagonal(spec):
        diagonal = moments.diagonal_of(student, teacher, 0, dtype)
    everybody = moments.Moments(*_sum_over_ranks(shards, *own))
    call = factored.Call(spec, student, teacher, everybody, products, diagonal)

    partners = (items - 1 if spec.diagonal == "exclude" else items).clamp(min=0)
    count = {"mean": items * partners, "batchmean": items * (partners > 0)}.get(spec.reduction)
    weight = factored.weight_of(spec, inputs, everybody.student)
    if count is not None:
        weight = weight / count.clamp(min=1)
    shared = weight.dim() == 0 and not isinstance(spec.normalization, RowL2)
    terms = _shared_terms if shared else _row_terms
    total, slopes = terms(call, weight, shards, any(needs))
    # not a product: what takes part in nothing may hold NaN
    nothing = items * partners == 0
    total = total.masked_fill(nothing, 0.0).to(inputs.dtype)
    if slopes is None:
        return LossAndGrad(total)
    # with one alpha and beta the mean of dX is 0, so that centering it changes nothing
    gradients = factored.gradients_of(student._replace(centering=None), slopes, needs)
    d_student, _, d_scale = (x if x is None else x.masked_fill(nothing, 0.0) for x in gradients)
    return LossAndGrad(total, d_student, None, None if d_scale is None else d_scale.to(total))


def _shared_terms(
    call: factored.Call, weight: Tensor, shards: Shards, want_products: bool
) -> tuple[Tensor, factored.Products | None]:
    """The loss [] and dX, where all rows share one alpha and beta."""
    spec, student, teacher, everybody, dtype, diagonal = call
    if student.symmetric and diagonal is None:
        sums = moments.matrix_sums(student, teacher, everybody)
    else:
        rows = moments.row_sums(student, teacher, everybody, dtype)
        own = factored.without_diagonal(rows, diagonal).total()
        sums = moments.Sums(*_sum_over_ranks(shards, *own))
    losses, *coefficients = factored.loss_terms(
        spec, sums, weight.expand(1, 1), factored.floors_of(call)
    )
    if not want_products:
        return losses.sum(), None
    alpha, beta = (2 * x.unsqueeze(-1) for x in coefficients)  # [1, 1, 1]
    to_own, to_cross = _maps(call)
    maps = (alpha.to(dtype) * to_own, beta.to(dtype) * to_cross)
    minus = factored.diagonal_part(diagonal, alpha, beta)
    operands = (student.queries, teacher.queries)
    return losses.sum(), (moments.combined(operands, maps, minus=minus), None)


def _row_terms(
    call: factored.Call, weight: Tensor, shards: Shards, want_products: bool
) -> tuple[Tensor, factored.Products | None]:
    """The loss [] and dX, where rows have their own alpha and beta."""
    spec, student, teacher, everybody, dtype, diagonal = call
    sums = moments.row_sums(student, teacher, everybody, dtype)
    sums = factored.without_diagonal(sums, diagonal)
    losses, *coefficients = factored.loss_terms(
        spec, sums, weight.expand(sums.student.shape), (0.0, 0.0)
    )
    if not want_products:
        return next(_sum_over_ranks(shards, losses.sum())), None
    alpha, beta = (x.unsqueeze(-1) for x in coefficients)  # [1, B, 1]
    weights = alpha.to(dtype), beta.to(dtype)
    own = moments.weighted_moments(student, teacher, weights, everybody.student.dtype)
    total, *weighted = _sum_over_ranks(shards, losses.sum(), *own)
    d_own = factored.diagonal_part(diagonal, alpha, beta)
    operands = (student.queries, teacher.queries)
    d_queries = moments.combined(operands, _maps(call), weights, d_own)
    return total, factored.with_keys(call, d_queries, (weighted[0], weighted[1]), d_own)


def _maps(call: factored.Call) -> tuple[Tensor, Tensor]:
    """What carries f_i and t_i to sum_j A_ij k_j of student and teacher, [1, R, Rs]."""
    to_own = call.moments.student * call.student.scale
    to_cross = call.moments.cross.mT * call.teacher.scale
    return to_own.to(call.products), to_cross.to(call.products)


def _valid_items(inputs: Inputs, shards: Shards) -> Tensor:
    """The number of valid rows of all ranks []."""
    if inputs.mask is None:
        return torch.tensor(shards.total, device=inputs.student.device)
    return all_reduce(inputs.mask.sum(), shards.group)


def _sides(spec: LossSpec, inputs: Inputs, items: Tensor, shards: Shards) -> tuple[Side, Side]:
    """The factors of own rows, about the mean of all ranks' where there is one to subtract."""
    affinity, dtype, mask = spec.affinity, inputs.dtype, inputs.mask
    rows = [without_masked(x.detach(), mask, dtype) for x in (inputs.student, inputs.teacher)]
    if isinstance(affinity, SqEuclidean):
        # distances ignore a common offset, and float32 does not
        rows = [
            without_masked(x - m.to(dtype), mask, dtype)
            for x, m in _with_means(rows, items, shards)
        ]
    operands = [operand_of(affinity, x, mask) for x in rows]
    queries = [operand.query_factor() for operand in operands]
    centerings: list[tuple[Centering, Centering] | None] = [None, None]
    if isinstance(spec.normalization, Frobenius) and spec.normalization.center:
        about = [(x, Centering(m, items)) for x, m in _with_means(queries, items, shards)]
        queries = [without_masked(x - c.mean.to(dtype), mask, dtype) for x, c in about]
        centerings = [(c, c) for _, c in about]
    distances = isinstance(affinity, SqEuclidean)
    keys = [o.key_factor() for o in operands] if distances else queries
    scales = _scales(spec, inputs)
    student, teacher = (
        Side(operand, None, f, k, scale, centering)
        for operand, f, k, scale, centering in zip(
            operands, queries, keys, scales, centerings, strict=True
        )
    )
    return student, teacher


def _scales(spec: LossSpec, inputs: Inputs) -> list[Tensor | float]:
    affinity = spec.affinity
    if not isinstance(affinity, Gram):
        return [1.0, 1.0]
    sides = (
        ("student", inputs.student, inputs.student_scale),
        ("teacher", inputs.teacher, inputs.teacher_scale),
    )
    return [
        affinity.scale_of(side, x.shape[-1]) if scale is None else scale.detach()
        for side, x, scale in sides
    ]


def _with_means(xs: list[Tensor], items: Tensor, shards: Shards) -> Iterator[tuple[Tensor, Tensor]]:
    """Each x [1, B, R], 0 where masked, with the mean of all ranks' valid rows [1, 1, R]."""
    own = [x.sum(1, keepdim=True, dtype=torch.float64) for x in xs]
    for x, total in zip(xs, _sum_over_ranks(shards, *own), strict=True):
        yield x, total / items.clamp(min=1)


def _sum_over_ranks(shards: Shards, *own: Tensor) -> Iterator[Tensor]:
    """The sums over the ranks of some tensors of one dtype, as one message."""
    packed = all_reduce(torch.cat([x.flatten() for x in own]), shards.group)
    parts = packed.split([x.numel() for x in own])
    return (part.reshape(x.shape) for part, x in zip(parts, own, strict=True))
