"""The second axis: what makes two affinity matrices comparable (docs/semantics.md).

A normalization divides A by one statistic per row or per matrix (``P = A / statistic``), or is a
softmax. The gradient flows through the statistic. Where the statistic is <= eps, P and its
gradient are 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from .base import Component, check_choice, check_flag, check_number


@dataclass(frozen=True)
class Normalization(Component):
    """Base of all normalizations; see :func:`register_normalization` for adding one."""

    kind: ClassVar[str] = "normalization"
    choices: ClassVar[dict[str, type[Component]]] = {}
    # rows of P are distributions whenever A >= 0, which `kl` needs
    distribution: ClassVar[bool] = False

    @property
    def needs_nonnegative(self) -> bool:
        """Whether the statistic makes sense for non-negative affinities only."""
        return False

    def normalize(self, affinity: Tensor, pairs: Tensor) -> Tensor:
        """P [N, Q, K] of A [N, Q, K]; ``pairs`` [N, Q, K] bool says which entries take part.

        A is 0 where a pair takes no part. Only registered normalizations need it.
        """
        raise NotImplementedError(f"normalization {self.name!r} defines no normalize()")


def register_normalization(component: type[Normalization]) -> type[Normalization]:
    """Add one's own normalization by name: a frozen dataclass with ``name`` and ``normalize()``.

    It runs on the reference path, and :func:`affkd_kernels.explain_plan` says so.
    """
    return Normalization.register(component)


@dataclass(frozen=True)
class _Guarded(Normalization):
    """A normalization whose statistic counts as nothing up to ``eps``."""

    eps: float = field(default=1e-12, kw_only=True)

    def __post_init__(self) -> None:
        check_number(self, "eps", at_least=0)


@Normalization.register
@dataclass(frozen=True)
class NoNormalization(Normalization):
    """``P = A`` (DINOv3's Gram loss; CC, Peng et al. 2019)."""

    name: ClassVar[str] = "none"
    builtin: ClassVar[bool] = True


@Normalization.register
@dataclass(frozen=True)
class RowL2(_Guarded):
    """Statistic ``sqrt(sum_j A_ij^2)`` (SP, Tung & Mori 2019, eq. 3)."""

    name: ClassVar[str] = "row_l2"
    builtin: ClassVar[bool] = True


@Normalization.register
@dataclass(frozen=True)
class RowL1(_Guarded):
    """Statistic ``sum_j |A_ij|`` (what torchdistill's SPKDLoss computes)."""

    name: ClassVar[str] = "row_l1"
    builtin: ClassVar[bool] = True
    distribution: ClassVar[bool] = True


@Normalization.register
@dataclass(frozen=True)
class RowSum(_Guarded):
    """Statistic ``sum_j A_ij`` of a non-negative A (PKT, Passalis & Tefas 2018, eq. 3)."""

    name: ClassVar[str] = "row_sum"
    builtin: ClassVar[bool] = True
    distribution: ClassVar[bool] = True

    @property
    def needs_nonnegative(self) -> bool:
        return True


@Normalization.register
@dataclass(frozen=True)
class Softmax(Normalization):
    """``P = softmax_j(A_ij / tau)`` (SEED, Fang et al. 2021; MiniLMv2, Wang et al. 2021).

    Args:
        tau: temperature, > 0.
        student_tau, teacher_tau: the temperature of one side; None takes ``tau``.
        axis: ``"row"``; ``"column"``, the row form of A' with query and key masks exchanged; or
            ``"both"``, the mean of the row loss and the column loss (CLIP-style).
    """

    name: ClassVar[str] = "softmax"
    builtin: ClassVar[bool] = True
    distribution: ClassVar[bool] = True

    tau: float = 1.0
    student_tau: float | None = None
    teacher_tau: float | None = None
    axis: str = "row"

    def __post_init__(self) -> None:
        check_number(self, "tau", above=0)
        check_number(self, "student_tau", above=0, optional=True)
        check_number(self, "teacher_tau", above=0, optional=True)
        check_choice(self, "axis", ("row", "column", "both"))

    def tau_of(self, side: str) -> float:
        """The temperature of ``side`` (``"student"`` or ``"teacher"``)."""
        own = self.student_tau if side == "student" else self.teacher_tau
        return self.tau if own is None else own


@Normalization.register
@dataclass(frozen=True)
class Frobenius(_Guarded):
    """Statistic ``||A||_F`` (with ``center``: linear CKA, Kornblith et al. 2019, eq. 4).

    Args:
        eps: the norm up to which the matrix counts as zero.
        center: first subtract row and column means and add the grand mean, over valid items
            (``H A H`` for a self-affinity). A centered norm <= 8 * machine epsilon * ||A||_F
            counts as zero.
    """

    name: ClassVar[str] = "frobenius"
    builtin: ClassVar[bool] = True

    center: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "center")


@Normalization.register
@dataclass(frozen=True)
class Mean(_Guarded):
    """Statistic: the mean of the entries > 0 (RKD, Park et al. 2019, eq. 7), or of more.

    Args:
        over: ``"positive"``, ``"all"``, or ``"offdiag"`` (all but the diagonal).
        eps: the mean up to which the matrix counts as zero.
    """

    name: ClassVar[str] = "mean"
    builtin: ClassVar[bool] = True

    over: str = "positive"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "over", ("positive", "all", "offdiag"))

    @property
    def needs_nonnegative(self) -> bool:
        return self.over != "positive"


@Normalization.register
@dataclass(frozen=True)
class Max(_Guarded):
    """Statistic ``max A`` (IRG, Liu et al. 2019); ties share the gradient evenly.

    Args:
        eps: the maximum up to which the matrix counts as zero.
        detach: treat the maximum as a constant (as IRG's published code does).
    """

    name: ClassVar[str] = "max"
    builtin: ClassVar[bool] = True

    detach: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "detach")
