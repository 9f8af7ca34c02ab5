r"""Exact losses that never form a pair: O(B D^2) time, O(B D + D^2) memory, on any device.

Where the affinity is linear in the inner product, ``A = scale * F K'`` with factors F [Q, R] and
K [K, R] of small rank R: D for gram and cosine, D + 1 for the shifted cosine ([u, 1] / sqrt 2),
D + 2 for squared distances ([n, 1, -2x] . [1, n, x]). With the mean squared error, everything then
follows from R x R moments of the keys (subscripts s, t: student and teacher)::

    sum_j A_s,ij^2        = f_i (K_s' K_s) f_i'          "a" below
    sum_j A_t,ij^2        = t_i (K_t' K_t) t_i'          "b"
    sum_j A_s,ij A_t,ij   = f_i (K_s' K_t) t_i'          "c"

For each normalization ``dL/dA = alpha_i A_s + beta_i A_t``, with alpha and beta from
a, b and c; and

    dF_i = alpha_i f_i (K_s' K_s) + beta_i t_i (K_t' K_s)
    dK_j = k_j (F_s' diag(alpha) F_s) + kt_j (F_t' diag(beta) F_s)

A self-affinity has F = K = X (up to the scale) and dX = dF + dK.

**Precision.** Near convergence a - 2c + b cancels. Moments and row terms are therefore float64, and
so is the loss value, to about 1e-9 relative; float32 keeps the gradient's own products. On a GPU
with few float64 units moments stay in float32: there the loss loses digits once student and teacher
agree to better than 1 %, and ``algorithm="tiled"`` or the reference is the exact way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..components import MSE, Cosine, Frobenius, Gram, NoNormalization, RowL2, SqEuclidean
from ..inputs import Inputs
from ..spec import LossSpec
from .factors import Side, factorize
from .result import LossAndGrad, Needs

# rows per step: a float64 copy of this many elements stays in cache and bounds the extra memory
_CHUNK_ELEMENTS = 1 << 19
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


class Moments(NamedTuple):
    """Second moments of the keys."""

    student: Tensor  # K_s' K_s [N, Rs, Rs]
    teacher: Tensor  # K_t' K_t [N, Rt, Rt]
    cross: Tensor  # K_s' K_t [N, Rs, Rt]


class Sums(NamedTuple):
    """Sums of A_s^2, A_t^2 and A_s A_t over the pairs that take part, per row or per matrix."""

    student: Tensor
    teacher: Tensor
    cross: Tensor

    def total(self) -> Sums:
        return Sums(*(x.sum(-1, keepdim=True) for x in self))

    def scaled(self, student: Side, teacher: Side) -> Sums:
        return Sums(
            self.student * (student.scale * student.scale),
            self.teacher * (teacher.scale * teacher.scale),
            self.cross * (student.scale * teacher.scale),
        )


def loss_and_grad(
    spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str = "factored"
) -> LossAndGrad:
    """The loss, and the gradients that ``needs`` asks for; see the module's formulas."""
    student, teacher = factorize(spec, inputs)
    counts = Counts.of(spec, inputs)
    moments = _moments(student, teacher, _moment_dtype(inputs))
    # [N, Q or 1]: what multiplies each row's sum of squares, the reduction's count included
    weight = spec.weight * counts.reciprocal(spec.reduction, moments.student)
    if inputs.row_weight is not None:
        weight = weight * inputs.row_weight
    uniform = inputs.row_weight is None and not isinstance(spec.normalization, RowL2)
    if uniform and student.symmetric:
        sums = _matrix_sums(moments)
    else:
        sums = _row_sums(student, teacher, moments)
    sums = _without_diagonal(spec, student, teacher, sums.scaled(student, teacher))
    per_row, alpha, beta = _loss_terms(spec, sums, weight, _floors(spec, student, teacher))
    loss = per_row.sum().to(inputs.dtype)
    if not any(needs):
        return LossAndGrad(loss)
    return LossAndGrad(loss, *_gradients(spec, student, teacher, moments, alpha, beta, needs))


def row_losses(spec: LossSpec, inputs: Inputs, algorithm: str = "factored") -> Tensor:
    """The row losses r_i [N, Q], in the computation dtype."""
    student, teacher = factorize(spec, inputs)
    moments = _moments(student, teacher, _moment_dtype(inputs))
    sums = _row_sums(student, teacher, moments).scaled(student, teacher)
    sums = _without_diagonal(spec, student, teacher, sums)
    weight = torch.full_like(sums.student, spec.weight)
    if inputs.row_weight is not None:
        weight = weight * inputs.row_weight
    rows, _, _ = _loss_terms(spec, sums, weight, _floors(spec, student, teacher))
    return rows.to(inputs.dtype)


class Counts(NamedTuple):
    """How many rows and pairs take part [N, 1], or plain numbers where nothing is masked."""

    matrices: int
    rows: Tensor | int
    pairs: Tensor | int

    @staticmethod
    def of(spec: LossSpec, inputs: Inputs) -> Counts:
        n, q = inputs.student.shape[:2]
        k = inputs.num_keys
        key_mask = inputs.mask if inputs.student_keys is None else inputs.key_mask
        if inputs.mask is None and key_mask is None and spec.diagonal != "exclude":
            return Counts(n, n * q if k else 0, n * q * k)
        device = inputs.student.device
        queries = _count_or_all(inputs.mask, n, q, device)  # [N, Q]
        keys = _count_or_all(key_mask, n, k, device)  # [N, K]
        pairs_of_row = queries * keys.sum(1, keepdim=True)
        if spec.diagonal == "exclude":
            pairs_of_row = pairs_of_row - queries * _shifted(keys, spec.diagonal_offset or 0, q)
        return Counts(n, (pairs_of_row > 0).sum(), pairs_of_row.sum())

    def reciprocal(self, reduction: str, like: Tensor) -> Tensor:
        """1 / count, as a tensor; 0-counts give a loss of 0 whatever this is."""
        count = {"mean": self.pairs, "batchmean": self.rows, "matrixmean": self.matrices}.get(
            reduction, 1
        )
        count = torch.as_tensor(count, dtype=like.dtype, device=like.device)
        return count.clamp(min=1).reciprocal()


def _count_or_all(mask: Tensor | None, n: int, items: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones((), dtype=torch.long, device=device).expand(n, items)
    return mask.long()


def _shifted(x: Tensor, offset: int, length: int) -> Tensor:
    """y [N, length, ...] with y_i = x_{i + offset}, and 0 beyond the ends."""
    shifted = x.new_zeros((x.shape[0], length, *x.shape[2:]))
    start, stop = max(0, -offset), min(length, x.shape[1] - offset)
    if start < stop:
        shifted[:, start:stop] = x[:, start + offset : stop + offset]
    return shifted


def _moment_dtype(inputs: Inputs) -> torch.dtype:
    device = inputs.student.device
    if device.type == "cpu":
        return torch.float64
    if device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST_FLOAT64:
        return torch.float64
    return inputs.dtype


def _chunks(x: Tensor) -> Iterator[slice]:
    """Row slices of x [N, Q, R] small enough to be copied in a wider dtype."""
    n, rows, rank = x.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, n * rank))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _moments(student: Side, teacher: Side, dtype: torch.dtype) -> Moments:
    n, _, rank_s = student.keys.shape
    rank_t = teacher.keys.shape[2]
    zeros = student.keys.new_zeros
    own = zeros((n, rank_s, rank_s), dtype=dtype)
    other = zeros((n, rank_t, rank_t), dtype=dtype)
    cross = zeros((n, rank_s, rank_t), dtype=dtype)
    for rows in _chunks(student.keys):
        s, t = student.keys[:, rows].to(dtype), teacher.keys[:, rows].to(dtype)
        own.baddbmm_(s.mT, s)
        other.baddbmm_(t.mT, t)
        cross.baddbmm_(s.mT, t)
    return Moments(own, other, cross)


def _matrix_sums(moments: Moments) -> Sums:
    """Per matrix [N, 1], for F = K on both sides: <F'F, K'K> is a norm of the moments."""
    return Sums(*(x.square().sum((1, 2)).unsqueeze(1) for x in moments))


def _row_sums(student: Side, teacher: Side, moments: Moments) -> Sums:
    """Per row [N, Q]."""
    dtype = moments.student.dtype
    parts: list[Sums] = []
    for rows in _chunks(student.queries):
        s, t = student.queries[:, rows].to(dtype), teacher.queries[:, rows].to(dtype)
        parts.append(
            Sums(
                _row_dots(s @ moments.student, s),
                _row_dots(t @ moments.teacher, t),
                _row_dots(s @ moments.cross, t),
            )
        )
    if not parts:
        empty = moments.student.new_zeros(student.queries.shape[:2])
        return Sums(empty, empty, empty)
    return Sums(*(torch.cat(column, dim=1) for column in zip(*parts, strict=True)))


def _row_dots(x: Tensor, y: Tensor) -> Tensor:
    """sum_d x_id y_id [N, rows]."""
    return torch.linalg.vecdot(x, y)


class Diagonal(NamedTuple):
    """The entries A_ii of both sides [N, Q], 0 where row i has no own key."""

    student: Tensor
    teacher: Tensor


def _diagonal(student: Side, teacher: Side, offset: int, dtype: torch.dtype) -> Diagonal:
    return Diagonal(*(_own_entries(side, offset, dtype) for side in (student, teacher)))


def _own_entries(side: Side, offset: int, dtype: torch.dtype) -> Tensor:
    own_keys = _shifted(side.keys, offset, side.queries.shape[1])
    return side.scale * _row_dots(side.queries.to(dtype), own_keys.to(dtype))


def _without_diagonal(spec: LossSpec, student: Side, teacher: Side, sums: Sums) -> Sums:
    """Take the diagonal out of the sums; "zero" and "exclude" differ in the counts alone."""
    if not _lacks_diagonal(spec):
        return sums
    d = _diagonal(student, teacher, spec.diagonal_offset or 0, sums.student.dtype)
    parts = Sums(d.student.square(), d.teacher.square(), d.student * d.teacher)
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


def _floors(spec: LossSpec, student: Side, teacher: Side) -> tuple[Tensor | float, Tensor | float]:
    """The norm up to which each side's centered matrix counts as zero."""
    if not (isinstance(spec.normalization, Frobenius) and spec.normalization.center):
        return 0.0, 0.0
    return student.centering_floor(), teacher.centering_floor()


def _loss_terms(
    spec: LossSpec, sums: Sums, weight: Tensor, floors: tuple[Tensor | float, Tensor | float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted losses per row (or per matrix), and the alpha and beta of dL/dA, [N, Q or 1]."""
    normalization = spec.normalization
    if isinstance(normalization, NoNormalization):
        # rounding must not make a sum of squares negative
        losses = weight * (sums.student - 2 * sums.cross + sums.teacher).clamp(min=0)
        return losses, 2 * weight.expand_as(losses), -2 * weight.expand_as(losses)
    assert isinstance(normalization, (RowL2, Frobenius))
    whole = sums.total() if isinstance(normalization, Frobenius) else sums
    inverse_s = _inverse_root(whole.student, normalization.eps, floors[0])
    inverse_t = _inverse_root(whole.teacher, normalization.eps, floors[1])
    own = sums.student * inverse_s.square()
    other = sums.teacher * inverse_t.square()
    agreement = sums.cross * inverse_s * inverse_t
    losses = weight * (own - 2 * agreement + other).clamp(min=0)
    # c = sum of dP * P over what shares the statistic
    c = weight * (own - agreement)
    if isinstance(normalization, Frobenius):
        c = c.sum(-1, keepdim=True)
        alpha = 2 * (weight - c) * inverse_s.square()
    else:
        alpha = 2 * weight * agreement * inverse_s.square()
    beta = -2 * weight * inverse_s * inverse_t
    return losses, alpha.expand_as(losses), beta.expand_as(losses)


def _inverse_root(square: Tensor, eps: float, floor: Tensor | float) -> Tensor:
    """1 / sqrt(square), and 0 where the root counts as nothing; inf and NaN give NaN."""
    root = square.clamp(min=0).sqrt()
    nothing = (root <= eps) | (root <= floor)
    inverse = root.masked_fill(nothing, 1.0).reciprocal().masked_fill(root.isinf(), torch.nan)
    return inverse.masked_fill(nothing, 0.0)


def _gradients(
    spec: LossSpec,
    student: Side,
    teacher: Side,
    moments: Moments,
    alpha: Tensor,
    beta: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of student, student keys and student scale."""
    # squared distances are all positive, and their weighted sums nearly cancel: not in float32
    exact = isinstance(spec.affinity, SqEuclidean)
    dtype = moments.student.dtype if exact else student.queries.dtype
    alpha, beta = alpha.unsqueeze(-1), beta.unsqueeze(-1)  # [N, Q or 1, 1]
    # carry f_i and t_i to sum_j A_ij k_j of student and teacher, [N, R, Rs]
    to_own, to_cross = moments.student * student.scale, moments.cross.mT * teacher.scale
    queries, keys = (student.queries, teacher.queries), (student.keys, teacher.keys)
    d_keys = None
    if alpha.shape[1] == 1 and student.symmetric:
        # one alpha and beta for a symmetric A: dL/dA is symmetric, and dK = dF
        d_queries = _combined(queries, (2 * alpha * to_own, 2 * beta * to_cross), None, dtype)
    else:
        shape = (*student.queries.shape[:2], 1)
        weights = alpha.to(dtype).expand(shape), beta.to(dtype).expand(shape)
        d_queries = _combined(queries, (to_own, to_cross), weights, dtype)
        weighted = _weighted_moments(student, teacher, weights, dtype)
        d_keys = _combined(keys, weighted, None, dtype)
        if student.symmetric:
            d_queries, d_keys = d_queries.add_(d_keys), None
    if _lacks_diagonal(spec):
        _remove_diagonal(spec, student, teacher, alpha, beta, d_queries, d_keys)
    d_scale = None
    if needs.student_scale:
        # dF still lacks the factor scale_s, so that dL/dscale = sum F dF needs no division by it;
        # half of it where dF holds dK as well
        d_scale = (student.queries * d_queries).sum() * (0.5 if student.symmetric else 1.0)
    return (*student.gradients(d_queries, d_keys, needs), d_scale)


def _combined(
    operands: tuple[Tensor, Tensor],
    maps: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """w_x x @ to_x + w_y y @ to_y [N, rows, Rs], computed in ``dtype`` by chunks of rows."""
    x, y = operands
    to_x, to_y = maps[0].to(dtype), maps[1].to(dtype)
    out = x.new_empty((*x.shape[:2], to_x.shape[2]))
    for rows in _chunks(x):
        x_rows, y_rows = x[:, rows].to(dtype), y[:, rows].to(dtype)
        if weights is not None:
            x_rows, y_rows = x_rows * weights[0][:, rows], y_rows * weights[1][:, rows]
        out[:, rows] = torch.baddbmm(x_rows @ to_x, y_rows, to_y)
    return out


def _weighted_moments(
    student: Side, teacher: Side, weights: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """scale_s F_s' diag(alpha) F_s and scale_t F_t' diag(beta) F_s, [N, R, Rs]."""
    n, _, rank = student.queries.shape
    own = student.queries.new_zeros((n, rank, rank), dtype=dtype)
    cross = student.queries.new_zeros((n, teacher.queries.shape[2], rank), dtype=dtype)
    alpha, beta = weights
    for rows in _chunks(student.queries):
        s, t = student.queries[:, rows].to(dtype), teacher.queries[:, rows].to(dtype)
        own.baddbmm_((s * alpha[:, rows]).mT, s)
        cross.baddbmm_((t * beta[:, rows]).mT, s)
    return own * student.scale, cross * teacher.scale


def _remove_diagonal(
    spec: LossSpec,
    student: Side,
    teacher: Side,
    alpha: Tensor,
    beta: Tensor,
    d_queries: Tensor,
    d_keys: Tensor | None,
) -> None:
    """Subtract, in place, what the diagonal's dA_ii added to dF and dK."""
    offset = spec.diagonal_offset or 0
    entries = _diagonal(student, teacher, offset, d_queries.dtype)
    own = alpha * entries.student.unsqueeze(-1) + beta * entries.teacher.unsqueeze(-1)
    own = own.to(d_queries.dtype) * (2 if student.symmetric else 1)
    d_queries -= own * _shifted(student.keys, offset, student.queries.shape[1])
    if d_keys is not None:
        d_keys -= _shifted(own * student.queries, -offset, student.keys.shape[1])
