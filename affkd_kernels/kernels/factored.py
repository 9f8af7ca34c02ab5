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
a GPU with few float64 units they stay in float32: there the loss loses digits once student and
teacher agree to better than 1 %, and ``algorithm="tiled"`` or the reference is the exact way.
"""

from __future__ import annotations

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
    combined,
    diagonal_of,
    key_moments,
    matrix_sums,
    row_sums,
    shifted,
    weighted_moments,
)
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
    if _lacks_diagonal(spec) and spec.whole_matrix:
        return "a diagonal of zeros under centering has no closed form"
    return None


def _lacks_diagonal(spec: LossSpec) -> bool:
    """Whether A_ii counts as 0 or not at all, where the product of the factors has a value.

    An item's distance to its own key is 0 even if the two tensors do not agree on it.
    """
    own_distance = isinstance(spec.affinity, SqEuclidean) and spec.diagonal_offset is not None
    return spec.diagonal != "keep" or own_distance


def loss_and_grad(spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str) -> LossAndGrad:
    """The loss, and the gradients that ``needs`` asks for; see the module's formulas."""
    student, teacher = factorize(spec, inputs)
    counts = Counts.of(spec, inputs)
    moments = key_moments(student, teacher, _moment_dtype(inputs))
    uniform = inputs.row_weight is None and not isinstance(spec.normalization, RowL2)
    if uniform and student.symmetric:
        sums = matrix_sums(moments)
    else:
        sums = row_sums(student, teacher, moments)
    diagonal = _diagonal(spec, student, teacher, moments)
    sums = _without_diagonal(sums.scaled(student, teacher), diagonal)
    weight = _weights(spec, inputs, sums) * counts.reciprocal(spec.reduction, moments.student)
    losses, alpha, beta = _loss_terms(spec, sums, weight, _floors(spec, student, teacher, moments))
    per_row = losses.shape[1] == inputs.student.shape[1]
    loss = counts.zero_without_pairs(losses, per_row).sum().to(inputs.dtype)
    if not any(needs):
        return LossAndGrad(loss)
    d_student, d_keys, d_scale = _gradients(
        student, teacher, moments, diagonal, (alpha, beta), needs
    )
    if d_student is not None:
        d_student = counts.zero_without_pairs(d_student, per_row=True)
    if d_keys is not None:
        d_keys = counts.zero_without_pairs(d_keys, per_row=False)
    return LossAndGrad(loss, d_student, d_keys, None if d_scale is None else d_scale.to(loss))


def row_losses(spec: LossSpec, inputs: Inputs, algorithm: str) -> Tensor:
    """The row losses r_i [N, Q], in the computation dtype."""
    student, teacher = factorize(spec, inputs)
    moments = key_moments(student, teacher, _moment_dtype(inputs))
    sums = row_sums(student, teacher, moments).scaled(student, teacher)
    sums = _without_diagonal(sums, _diagonal(spec, student, teacher, moments))
    weight = _weights(spec, inputs, sums)
    rows, _, _ = _loss_terms(spec, sums, weight, _floors(spec, student, teacher, moments))
    return Counts.of(spec, inputs).zero_without_pairs(rows, per_row=True).to(inputs.dtype)


def _moment_dtype(inputs: Inputs) -> torch.dtype:
    device = inputs.student.device
    if device.type == "cpu":
        return torch.float64
    if device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST_FLOAT64:
        return torch.float64
    return inputs.dtype


def _weights(spec: LossSpec, inputs: Inputs, sums: Sums) -> Tensor:
    """What multiplies each row's sum of squares, [N, Q or 1], but for the reduction's count."""
    if inputs.row_weight is None:
        return torch.full_like(sums.student, spec.weight)
    weight = spec.weight * inputs.row_weight.to(sums.student.dtype)
    return weight if inputs.mask is None else weight.masked_fill(~inputs.mask, 0.0)


def _diagonal(spec: LossSpec, student: Side, teacher: Side, moments: Moments) -> Diagonal | None:
    if not _lacks_diagonal(spec):
        return None
    return diagonal_of(student, teacher, spec.diagonal_offset or 0, moments.student.dtype)


def _without_diagonal(sums: Sums, diagonal: Diagonal | None) -> Sums:
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


def _floors(
    spec: LossSpec, student: Side, teacher: Side, moments: Moments
) -> tuple[Tensor | float, Tensor | float]:
    """The norm up to which each side's centered matrix counts as zero."""
    if not (isinstance(spec.normalization, Frobenius) and spec.normalization.center):
        return 0.0, 0.0
    return (
        student.centering_floor(moments.student),
        teacher.centering_floor(moments.teacher),
    )


def _loss_terms(
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


def _gradients(
    student: Side,
    teacher: Side,
    moments: Moments,
    diagonal: Diagonal | None,
    coefficients: tuple[Tensor, Tensor],
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of student, student keys and student scale."""
    alpha, beta = (x.unsqueeze(-1) for x in coefficients)  # [N, Q or 1, 1]
    # carry f_i and t_i to sum_j A_ij k_j of student and teacher, [N, R, Rs]
    to_own, to_cross = moments.student * student.scale, moments.cross.mT * teacher.scale
    queries, keys = (student.queries, teacher.queries), (student.keys, teacher.keys)
    # dL/dA_ii, which the moments hold and the loss does not
    d_own = None
    if diagonal is not None:
        d_own = alpha * diagonal.student.unsqueeze(-1) + beta * diagonal.teacher.unsqueeze(-1)
    d_keys = None
    if alpha.shape[1] == 1 and student.symmetric:
        # one alpha and beta for a symmetric A: dL/dA is symmetric, and dK = dF
        minus = None if diagonal is None or d_own is None else (2 * d_own, diagonal.keys)
        d_queries = combined(queries, (2 * alpha * to_own, 2 * beta * to_cross), minus=minus)
    else:
        shape = (*student.queries.shape[:2], 1)
        weights = alpha.expand(shape), beta.expand(shape)
        minus = None if diagonal is None or d_own is None else (d_own, diagonal.keys)
        d_queries = combined(queries, (to_own, to_cross), weights, minus)
        minus = None if diagonal is None or d_own is None else _to_keys(student, diagonal, d_own)
        d_keys = combined(keys, weighted_moments(student, teacher, weights), minus=minus)
        if student.symmetric:
            d_queries, d_keys = d_queries.add_(d_keys), None
    d_scale = None
    if needs.student_scale:
        # dF still lacks the factor scale_s, so that dL/dscale = sum F dF needs no division by it;
        # half of it where dF holds dK as well
        d_scale = (student.queries * d_queries).sum() * (0.5 if student.symmetric else 1.0)
    return (*student.gradients(d_queries, d_keys, needs), d_scale)


def _to_keys(student: Side, diagonal: Diagonal, d_own: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal's part of dK: row j's own query is j - offset."""
    length = student.keys.shape[1]
    return (
        shifted(d_own, -diagonal.offset, length),
        shifted(student.queries, -diagonal.offset, length),
    )
