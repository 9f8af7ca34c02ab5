r"""Exact losses that never form a pair: O(B D^2) time, O(B D + D^2) memory, on any device.

Where the affinity is linear in the inner product, ``A = scale * F K'`` with factors F [Q, R] and
K [K, R] of small rank R: D for gram and cosine, D + 1 for the shifted cosine ([u, 1] / sqrt 2) and
D + 2 for squared distances ([n, 1, -2x] . [1, n, x]). With the mean squared error, everything
follows from R x R moments of the keys (subscripts s, t: student and teacher)::

    sum_j A_s,ij^2        = f_i (K_s' K_s) f_i'
    sum_j A_t,ij^2        = t_i (K_t' K_t) t_i'
    sum_j A_s,ij A_t,ij   = f_i (K_s' K_t) t_i'

For each normalization ``dL/dA = alpha_i A_s + beta_i A_t``, alpha and beta made of these sums, and

    dF_i = alpha_i f_i (K_s' K_s) + beta_i t_i (K_t' K_s)
    dK_j = k_j (F_s' diag(alpha) F_s) + kt_j (F_t' diag(beta) F_s)

A self-affinity has F = K = X (up to the scale) and dX = dF + dK.

**Precision.** Near convergence all of these sums cancel. They are therefore taken in float64, by
chunks of rows, and rounded at the end; what is left is the rounding of the factors themselves. On
a GPU with few float64 units, and on any where float32 products may be less exact
(``torch.set_float32_matmul_precision``), the products over rows are float32 ones, and float64 only
sums them up: there the loss loses digits once student and teacher agree to better than 1 %, and
``algorithm="tiled"`` or the reference is the exact way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..components import MSE, Cosine, Frobenius, Gram, NoNormalization, RowL2, SqEuclidean
from ..inputs import Inputs
from ..spec import LossSpec
from .counts import Counts
from .factors import Side, factorize
from .moments import (
    Diagonal,
    Moments,
    Sums,
    add_product,
    combined,
    diagonal_of,
    key_moments,
    matrix_sums,
    row_chunks,
    row_sums,
    shifted,
    weighted_moments,
    zero_moments,
)
from .precision import float32_precision
from .result import LossAndGrad, Needs

# compute capabilities whose float64 products cost about twice a float32 one, not 32 or 64 times
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def unsupported(spec: LossSpec, has_pair_mask: bool) -> str | None:
    """Why the factored form does not exist for this call, or None where it does."""
    if not isinstance(spec.affinity, (Gram, Cosine, SqEuclidean)):
        return f"affinity {spec.affinity.name!r} is not linear in the inner product"
    if spec.affinity.clamp_min is not None:
        return "clamp_min is not linear in the inner product"
    if not isinstance(spec.normalization, (NoNormalization, RowL2, Frobenius)):
        return f"normalization {spec.normalization.name!r} has no closed form"
    if not isinstance(spec.loss, MSE):
        return f"loss {spec.loss.name!r} has no closed form"
    if has_pair_mask:
        return "a pair_mask needs the pairs"
    if lacks_diagonal(spec) and spec.whole_matrix:
        return "a diagonal of zeros under centering has no closed form"
    return None


def lacks_diagonal(spec: LossSpec) -> bool:
    """Whether A_ii counts as 0 or not at all, where the product of the factors has a value.

    An item's distance to its own key is 0 even if the two tensors do not agree on it.
    """
    own_distance = isinstance(spec.affinity, SqEuclidean) and spec.diagonal_offset is not None
    return spec.diagonal != "keep" or own_distance


class Call(NamedTuple):
    """What every step of one call reads."""

    spec: LossSpec
    student: Side
    teacher: Side
    moments: Moments
    products: torch.dtype
    diagonal: Diagonal | None

    @staticmethod
    def of(spec: LossSpec, inputs: Inputs) -> Call:
        student, teacher = factorize(spec, inputs)
        products = product_dtype(inputs)
        moments = key_moments(student, teacher, moment_dtype(inputs), products)
        diagonal = None
        if lacks_diagonal(spec):
            offset = spec.diagonal_offset or 0
            diagonal = diagonal_of(student, teacher, offset, moments.student.dtype)
        return Call(spec, student, teacher, moments, products, diagonal)


# dF and dK [N, rows, R], both still without the factor scale_s; dK None: dF holds it as well
Products = tuple[Tensor, "Tensor | None"]


def loss_and_grad(spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str) -> LossAndGrad:
    """The loss, and the gradients that ``needs`` asks for; see the module's formulas."""
    call = Call.of(spec, inputs)
    counts = Counts.of(spec, inputs)
    moment = call.moments.student
    weight = weight_of(spec, inputs, moment) * counts.reciprocal(spec.reduction, moment)
    one_statistic = isinstance(spec.normalization, Frobenius)
    none_needed = isinstance(spec.normalization, NoNormalization) and weight.dim() == 0
    if one_statistic or (none_needed and call.student.symmetric):
        losses, products = _sums_then_products(call, weight, any(needs))
    else:
        losses, products = _row_by_row(call, weight, any(needs))
    per_row = losses.shape[1] == inputs.student.shape[1]
    loss = counts.zero_without_pairs(losses, per_row).sum().to(inputs.dtype)
    if products is None:
        return LossAndGrad(loss)
    d_student, d_keys, d_scale = gradients_of(call.student, products, needs)
    if d_student is not None:
        d_student = counts.zero_without_pairs(d_student, per_row=True)
    if d_keys is not None:
        d_keys = counts.zero_without_pairs(d_keys, per_row=False)
    return LossAndGrad(loss, d_student, d_keys, None if d_scale is None else d_scale.to(loss))


def row_losses(spec: LossSpec, inputs: Inputs, algorithm: str) -> Tensor:
    """The row losses r_i [N, Q], in the computation dtype."""
    call = Call.of(spec, inputs)
    sums = row_sums(call.student, call.teacher, call.moments, call.products)
    sums = without_diagonal(sums, call.diagonal)
    weight = weight_of(spec, inputs, call.moments.student).expand_as(sums.student)
    rows, _, _ = loss_terms(spec, sums, weight, floors_of(call))
    return Counts.of(spec, inputs).zero_without_pairs(rows, per_row=True).to(inputs.dtype)


def moment_dtype(inputs: Inputs) -> torch.dtype:
    """Of moments and of sums over pairs."""
    # what has no float64 at all is no CPU and no CUDA device
    return torch.float64 if inputs.student.device.type in ("cpu", "cuda") else inputs.dtype


def product_dtype(inputs: Inputs) -> torch.dtype:
    """Of products over rows: float32 where float64 is slow, or nobody asked for as much."""
    device = inputs.student.device
    if device.type != "cuda" or inputs.dtype == torch.float64:
        return moment_dtype(inputs)
    fast = torch.cuda.get_device_capability(device) in _FAST_FLOAT64
    return torch.float64 if fast and float32_precision() == "ieee" else torch.float32


def weight_of(spec: LossSpec, inputs: Inputs, like: Tensor) -> Tensor:
    """What multiplies each row's sum of squares, [] or [N, Q], but for the reduction's count."""
    if inputs.row_weight is None:
        return torch.full((), spec.weight, dtype=like.dtype, device=like.device)
    weight = spec.weight * inputs.row_weight.to(like.dtype)
    return weight if inputs.mask is None else weight.masked_fill(~inputs.mask, 0.0)


def _sums_then_products(
    call: Call, weight: Tensor, want_products: bool
) -> tuple[Tensor, Products | None]:
    """Where rows share alpha and beta: all sums first, from the moments alone if F = K."""
    student, teacher, moments = call.student, call.teacher, call.moments
    if weight.dim() == 0 and student.symmetric:
        sums = matrix_sums(student, teacher, moments)
    else:
        sums = row_sums(student, teacher, moments, call.products)
    sums = without_diagonal(sums, call.diagonal)
    losses, *coefficients = loss_terms(
        call.spec, sums, weight.expand_as(sums.student), floors_of(call)
    )
    if not want_products:
        return losses, None
    alpha, beta = (x.unsqueeze(-1) for x in coefficients)  # [N, Q or 1, 1]
    # carry f_i and t_i to sum_j A_ij k_j of student and teacher, [N, R, Rs]
    to_own = (moments.student * student.scale).to(call.products)
    to_cross = (moments.cross.mT * teacher.scale).to(call.products)
    operands = (student.queries, teacher.queries)
    d_own = diagonal_part(call.diagonal, alpha, beta)
    if alpha.shape[1] == 1 and student.symmetric:
        # one alpha and beta for a symmetric A: dL/dA is symmetric, and dK = dF
        minus = None if d_own is None else (2 * d_own[0], d_own[1])
        maps = (2 * alpha.to(to_own) * to_own, 2 * beta.to(to_own) * to_cross)
        return losses, (combined(operands, maps, minus=minus), None)
    shape = (*student.queries.shape[:2], 1)
    weights = alpha.to(to_own).expand(shape), beta.to(to_own).expand(shape)
    d_queries = combined(operands, (to_own, to_cross), weights, d_own)
    weighted = weighted_moments(student, teacher, weights, moments.student.dtype)
    return losses, with_keys(call, d_queries, weighted, d_own)


def _row_by_row(call: Call, weight: Tensor, want_products: bool) -> tuple[Tensor, Products | None]:
    """Where each row has its own alpha and beta: sums, coefficients and dF in one sweep."""
    student, teacher = call.student, call.teacher
    shape = student.queries.shape[:2]
    weight = weight.expand(shape)
    losses, alpha, beta = (call.moments.student.new_empty(shape) for _ in range(3))
    d_queries = torch.empty_like(student.queries) if want_products else None
    own, cross = zero_moments(call.moments)
    for chunk in row_chunks(student, teacher, call.moments, call.products):
        rows = chunk.rows
        diagonal = None if call.diagonal is None else call.diagonal.of(rows)
        sums = without_diagonal(chunk.sums, diagonal)
        losses[:, rows], a, b = loss_terms(call.spec, sums, weight[:, rows], (0.0, 0.0))
        if d_queries is None:
            continue
        alpha[:, rows], beta[:, rows] = a, b
        a, b = (x.to(chunk.own).unsqueeze(-1) for x in (a, b))
        part = a * student.scale * chunk.own + b * teacher.scale * chunk.cross
        d_own = diagonal_part(diagonal, a, b)
        d_queries[:, rows] = part if d_own is None else part - d_own[0] * d_own[1]
        add_product(own, (chunk.student * a).mT, chunk.student)
        add_product(cross, (chunk.teacher * b).mT, chunk.student)
    if d_queries is None:
        return losses, None
    d_own = diagonal_part(call.diagonal, alpha.unsqueeze(-1), beta.unsqueeze(-1))
    weighted = (own * student.scale, cross * teacher.scale)
    return losses, with_keys(call, d_queries, weighted, d_own)


def diagonal_part(
    diagonal: Diagonal | None, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor] | None:
    """dL/dA_ii [N, Q, 1], which the moments hold and the loss does not, and its keys [N, Q, R]."""
    if diagonal is None:
        return None
    d_own = alpha * diagonal.student.unsqueeze(-1) + beta * diagonal.teacher.unsqueeze(-1)
    return d_own, diagonal.keys


def with_keys(
    call: Call,
    d_queries: Tensor,
    weighted: tuple[Tensor, Tensor],
    d_own: tuple[Tensor, Tensor] | None,
) -> Products:
    """Add dK: to dF where F = K, else beside it."""
    student, diagonal = call.student, call.diagonal
    minus = None
    if diagonal is not None and d_own is not None:
        # row j's own query is j - offset
        length = student.keys.shape[1]
        minus = (
            shifted(d_own[0], -diagonal.offset, length),
            shifted(student.queries, -diagonal.offset, length),
        )
    own, cross = (x.to(call.products) for x in weighted)
    d_keys = combined((student.keys, call.teacher.keys), (own, cross), minus=minus)
    return (d_queries.add_(d_keys), None) if student.symmetric else (d_queries, d_keys)


def without_diagonal(sums: Sums, diagonal: Diagonal | None) -> Sums:
    """Take the diagonal out of the sums; "zero" and "exclude" differ in the counts alone."""
    if diagonal is None:
        return sums
    own, other = diagonal.student, diagonal.teacher
    parts = Sums(own.square(), other.square(), own * other)
    if sums.student.shape[1] == 1:
        parts = parts.total()
    return Sums(
        _remainder(sums.student, parts.student),
        _remainder(sums.teacher, parts.teacher),
        sums.cross - parts.cross,
    )


def _remainder(total: Tensor, part: Tensor) -> Tensor:
    """total - part for sums of squares, and exactly 0 where only rounding is left."""
    rest = total - part
    return rest.masked_fill(rest <= 8 * torch.finfo(total.dtype).eps * total, 0.0)


def floors_of(call: Call) -> tuple[Tensor | float, Tensor | float]:
    """The norm up to which each side's centered matrix counts as zero."""
    normalization = call.spec.normalization
    if not (isinstance(normalization, Frobenius) and normalization.center):
        return 0.0, 0.0
    return (
        call.student.centering_floor(call.moments.student),
        call.teacher.centering_floor(call.moments.teacher),
    )


def loss_terms(
    spec: LossSpec, sums: Sums, weight: Tensor, floors: tuple[Tensor | float, Tensor | float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted losses per row (or per matrix), and the alpha and beta of dL/dA, [N, Q or 1]."""
    normalization = spec.normalization
    if isinstance(normalization, NoNormalization):
        # rounding must not make a sum of squares negative
        losses = weight * (sums.student - 2 * sums.cross + sums.teacher).clamp(min=0)
        return losses, 2 * weight, -2 * weight
    assert isinstance(normalization, (RowL2, Frobenius))
    whole = sums.total() if isinstance(normalization, Frobenius) else sums
    inverse_s = _inverse_root(whole.student, normalization.eps, floors[0])
    inverse_t = _inverse_root(whole.teacher, normalization.eps, floors[1])
    own = sums.student * inverse_s.square()
    other = sums.teacher * inverse_t.square()
    agreement = sums.cross * inverse_s * inverse_t
    losses = weight * (own - 2 * agreement + other).clamp(min=0)
    if isinstance(normalization, Frobenius):
        # c = sum of dP * P over the matrix, which shares the statistic
        c = (weight * (own - agreement)).sum(-1, keepdim=True)
        alpha = 2 * (weight - c) * inverse_s.square()
    else:
        alpha = 2 * weight * agreement * inverse_s.square()
    return losses, alpha, -2 * weight * inverse_s * inverse_t


def _inverse_root(square: Tensor, eps: float, floor: Tensor | float) -> Tensor:
    """1 / sqrt(square), and 0 where the root counts as nothing; inf and NaN give NaN."""
    root = square.clamp(min=0).sqrt()
    nothing = (root <= eps) | (root <= floor)
    inverse = root.masked_fill(nothing, 1.0).reciprocal().masked_fill(root.isinf(), torch.nan)
    return inverse.masked_fill(nothing, 0.0)


def gradients_of(
    student: Side, products: Products, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of student, student keys and student scale."""
    d_queries, d_keys = products
    d_scale = None
    if needs.student_scale:
        # dF still lacks the factor scale_s, so that dL/dscale = sum F dF needs no division by it;
        # half of it where dF holds dK as well
        d_scale = (student.queries * d_queries).sum() * (0.5 if student.symmetric else 1.0)
    return (*student.gradients(d_queries, d_keys, needs), d_scale)
