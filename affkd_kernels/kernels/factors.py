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


class Side(NamedTuple):
    """A = scale * F K' of student or teacher."""

    query_operand: Operand
    key_operand: Operand | None  # None: a self-affinity
    queries: Tensor  # F [N, Q, R]
    keys: Tensor  # K [N, K, R]
    scale: Tensor | float
    # centered factors: those before centering, and the masks to center over
    uncentered: tuple[Tensor, Tensor] | None = None

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
        if self.uncentered is not None:
            d_queries = _centered(d_queries, queries.mask)
            if d_keys is not None:
                d_keys = _centered(d_keys, (keys or queries).mask)
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

    def centering_floor(self) -> Tensor:
        """The norm [N, 1] up to which the centered matrix counts as 0 (contract section 3)."""
        assert self.uncentered is not None
        queries, keys = (x.double() for x in self.uncentered)
        square = (_moment(queries) * _moment(keys)).sum((1, 2)).clamp(min=0)
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
    query_rows = _masked(queries, inputs.mask, inputs.dtype)
    key_rows = None if keys is None else _masked(keys, inputs.key_mask, inputs.dtype)
    if isinstance(affinity, SqEuclidean):
        # distances ignore a common offset, and float32 does not
        origin = _mean(
            *((query_rows, inputs.mask) if key_rows is None else (key_rows, inputs.key_mask))
        )
        query_rows = _masked(query_rows - origin, inputs.mask, inputs.dtype)
        key_rows = (
            None if key_rows is None else _masked(key_rows - origin, inputs.key_mask, inputs.dtype)
        )
    query_operand = _operand(affinity, query_rows, inputs.mask)
    key_operand = None if key_rows is None else _operand(affinity, key_rows, inputs.key_mask)
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
    centered_f = _centered(f, query_operand.mask)
    centered_k = centered_f if f is k else _centered(k, (key_operand or query_operand).mask)
    return Side(query_operand, key_operand, centered_f, centered_k, factor, uncentered=(f, k))


def _operand(affinity: Affinity, rows: Tensor, mask: Tensor | None) -> Operand:
    column = None if mask is None else mask.unsqueeze(-1)
    if not isinstance(affinity, Cosine):
        return Operand(affinity, rows, None, column)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    tiny = norm <= affinity.eps
    # a norm that overflowed would give a plausible 0
    inverse = norm.masked_fill(tiny, 1.0).reciprocal().masked_fill(norm.isinf(), torch.nan)
    inverse = inverse.masked_fill(tiny, 0.0)
    return Operand(affinity, rows * inverse, inverse, column)


def _masked(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """[N, 1, D], over the valid items; the others are 0 already."""
    count = max(x.shape[1], 1) if mask is None else mask.sum(1).clamp(min=1)[:, None, None]
    return (x.sum(1, keepdim=True, dtype=torch.float64) / count).to(x.dtype)


def _centered(x: Tensor, column: Tensor | None) -> Tensor:
    """x minus its mean over the valid rows; masked rows stay 0."""
    mask = None if column is None else column.squeeze(-1)
    return _masked(x - _mean(x, mask), mask, x.dtype)


def _moment(x: Tensor) -> Tensor:
    return x.mT @ x
