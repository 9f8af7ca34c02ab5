"""What a kernel is compiled for: the stages of a triple and the shape of its tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import triton.language as tl

from ... import components as c
from ...spec import LossSpec
from .. import choices as stage

_DISTANCES = ("squared_distance", "distance", "gaussian")
_PER_ROW = ("none", "row_l2", "row_l1", "row_sum", "softmax")
_L2 = ("row_l2", "frobenius", "frobenius_centered")


@dataclass(frozen=True, repr=False)
class Choices:
    """The stages of a triple and the options that change the code of a kernel."""

    pair: str
    unit: bool
    order: int
    clamped: bool
    normalization: str
    loss: str
    diagonal: str
    has_diagonal: bool
    self_affinity: bool
    query_mask: bool
    key_mask: bool
    pair_mask: bool
    row_weight: bool
    number: Any  # tl.float32 or tl.float64
    double: bool
    centered_features: bool
    # the features are copied less their mean
    copied: bool

    def __repr__(self) -> str:
        """With all that kernels ask of it: Triton's cache, which outlives a version of this file,
        tells kernels apart by their source and by this text."""
        names = [field.name for field in fields(self)]
        names += [name for name, value in vars(Choices).items() if isinstance(value, property)]
        return f"Choices({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def distance(self) -> bool:
        return self.pair in _DISTANCES

    @property
    def softmax(self) -> bool:
        return self.normalization == "softmax"

    @property
    def kinked(self) -> bool:
        """Losses with a kink at s = t tell equal from almost equal: A / A must be exactly 1."""
        return self.loss in ("l1", "smooth_l1")

    @property
    def divergence(self) -> bool:
        return self.loss.startswith("kl_")

    @property
    def l2(self) -> bool:
        return self.normalization in _L2

    @property
    def largest(self) -> bool:
        return self.normalization in ("max", "max_detached")

    @property
    def whole(self) -> bool:
        """One statistic per matrix."""
        return self.normalization not in _PER_ROW

    @property
    def centered(self) -> bool:
        """The pairs themselves are centered, their features not being enough."""
        return self.normalization == "frobenius_centered" and not self.centered_features

    @property
    def has_correction(self) -> bool:
        """Whether a gradient flows through the statistic."""
        return self.normalization not in ("none", "max_detached")

    @property
    def needs_second(self) -> bool:
        return self.softmax or self.kinked or self.largest

    @property
    def counted(self) -> bool:
        """Whether pairs may be missing, so that they have to be counted."""
        return self.query_mask or self.key_mask or self.pair_mask or self.diagonal == "exclude"

    @property
    def alike(self) -> bool:
        """Whether dA_ij = dA_ji: the rows of a symmetric matrix differ in nothing."""
        one = self.whole or self.normalization == "none"
        return one and not self.row_weight and not self.pair_mask

    @property
    def closed_correction(self) -> bool:
        """c = 2 w sum_j (P - T) P follows from sums of squares and of products."""
        matrix = self.normalization in ("frobenius", "frobenius_centered") and not self.row_weight
        return self.loss == "mse" and (self.normalization == "row_l2" or matrix)

    @property
    def known_correction(self) -> bool:
        """c needs no sweep of its own, so that losses and gradients share one."""
        if self.softmax:
            return self.loss in ("kl_forward", "cross_entropy")
        return self.closed_correction or not self.has_correction

    @property
    def matrix_correction(self) -> bool:
        """c is one of a whole matrix."""
        return self.whole and self.has_correction

    @property
    def row_correction(self) -> bool:
        """c is one of each row, and not the -1 of a softmax."""
        known = self.softmax and self.known_correction
        return self.has_correction and not self.whole and not known

    @property
    def exact_difference(self) -> bool:
        """Whether s - t of nearly equal s and t, each an affinity times a number, keeps digits."""
        return self.loss == "mse" and self.normalization not in ("none", "softmax")

    @property
    def flat_diagonal(self) -> bool:
        return self.has_diagonal and (self.distance or self.diagonal == "zero")

    @property
    def uncentered_slope(self) -> bool:
        """Whether d loss / dP of a centered P is not centered as it is: with mse it is."""
        return self.loss != "mse" or self.row_weight

    @property
    def centered_gradient(self) -> bool:
        """Whether dA needs centering."""
        return self.centered and self.uncentered_slope

    @property
    def centered_product(self) -> bool:
        """Whether the gradient of the features needs it instead: that of centered ones."""
        return self.centered_features and self.uncentered_slope


@dataclass(frozen=True)
class Shape:
    """The sizes of a tile of pairs, and how its products are taken."""

    rows: int
    columns: int
    inner: int
    precision: str  # of tl.dot
    upcast: bool  # operands to the computation dtype first
    # below the diagonal of a self-affinity: the transpose of the tile above it, to the last bit
    mirrored: bool = False
    # where 32 bits do not hold an address inside a tile
    wide: bool = False


def make_choices(
    spec: LossSpec,
    self_affinity: bool,
    masks: tuple[bool, bool, bool],
    row_weight: bool,
    dtype: torch.dtype,
) -> Choices:
    """The choices of a call that is computed in `dtype`."""
    a = spec.affinity
    pair, unit = stage.pair_function(a), stage.unit(a)
    kind = stage.normalization_kind(spec.normalization)
    bound = stage.lower_bound(a)
    plain = (pair, unit, spec.diagonal, bound) == ("linear", False, "keep", None)
    # centering the features of an inner product centers the matrix without its cancellation
    centers = kind == "frobenius_centered" and plain
    return Choices(
        pair=pair,
        unit=unit,
        order=stage.order(a),
        clamped=bound is not None,
        normalization=kind,
        loss=stage.loss_kind(spec.loss),
        diagonal=spec.diagonal,
        has_diagonal=self_affinity or spec.diagonal_offset is not None,
        self_affinity=self_affinity,
        query_mask=masks[0],
        key_mask=masks[1],
        pair_mask=masks[2],
        row_weight=row_weight,
        number=tl.float64 if dtype == torch.float64 else tl.float32,
        double=dtype == torch.float64,
        centered_features=centers,
        copied=centers or (pair in _DISTANCES and not unit),
    )


def make_numbers(spec: LossSpec, factor: float, dims: tuple[int, int]) -> tuple[float, ...]:
    """The numbers of a spec; the positions are those of layout.py."""
    a, n, loss = spec.affinity, spec.normalization, spec.loss
    softmax = n if isinstance(n, c.Softmax) else c.Softmax()
    bound = stage.lower_bound(a)
    numbers = (
        *stage.scales(a, dims),
        stage.offset(a),
        getattr(a, "eps", 0.0),
        -math.inf if bound is None else bound,
        getattr(n, "eps", 0.0),
        1 / softmax.tau_of("student"),
        1 / softmax.tau_of("teacher"),
        getattr(loss, "beta", 0.0),
        getattr(loss, "eps", 0.0),
        spec.weight * factor,
    )
    return tuple(map(float, numbers))
