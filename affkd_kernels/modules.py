"""The losses as modules, for training code that configures first and calls later."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.nn.modules.loss import _Loss

from .components import Affinity, Loss, Normalization
from .functional import evaluate
from .spec import LossSpec, make_spec


class AffinityLoss(_Loss):
    """:func:`affkd_kernels.affinity_loss` with its static options fixed.

    A ``torch.nn.modules.loss._Loss`` without parameters or buffers: its ``state_dict`` is empty.

    Args:
        affinity, normalization, loss: components, or shorthands such as ``"rbf(gamma=0.4)"``.
        reduction, weight, items, diagonal, diagonal_offset, detach_teacher, backend, algorithm,
        max_workspace_bytes: as in :func:`affkd_kernels.affinity_loss`.
        process_group: the ranks whose rows make one batch, as in `affinity_loss`.

    Raises:
        TypeError, ValueError: unknown names or options, or an invalid triple.

    Example:
        >>> similarity_preserving = AffinityLoss("gram", "row_l2", "mse", reduction="batchmean")
        >>> similarity_preserving(student_features, teacher_features).backward()
    """

    def __init__(
        self,
        affinity: Affinity | str = "gram",
        normalization: Normalization | str = "none",
        loss: Loss | str = "mse",
        *,
        reduction: str = "mean",
        process_group: Any = None,
        **options: Any,
    ) -> None:
        self._spec = make_spec(affinity, normalization, loss, reduction=reduction, **options)
        super().__init__(reduction=reduction)
        self.process_group = process_group

    @property
    def spec(self) -> LossSpec:
        """The validated triple and its options."""
        return self._spec

    @property
    def reduction(self) -> str:
        return self._spec.reduction

    @reduction.setter
    def reduction(self, reduction: str) -> None:
        self._spec = dataclasses.replace(self._spec, reduction=reduction)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        pair_mask: Tensor | None = None,
        row_weight: Tensor | None = None,
        student_keys: Tensor | None = None,
        teacher_keys: Tensor | None = None,
        student_scale: Tensor | float | None = None,
        teacher_scale: Tensor | float | None = None,
    ) -> Tensor:
        """The loss of student [..., Q, Ds] against teacher [..., Q, Dt]; see `affinity_loss`."""
        return evaluate(
            self.spec,
            student,
            teacher,
            student_keys,
            teacher_keys,
            mask,
            key_mask,
            pair_mask,
            row_weight,
            student_scale,
            teacher_scale,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        spec = self.spec
        parts = [str(spec.affinity), str(spec.normalization), str(spec.loss)]
        parts += [f"reduction={spec.reduction!r}", f"weight={spec.weight!r}"]
        for field in dataclasses.fields(spec)[5:]:
            value = getattr(spec, field.name)
            if value != field.default:
                parts.append(f"{field.name}={value!r}")
        return ", ".join(parts)
