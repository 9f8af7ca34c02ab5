"""Low-rank factors of the affinities that are linear in the inner product, and the way back."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..components import Affinity, Cosine, Frobenius, Gram, SqEuclidean
from ..inputs import Inputs
from ..spec import LossSpec
from .result import Needs


class Operand(NamedTuple):
    """Prepared rows, of which factors are made, and what the chain rule back through them needs."""

    affinity: Affinity
    rows: Tensor  # [N, Q, D]: features, unit features (cosine) or centered ones (distances)
    inverse_norm: Tensor | None  # [N, Q, 1], of unit features
    mask: Tensor | None  # [N, Q, 1]

    def query_factor(self) -> Tensor:
        """F [N, Q, R]."""
        if isinstance(self.affinity, SqEuclidean):
            norm, one = self._norm_and_one()
            return torch.cat((norm, one, -2 * self.rows), -1)
        return self._similarity_factor()

    def key_factor(self) -> Tensor:
        """K [N, K, R]."""
        if isinstance(self.affinity, SqEuclidean):
            norm, one = self._norm_and_one()
            return torch.cat((one, norm, self.rows), -1)
        return self._similarity_factor()

    def _similarity_factor(self) -> Tensor:
        if isinstance(self.affinity, Cosine) and self.affinity.shifted:
            return torch.cat((self.rows, self._valid()), -1) * math.sqrt(0.5)
        return self.rows

    def _norm_and_one(self) -> tuple[Tensor, Tensor]:
        return self.rows.square().sum(-1, keepdim=True), self._valid()

    def _valid(self) -> Tensor:
        ones = self.rows.new_ones((*self.rows.shape[:2], 1))
        return ones if self.mask is None else ones * self.mask

    def from_query_factor(self, d_factor: Tensor) -> Tensor:
        """The gradient of the features from that of F."""
        if isinstance(self.affinity, SqEuclidean):
            return -2 * d_factor[..., 2:] + 2 * self.rows * d_factor[..., :1]
        return self._from_similarity_factor(d_factor)

    def from_key_factor(self, d_factor: Tensor) -> Tensor:
        """The gradient of the features from that of K."""
        if isinstance(self.affinity, SqEuclidean):
            return d_factor[..., 2:] + 2 * self.rows * d_factor[..., 1:2]
        return self._from_similarity_factor(d_factor)

    def _from_similarity_factor(self, d_factor: Tensor) -> Tensor:
        if not isinstance(self.affinity, Cosine):
            return d_factor
        if self.affinity.shifted:
            d_factor = d_factor[..., :-1] * math.sqrt(0.5)
        assert self.inverse_norm is not None
        radial = torch.linalg.vecdot(self.rows, d_factor).unsqueeze(-1)
        return (d_factor - self.rows * radial) * self.inverse_norm

    def finish(self, gradient: Tensor) -> Tensor:
        """Exactly 0 for masked items, whatever they hold."""
        return gradient if self.mask is None else gradient.masked_fill(~self.mask, 0.0)


class Centering(NamedTuple):
    """The mean over the valid rows of a factor, and their number."""

    mean: Tensor  # [N, 1, R], float64
    items: Tensor | int  # [N, 1, 1]

    def uncentered(self, moment: Tensor) -> Tensor:
        """The second moment before centering, from the one after."""
        mean = self.mean.to(moment.dtype)
        return moment + self.items * (mean.mT @ mean)


class Side(NamedTuple):
    """A = scale * F K' of student or teacher."""

    query_operand: Operand
    key_operand: Operand | None  # None: a self-affinity
    queries: Tensor  # F [N, Q, R]
    keys: Tensor  # K [N, K, R]
    scale: Tensor | float
    # what was subtracted from F and K
    centering: tuple[Centering, Centering] | None = None

    @property
    def symmetric(self) -> bool:
        """Whether this is a self-affinity with F = K, so that A is symmetric."""
        return self.key_operand is None and self.queries is self.keys

    def gradients(
        self, d_queries: Tensor, d_keys: Tensor | None, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None]:
        """From dF / scale and dK / scale to the gradients of the features and of the keys.

        For F = K, ``d_queries`` is the sum of both and ``d_keys`` None. Overwrites both.
        """
        queries, keys = self.query_operand, self.key_operand
        if self.centering is not None:
            d_queries, _ = _centered(d_queries, queries.mask)
            if d_keys is not None:
                d_keys, _ = _centered(d_keys, (keys or queries).mask)
        d_queries *= self.scale
        if d_keys is not None:
            d_keys *= self.scale
        if keys is not None:
            assert d_keys is not None
            return (
                queries.finish(queries.from_query_factor(d_queries)) if needs.student else None,
                keys.finish(keys.from_key_factor(d_keys)) if needs.student_keys else None,
            )
        if not needs.student:
            return None, None
        total = queries.from_query_factor(d_queries)
        if d_keys is not None:
            total = total + queries.from_key_factor(d_keys)
        return queries.finish(total), None

    def centering_floor(self, key_moment: Tensor) -> Tensor:
        """The norm [N, 1] up to which the centered matrix counts as 0 (contract section 3).

        Args:
            key_moment: K'K [N, R, R] of the centered keys.
        """
        assert self.centering is not None
        queries, keys = self.centering
        raw_keys = keys.uncentered(key_moment)
        raw_queries = raw_keys
        if not self.symmetric:
            factor = self.queries.to(key_moment.dtype)
            raw_queries = queries.uncentered(factor.mT @ factor)
        square = (raw_queries * raw_keys).sum((1, 2)).clamp(min=0)
        root = square.sqrt().mul(self.scale).abs().unsqueeze(1)
        return 8 * torch.finfo(self.queries.dtype).eps * root


def factorize(spec: LossSpec, inputs: Inputs) -> tuple[Side, Side]:
    """The factors of the student's and of the teacher's affinity, in the computation dtype."""
    student = _side(
        spec, inputs, "student", inputs.student, inputs.student_keys, inputs.student_scale
    )
    teacher = _side(
        spec, inputs, "teacher", inputs.teacher, inputs.teacher_keys, inputs.teacher_scale
    )
    return student, teacher


def _side(
    spec: LossSpec,
    inputs: Inputs,
    side: str,
    queries: Tensor,
    keys: Tensor | None,
    scale: Tensor | None,
) -> Side:
    affinity = spec.affinity
    query_operand, key_operand = _operands(affinity, inputs, queries, keys)
    f = query_operand.query_factor()
    if key_operand is not None:
        k = key_operand.key_factor()
    else:
        k = query_operand.key_factor() if isinstance(affinity, SqEuclidean) else f
    factor: Tensor | float = 1.0
    if isinstance(affinity, Gram):
        factor = affinity.scale_of(side, queries.shape[-1]) if scale is None else scale.detach()
    centered = isinstance(spec.normalization, Frobenius) and spec.normalization.center
    if not centered:
        return Side(query_operand, key_operand, f, k, factor)
    centered_f, of_f = _centered(f, query_operand.mask)
    if f is k:
        return Side(query_operand, key_operand, centered_f, centered_f, factor, (of_f, of_f))
    centered_k, of_k = _centered(k, (key_operand or query_operand).mask)
    return Side(query_operand, key_operand, centered_f, centered_k, factor, (of_f, of_k))


def _operands(
    affinity: Affinity, inputs: Inputs, queries: Tensor, keys: Tensor | None
) -> tuple[Operand, Operand | None]:
    dtype, mask, key_mask = inputs.dtype, inputs.mask, inputs.key_mask
    query_rows = without_masked(queries, mask, dtype)
    key_rows = None if keys is None else without_masked(keys, key_mask, dtype)
    if isinstance(affinity, SqEuclidean):
        # distances ignore a common offset, and float32 does not
        about = _mean(query_rows, mask) if key_rows is None else _mean(key_rows, key_mask)
        origin = about.mean.to(dtype)
        query_rows = without_masked(query_rows - origin, mask, dtype)
        key_rows = None if key_rows is None else without_masked(key_rows - origin, key_mask, dtype)
    key_operand = None if key_rows is None else operand_of(affinity, key_rows, key_mask)
    return operand_of(affinity, query_rows, mask), key_operand


def operand_of(affinity: Affinity, rows: Tensor, mask: Tensor | None) -> Operand:
    column = None if mask is None else mask.unsqueeze(-1)
    if not isinstance(affinity, Cosine):
        return Operand(affinity, rows, None, column)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    tiny = norm <= affinity.eps
    # a norm that overflowed would give a plausible 0
    inverse = norm.masked_fill(tiny, 1.0).reciprocal().masked_fill(norm.isinf(), torch.nan)
    inverse = inverse.masked_fill(tiny, 0.0)
    return Operand(affinity, rows * inverse, inverse, column)


def without_masked(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


def _mean(x: Tensor, mask: Tensor | None) -> Centering:
    """Over the valid items; the others are 0 already."""
    count = max(x.shape[1], 1) if mask is None else mask.sum(1).clamp(min=1)[:, None, None]
    return Centering(x.sum(1, keepdim=True, dtype=torch.float64) / count, count)


def _centered(x: Tensor, column: Tensor | None) -> tuple[Tensor, Centering]:
    """x minus its mean over the valid rows, and that mean; masked rows stay 0."""
    mask = None if column is None else column.squeeze(-1)
    about = _mean(x, mask)
    return without_masked(x - about.mean.to(x.dtype), mask, x.dtype), about
