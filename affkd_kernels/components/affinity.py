"""The first axis: how alike two items are (docs/semantics.md).

Throughout, for a query ``q`` and a key ``k``: ``g = q.k``, ``n_q = |q|^2``, ``n_k = |k|^2`` and
``sq = max(n_q + n_k - 2 g, 0)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from .base import Component, check_flag, check_integer, check_number

SCALES = ("1/D", "1/sqrt(D)")


@dataclass(frozen=True)
class Affinity(Component):
    """Base of all affinities. Subclass it, and decorate with :func:`register_affinity`, to add one.

    Args:
        clamp_min: ``A := max(A, clamp_min)``, with zero gradient below; None leaves A alone.
    """

    kind: ClassVar[str] = "affinity"
    choices: ClassVar[dict[str, type[Component]]] = {}

    clamp_min: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_number(self, "clamp_min", optional=True)

    @property
    def nonnegative(self) -> bool:
        """Whether A >= 0 for every input, which some normalizations and losses require."""
        return self.clamp_min is not None and self.clamp_min >= 0

    def matrix(self, queries: Tensor, keys: Tensor) -> Tensor:
        """A [N, Q, K] of queries [N, Q, D] and keys [N, K, D]; only registered affinities need it.

        ``keys is queries`` for a self-affinity. ``clamp_min`` and masks are applied by the caller.
        """
        raise NotImplementedError(f"affinity {self.name!r} defines no matrix()")


def register_affinity(component: type[Affinity]) -> type[Affinity]:
    """Add one's own affinity by name: a frozen dataclass with ``name`` and ``matrix()``.

    It runs on the reference path, and :func:`affkd_kernels.explain_plan` says so.
    """
    return Affinity.register(component)


@Affinity.register
@dataclass(frozen=True)
class Gram(Affinity):
    """``A = scale * g``, the inner product (SP, Tung & Mori 2019; CKA, Kornblith et al. 2019).

    Args:
        scale: a number, or ``"1/D"`` or ``"1/sqrt(D)"`` of each side's own feature length D.
        student_scale, teacher_scale: the same for one side; None takes ``scale``.
    """

    name: ClassVar[str] = "gram"
    builtin: ClassVar[bool] = True

    scale: float | str = 1.0
    student_scale: float | str | None = None
    teacher_scale: float | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("scale", "student_scale", "teacher_scale"):
            value = getattr(self, option)
            if isinstance(value, str):
                if value not in SCALES:
                    raise ValueError(
                        f"gram: {option} must be a number or one of {', '.join(SCALES)}, "
                        f"got {value!r}"
                    )
            else:
                check_number(self, option, optional=option != "scale")

    def scale_of(self, side: str, length: int) -> float:
        """The factor for ``side`` (``"student"`` or ``"teacher"``) with features of ``length``."""
        own = self.student_scale if side == "student" else self.teacher_scale
        scale = self.scale if own is None else own
        if isinstance(scale, str):
            return max(length, 1) ** (-1.0 if scale == "1/D" else -0.5)
        return float(scale)


@Affinity.register
@dataclass(frozen=True)
class Cosine(Affinity):
    """``A = u_q.u_k`` with ``u = x / |x|`` (PKT, Passalis & Tefas 2018, eq. 2, is ``shifted``).

    Args:
        eps: ``u = 0``, with gradient 0, where ``|x| <= eps``.
        shifted: ``A = (1 + u_q.u_k) / 2``, which lies in [0, 1].
    """

    name: ClassVar[str] = "cosine"
    builtin: ClassVar[bool] = True

    eps: float = 1e-12
    shifted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "eps", at_least=0)
        check_flag(self, "shifted")

    @property
    def nonnegative(self) -> bool:
        return self.shifted or super().nonnegative


@Affinity.register
@dataclass(frozen=True)
class SqEuclidean(Affinity):
    """``A = sq``, the squared distance (IRG, Liu et al. 2019)."""

    name: ClassVar[str] = "sqeuclidean"
    builtin: ClassVar[bool] = True

    @property
    def nonnegative(self) -> bool:
        return True


@Affinity.register
@dataclass(frozen=True)
class Euclidean(Affinity):
    """``A = sqrt(max(sq, eps))``; gradient 0 where ``sq <= eps``; exactly 0 on the diagonal.

    (RKD, Park et al. 2019, eq. 6, before the normalization.)
    """

    name: ClassVar[str] = "euclidean"
    builtin: ClassVar[bool] = True

    eps: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "eps", at_least=0)

    @property
    def nonnegative(self) -> bool:
        return True


@Affinity.register
@dataclass(frozen=True)
class RBF(Affinity):
    """``A = exp(-gamma * sq)``, a Gaussian (CC, Peng et al. 2019, eq. 5).

    Args:
        gamma: the inverse squared width, > 0.
        unit: of unit-length features (zero where ``|x| <= eps``); False takes them as they are.
        taylor_order: P; ``exp(-2 gamma) * sum_{p<=P} (2 gamma g)^p / p!`` in place of the
            exponential (CC, eq. 6); needs ``unit``.
        eps: the length up to which a feature counts as zero.
    """

    name: ClassVar[str] = "rbf"
    builtin: ClassVar[bool] = True

    gamma: float = 0.4
    unit: bool = True
    taylor_order: int | None = None
    eps: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "gamma", above=0)
        check_flag(self, "unit")
        check_integer(self, "taylor_order", at_least=0, optional=True)
        check_number(self, "eps", at_least=0)
        if self.taylor_order is not None and not self.unit:
            raise ValueError("rbf: taylor_order needs unit=True; got unit=False")

    @property
    def nonnegative(self) -> bool:
        # the truncated series of exp has no real root for even order
        return self.taylor_order is None or self.taylor_order % 2 == 0 or super().nonnegative


@Affinity.register
@dataclass(frozen=True)
class Polynomial(Affinity):
    """``A = (scale * g + offset)^degree``, of the features or (``unit``) of their directions."""

    name: ClassVar[str] = "polynomial"
    builtin: ClassVar[bool] = True

    degree: int = 2
    scale: float = 1.0
    offset: float = 0.0
    unit: bool = False

    # the length up to which a feature counts as zero, for `unit`
    eps: ClassVar[float] = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "degree", at_least=1)
        check_number(self, "scale")
        check_number(self, "offset")
        check_flag(self, "unit")

    @property
    def nonnegative(self) -> bool:
        return self.degree % 2 == 0 or super().nonnegative
