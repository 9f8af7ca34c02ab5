"""The third axis: how two normalized entries s = P_s and t = P_t are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Component, check_choice, check_number


@dataclass(frozen=True)
class Loss(Component):
    """Base of all pointwise losses; see :func:`register_loss` for adding one."""

    kind: ClassVar[str] = "loss"
    choices: ClassVar[dict[str, type[Component]]] = {}
    # compares distributions: rows of P must be one
    needs_distribution: ClassVar[bool] = False
    # takes log s without a guard: P must come from a softmax
    needs_softmax: ClassVar[bool] = False

    def pointwise(self, student: Tensor, teacher: Tensor) -> Tensor:
        """l(s, t) of P_s and P_t, both [N, Q, K]; only registered losses need it."""
        raise NotImplementedError(f"loss {self.name!r} defines no pointwise()")


def register_loss(component: type[Loss]) -> type[Loss]:
    """Add one's own loss by name: a frozen dataclass with ``name`` and ``pointwise()``.

    It runs on the reference path, and :func:`affkd_kernels.explain_plan` says so.
    """
    return Loss.register(component)


@Loss.register
@dataclass(frozen=True)
class MSE(Loss):
    """``(s - t)^2``."""

    name: ClassVar[str] = "mse"
    builtin: ClassVar[bool] = True


@Loss.register
@dataclass(frozen=True)
class L1(Loss):
    """``|s - t|``."""

    name: ClassVar[str] = "l1"
    builtin: ClassVar[bool] = True


@Loss.register
@dataclass(frozen=True)
class SmoothL1(Loss):
    """``(s - t)^2 / (2 beta)`` below beta, ``|s - t| - beta / 2`` above (RKD, Park et al. 2019)."""

    name: ClassVar[str] = "smooth_l1"
    builtin: ClassVar[bool] = True

    beta: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "beta", at_least=0)


@Loss.register
@dataclass(frozen=True)
class KL(Loss):
    """``t (log(t + eps) - log(s + eps))`` (PKT, Passalis & Tefas 2018, eq. 6).

    With a softmax: the exact form in log-softmax, without eps.

    Args:
        eps: guard of both logarithms.
        direction: ``"forward"`` KL(t || s), ``"reverse"`` KL(s || t), ``"symmetric"``: their sum.
    """

    name: ClassVar[str] = "kl"
    builtin: ClassVar[bool] = True
    needs_distribution: ClassVar[bool] = True

    eps: float = 1e-7
    direction: str = "forward"

    def __post_init__(self) -> None:
        check_number(self, "eps", above=0)
        check_choice(self, "direction", ("forward", "reverse", "symmetric"))


@Loss.register
@dataclass(frozen=True)
class CrossEntropy(Loss):
    """``-t log s``, with a softmax (SEED, Fang et al. 2021, eq. 4)."""

    name: ClassVar[str] = "cross_entropy"
    builtin: ClassVar[bool] = True
    needs_distribution: ClassVar[bool] = True
    needs_softmax: ClassVar[bool] = True
