"""What every fused kernel is asked for, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Needs(NamedTuple):
    """The inputs whose gradient is wanted."""

    student: bool = True
    student_keys: bool = False
    student_scale: bool = False

    def exchanged(self) -> Needs:
        """The same of a call whose queries and keys traded places (`Inputs.exchanged`)."""
        return Needs(self.student_keys, self.student, self.student_scale)


class LossAndGrad(NamedTuple):
    """A loss and its gradients, all in the computation dtype (float32 or float64).

    Gradients stay in that dtype until the backward has multiplied them by the incoming gradient,
    so that a loss scaler's factor reaches them before half precision can flush them to zero.
    """

    loss: Tensor  # []
    grad_student: Tensor | None = None  # [N, Q, Ds]
    grad_student_keys: Tensor | None = None  # [N, K, Ds]
    grad_student_scale: Tensor | None = None  # []

    def exchanged(self) -> LossAndGrad:
        """The result of the call that this one's queries and keys traded places in."""
        return self._replace(
            grad_student=self.grad_student_keys, grad_student_keys=self.grad_student
        )

    def plus(self, other: LossAndGrad) -> LossAndGrad:
        """Adds a result with the same gradients, in place."""
        for mine, others in zip(self, other, strict=True):
            if mine is not None:
                mine.add_(others)  # type: ignore[arg-type]
        return self


# (student, teacher, whether the student's gradient is wanted) -> the loss and that gradient, which
# is shaped as the student
PlainCall = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
