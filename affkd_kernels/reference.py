"""The contract (docs/semantics.md) literally, in eager PyTorch: oracle, baseline and last resort.

Every step is one short function per component, in the order of the contract: affinity,
normalization, loss, reduction. Everything here is differentiable as often as one likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import components as c
from .inputs import Inputs, canonical_inputs, full_precision
from .spec import LossSpec, make_spec


def affinity_loss(
    student: Tensor,
    teacher: Tensor,
    affinity: c.Affinity | str = "gram",
    normalization: c.Normalization | str = "none",
    loss: c.Loss | str = "mse",
    **options: Any,
) -> Tensor:
    """As :func:`affkd_kernels.affinity_loss`, always computed by this module.

    Takes the same arguments; ``backend`` and ``algorithm`` may only ask for what this is.
    """
    from . import functional

    per_call = {name: options.pop(name) for name in functional.PER_CALL if name in options}
    process_group = options.pop("process_group", None)
    backend = options.pop("backend", "auto")
    if backend not in ("auto", "reference"):
        raise ValueError(f"this is backend='reference', got backend={backend!r}")
    spec = make_spec(affinity, normalization, loss, backend="reference", **options)
    if process_group is not None:
        return functional.evaluate(spec, student, teacher, **per_call, process_group=process_group)
    inputs, rows_shape = canonical_inputs(spec, student, teacher, **per_call)
    return evaluate(spec, inputs, rows_shape)


def evaluate(spec: LossSpec, inputs: Inputs, rows_shape: tuple[int, ...]) -> Tensor:
    """The loss: 0-dim, or for ``reduction="none"`` the row losses in ``rows_shape``."""
    with full_precision(inputs.student.device.type):
        inputs, offset = _prepared(spec, inputs), _diagonal_offset(spec, inputs)
        if spec.axis == "both":
            row = _reduced(spec, *_row_losses(spec, inputs, offset))
            column = _reduced(spec, *_row_losses(spec, *_exchanged(inputs, offset)))
            return spec.weight * (row + column) / 2
        if spec.axis == "column":
            inputs, offset = _exchanged(inputs, offset)
        rows, pairs = _row_losses(spec, inputs, offset)
        if spec.reduction == "none":
            return spec.weight * rows.reshape(rows_shape)
        return spec.weight * _reduced(spec, rows, pairs)


def normalized_affinity(spec: LossSpec, inputs: Inputs, side: str = "student") -> Tensor:
    """P [N, Q, K] of one side; entries that take no part are 0."""
    with full_precision(inputs.student.device.type):
        inputs, offset = _prepared(spec, inputs), _diagonal_offset(spec, inputs)
        column = spec.axis == "column"
        if column:
            inputs, offset = _exchanged(inputs, offset)
        pairs, diagonal = pairs_of(spec, inputs, offset)
        normalized, _ = _side(spec, inputs, side, pairs, diagonal)
        return normalized.transpose(1, 2) if column else normalized


def _prepared(spec: LossSpec, inputs: Inputs) -> Inputs:
    """Cast to the computation dtype, detach the teacher, empty the masked items."""
    dtype = inputs.dtype

    def prepare(x: Tensor, mask: Tensor | None, constant: bool) -> Tensor:
        x = x.detach() if constant else x
        x = x.to(dtype)
        # where, not a product: a masked item may hold inf or NaN, and its gradient is exactly 0
        return x if mask is None else torch.where(mask.unsqueeze(-1), x, x.new_zeros(()))

    s_keys, t_keys = inputs.student_keys, inputs.teacher_keys
    constant = spec.detach_teacher
    teacher_scale = inputs.teacher_scale
    if teacher_scale is not None and constant:
        teacher_scale = teacher_scale.detach()
    return inputs._replace(
        student=prepare(inputs.student, inputs.mask, False),
        teacher=prepare(inputs.teacher, inputs.mask, constant),
        student_keys=None if s_keys is None else prepare(s_keys, inputs.key_mask, False),
        teacher_keys=None if t_keys is None else prepare(t_keys, inputs.key_mask, constant),
        row_weight=None if inputs.row_weight is None else inputs.row_weight.to(dtype),
        teacher_scale=teacher_scale,
    )


def _diagonal_offset(spec: LossSpec, inputs: Inputs) -> int | None:
    """Row i's own key is i + offset; None where there is no diagonal."""
    return 0 if inputs.student_keys is None else spec.diagonal_offset


def _exchanged(inputs: Inputs, offset: int | None) -> tuple[Inputs, int | None]:
    """The inputs and the offset whose affinity is A'. A self-affinity is its own transpose."""
    # a self-affinity's offset is 0
    return inputs.exchanged(), None if offset is None else -offset


def _row_losses(spec: LossSpec, inputs: Inputs, offset: int | None) -> tuple[Tensor, Tensor]:
    """r_i [N, Q], and the pairs that take part [N, Q, K]."""
    pairs, diagonal = pairs_of(spec, inputs, offset)
    student, student_log = _side(spec, inputs, "student", pairs, diagonal)
    teacher, teacher_log = _side(spec, inputs, "teacher", pairs, diagonal)
    if student_log is not None and teacher_log is not None and spec.loss.needs_distribution:
        entries = _log_space_loss(spec.loss, student, teacher, student_log, teacher_log)
    else:
        entries = _POINTWISE.get(type(spec.loss), _registered_loss)(spec.loss, student, teacher)
    rows = torch.where(pairs, entries, entries.new_zeros(())).sum(-1)
    rows = rows + _non_finite(inputs)
    if inputs.row_weight is not None:
        rows = inputs.row_weight * rows
    # what takes part in nothing shows nowhere, not even a NaN
    return torch.where(pairs.any(-1), rows, rows.new_zeros(())), pairs


def _non_finite(inputs: Inputs) -> Tensor:
    """[N, 1]: NaN where a valid item is inf or NaN, else 0.

    The stages alone do not show every one: a logit of -inf gives a plausible probability of 0.
    """
    features = (inputs.student, inputs.teacher, inputs.student_keys, inputs.teacher_keys)
    return sum((0 * x.detach()).sum((1, 2)).unsqueeze(1) for x in features if x is not None)  # type: ignore[return-value]


def _reduced(spec: LossSpec, rows: Tensor, pairs: Tensor) -> Tensor:
    """The sum of the row losses over the count that ``reduction`` names; 0.0 where that is 0."""
    total = rows.sum()
    if spec.reduction == "sum":
        return total
    if spec.reduction == "mean":
        count = pairs.sum()
    elif spec.reduction == "batchmean":
        count = pairs.any(-1).sum()
    else:
        count = torch.as_tensor(rows.shape[0], device=rows.device)
    return total / count.clamp(min=1)


def pairs_of(spec: LossSpec, inputs: Inputs, offset: int | None) -> tuple[Tensor, Tensor | None]:
    """The pairs that take part [N, Q, K], and which of them lie on the diagonal [Q, K] or None."""
    n, q = inputs.student.shape[:2]
    k = inputs.num_keys
    device = inputs.student.device
    keys_mask = inputs.mask if inputs.student_keys is None else inputs.key_mask
    pairs = torch.ones((), dtype=torch.bool, device=device).expand(n, q, k)
    if inputs.mask is not None:
        pairs = pairs & inputs.mask.unsqueeze(2)
    if keys_mask is not None:
        pairs = pairs & keys_mask.unsqueeze(1)
    if inputs.pair_mask is not None:
        pairs = pairs & inputs.pair_mask
    if offset is None:
        return pairs, None
    rows = torch.arange(q, device=device).unsqueeze(1)
    diagonal = rows + offset == torch.arange(k, device=device)
    return (pairs & ~diagonal if spec.diagonal == "exclude" else pairs), diagonal


def _side(
    spec: LossSpec, inputs: Inputs, side: str, pairs: Tensor, diagonal: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """P of one side, 0 where a pair takes no part, and log P where the normalization has it."""
    if side == "student":
        queries, keys, scale = inputs.student, inputs.student_keys, inputs.student_scale
    else:
        queries, keys, scale = inputs.teacher, inputs.teacher_keys, inputs.teacher_scale
    keys_mask = inputs.mask if keys is None else inputs.key_mask
    a = spec.affinity
    if type(a) is c.Gram:
        factor = a.scale_of(side, queries.shape[-1]) if scale is None else scale
        matrix = _products(queries, queries if keys is None else keys) * factor
    elif type(a) in _AFFINITIES:
        queries, keys = _features(a, queries, keys, inputs.mask, keys_mask)
        matrix = _AFFINITIES[type(a)](a, queries, keys, diagonal)
    else:
        matrix = a.matrix(queries, queries if keys is None else keys)
    if a.clamp_min is not None:
        # not clamp(), which versions of torch differentiate differently at the bound itself
        matrix = torch.where(matrix < a.clamp_min, a.clamp_min, matrix)
    if spec.diagonal == "zero" and diagonal is not None:
        matrix = matrix.masked_fill(diagonal, 0.0)
    matrix = torch.where(pairs, matrix, matrix.new_zeros(()))
    if type(spec.normalization) is c.Softmax:
        return _softmax(matrix / spec.normalization.tau_of(side), pairs)
    normalize = _NORMALIZATIONS.get(type(spec.normalization), _registered_normalization)
    return normalize(spec.normalization, matrix, pairs, diagonal), None


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    return queries @ keys.transpose(1, 2)


def _features(
    affinity: c.Affinity,
    queries: Tensor,
    keys: Tensor | None,
    mask: Tensor | None,
    keys_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Unit features or centered ones, whichever the affinity is a function of."""
    if isinstance(affinity, c.Cosine) or (
        isinstance(affinity, (c.RBF, c.Polynomial)) and affinity.unit
    ):
        unit = _unit(queries, affinity.eps)
        return unit, (unit if keys is None else _unit(keys, affinity.eps))
    if isinstance(affinity, c.Polynomial):
        return queries, (queries if keys is None else keys)
    # distances ignore a common offset, and float32 does not: take it out. Being invariant, the
    # loss has no gradient through the mean.
    center = _mean_item(queries if keys is None else keys, keys_mask).detach()
    centered = _masked(queries - center, mask)
    return centered, (centered if keys is None else _masked(keys - center, keys_mask))


def _mean_item(x: Tensor, mask: Tensor | None) -> Tensor:
    """[N, 1, D], over the valid items; the others are 0 already."""
    count = x.shape[1] if mask is None else mask.sum(1, keepdim=True).unsqueeze(-1).clamp(min=1)
    return x.sum(1, keepdim=True) / (max(count, 1) if isinstance(count, int) else count)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, x.new_zeros(()))


def _unit(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    tiny = norm <= eps
    # a norm that overflowed would give a plausible 0
    norm = norm.masked_fill(tiny, 1.0).masked_fill(norm.isinf(), math.nan)
    return torch.where(tiny, x.new_zeros(()), x / norm)


def _squared_distances(queries: Tensor, keys: Tensor, diagonal: Tensor | None) -> Tensor:
    query_norms = queries.square().sum(-1).unsqueeze(2)  # [N, Q, 1]
    key_norms = keys.square().sum(-1).unsqueeze(1)  # [N, 1, K]
    squared = (query_norms + key_norms - 2 * _products(queries, keys)).clamp(min=0)
    return squared if diagonal is None else _zero_unless_nan(squared, diagonal)


def _zero_unless_nan(x: Tensor, where: Tensor) -> Tensor:
    """0 with gradient 0, but an inf or NaN item still shows."""
    return torch.where(where & x.isfinite(), x.new_zeros(()), x)


def _cosine(a: c.Cosine, queries: Tensor, keys: Tensor, diagonal: Tensor | None) -> Tensor:
    cosine = _products(queries, keys)
    # rounding may leave a cosine below -1, and a negative "probability" has no logarithm
    return ((1 + cosine) / 2).clamp(min=0) if a.shifted else cosine


def _sqeuclidean(
    a: c.SqEuclidean, queries: Tensor, keys: Tensor, diagonal: Tensor | None
) -> Tensor:
    return _squared_distances(queries, keys, diagonal)


def _euclidean(a: c.Euclidean, queries: Tensor, keys: Tensor, diagonal: Tensor | None) -> Tensor:
    squared = _squared_distances(queries, keys, None)
    tiny = squared <= a.eps
    distance = torch.where(tiny, math.sqrt(a.eps), squared.masked_fill(tiny, 1.0).sqrt())
    return distance if diagonal is None else _zero_unless_nan(distance, diagonal)


def _rbf(a: c.RBF, queries: Tensor, keys: Tensor, diagonal: Tensor | None) -> Tensor:
    if a.taylor_order is None:
        return torch.exp(-a.gamma * _squared_distances(queries, keys, diagonal))
    x = 2 * a.gamma * _products(queries, keys)
    series = 1 + 0 * x
    # Horner: 1 + x (1 + x/2 (1 + x/3 (...)))
    for order in range(a.taylor_order, 0, -1):
        series = 1 + series * x / order
    return math.exp(-2 * a.gamma) * series


def _polynomial(a: c.Polynomial, queries: Tensor, keys: Tensor, diagonal: Tensor | None) -> Tensor:
    return (a.scale * _products(queries, keys) + a.offset) ** a.degree


_AFFINITIES: dict[type, Callable[..., Tensor]] = {
    c.Cosine: _cosine,
    c.SqEuclidean: _sqeuclidean,
    c.Euclidean: _euclidean,
    c.RBF: _rbf,
    c.Polynomial: _polynomial,
}


def _divided(matrix: Tensor, statistic: Tensor, nothing: Tensor) -> Tensor:
    """P = A / statistic, and 0 with gradient 0 where the statistic counts as nothing."""
    # a statistic that overflowed would give a plausible 0
    statistic = statistic.masked_fill(nothing, 1.0).masked_fill(statistic.isinf(), math.nan)
    quotient = matrix / statistic
    return quotient.masked_fill(nothing, 0.0)


def _root_of_squares(matrix: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=dim, keepdim=True)


def _none(n: c.NoNormalization, matrix: Tensor, pairs: Tensor, diagonal: Tensor | None) -> Tensor:
    return matrix


def _row_l2(n: c.RowL2, matrix: Tensor, pairs: Tensor, diagonal: Tensor | None) -> Tensor:
    statistic = _root_of_squares(matrix, -1)
    return _divided(matrix, statistic, statistic <= n.eps)


def _row_l1(n: c.RowL1, matrix: Tensor, pairs: Tensor, diagonal: Tensor | None) -> Tensor:
    statistic = matrix.abs().sum(-1, keepdim=True)
    return _divided(matrix, statistic, statistic <= n.eps)


def _row_sum(n: c.RowSum, matrix: Tensor, pairs: Tensor, diagonal: Tensor | None) -> Tensor:
    statistic = matrix.sum(-1, keepdim=True)
    return _divided(matrix, statistic, statistic <= n.eps)


def _frobenius(n: c.Frobenius, matrix: Tensor, pairs: Tensor, diagonal: Tensor | None) -> Tensor:
    statistic = _root_of_squares(matrix, (-2, -1))
    if not n.center:
        return _divided(matrix, statistic, statistic <= n.eps)
    floor = 8 * torch.finfo(matrix.dtype).eps * statistic.detach()
    matrix = _centered(matrix, pairs)
    statistic = _root_of_squares(matrix, (-2, -1))
    return _divided(matrix, statistic, (statistic <= n.eps) | (statistic <= floor))


def _centered(matrix: Tensor, pairs: Tensor) -> Tensor:
    """Double centering over valid rows and columns; `pairs` is their product set."""
    columns = pairs.any(1, keepdim=True).sum(2, keepdim=True).clamp(min=1)  # [N, 1, 1]
    rows = pairs.any(2, keepdim=True).sum(1, keepdim=True).clamp(min=1)
    row_means = matrix.sum(2, keepdim=True) / columns
    column_means = matrix.sum(1, keepdim=True) / rows
    centered = matrix - row_means - column_means + row_means.sum(1, keepdim=True) / rows
    return torch.where(pairs, centered, centered.new_zeros(()))


def _mean(n: c.Mean, matrix: Tensor, pairs: Tensor, diagonal: Tensor | None) -> Tensor:
    if n.over == "positive":
        # not `> 0`, which NaN fails: a matrix of NaN would count as nothing
        counted = ~(matrix <= 0)
    elif n.over == "offdiag" and diagonal is not None:
        counted = pairs & ~diagonal
    else:
        counted = pairs
    total = torch.where(counted, matrix, matrix.new_zeros(())).sum((-2, -1), keepdim=True)
    statistic = total / counted.sum((-2, -1), keepdim=True).clamp(min=1)
    return _divided(matrix, statistic, statistic <= n.eps)


def _max(n: c.Max, matrix: Tensor, pairs: Tensor, diagonal: Tensor | None) -> Tensor:
    if matrix.shape[1] * matrix.shape[2] == 0:
        return matrix
    # amax propagates NaN and shares the gradient among ties
    statistic = matrix.masked_fill(~pairs, -math.inf).amax((-2, -1), keepdim=True)
    statistic = statistic.detach() if n.detach else statistic
    return _divided(matrix, statistic, statistic <= n.eps)


_NORMALIZATIONS: dict[type, Callable[..., Tensor]] = {
    c.NoNormalization: _none,
    c.RowL2: _row_l2,
    c.RowL1: _row_l1,
    c.RowSum: _row_sum,
    c.Frobenius: _frobenius,
    c.Mean: _mean,
    c.Max: _max,
}


def _registered_normalization(
    n: c.Normalization, matrix: Tensor, pairs: Tensor, diagonal: Tensor | None
) -> Tensor:
    normalized = n.normalize(matrix, pairs)
    return torch.where(pairs, normalized, normalized.new_zeros(()))


def _softmax(logits: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """softmax and log-softmax over the pairs of each row, both 0 outside them."""
    # a row without pairs would be all -inf: softmax over its zeros instead, and drop it below
    absent = ~pairs & pairs.any(-1, keepdim=True)
    log_p = torch.log_softmax(logits.masked_fill(absent, -math.inf), dim=-1)
    log_p = torch.where(pairs, log_p, log_p.new_zeros(()))
    return torch.where(pairs, log_p.exp(), log_p.new_zeros(())), log_p


def _mse(loss: c.MSE, s: Tensor, t: Tensor) -> Tensor:
    return (s - t).square()


def _l1(loss: c.L1, s: Tensor, t: Tensor) -> Tensor:
    return (s - t).abs()


def _smooth_l1(loss: c.SmoothL1, s: Tensor, t: Tensor) -> Tensor:
    return torch.nn.functional.smooth_l1_loss(s, t, reduction="none", beta=loss.beta)


def _kl(loss: c.KL, s: Tensor, t: Tensor) -> Tensor:
    return _divergence(loss, s, t, (s + loss.eps).log(), (t + loss.eps).log())


def _divergence(loss: c.KL, s: Tensor, t: Tensor, log_s: Tensor, log_t: Tensor) -> Tensor:
    if loss.direction == "forward":
        return t * (log_t - log_s)
    if loss.direction == "reverse":
        return s * (log_s - log_t)
    return (t - s) * (log_t - log_s)


def _log_space_loss(loss: c.Loss, s: Tensor, t: Tensor, log_s: Tensor, log_t: Tensor) -> Tensor:
    if isinstance(loss, c.KL):
        return _divergence(loss, s, t, log_s, log_t)
    if isinstance(loss, c.CrossEntropy):
        return -t * log_s
    return loss.pointwise(s, t)


def _registered_loss(loss: c.Loss, s: Tensor, t: Tensor) -> Tensor:
    return loss.pointwise(s, t)


_POINTWISE: dict[type, Callable[..., Tensor]] = {
    c.MSE: _mse,
    c.L1: _l1,
    c.SmoothL1: _smooth_l1,
    c.KL: _kl,
}
