"""The losses of this package in torchdistill's YAML files.

Name this module under ``dependencies`` and use the key ``RelationalLoss``; docs/integrations.md has
a whole file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from ..modules import AffinityLoss
from ._relation import resolve

__all__ = ["RelationalLoss"]


@register_mid_level_loss
class RelationalLoss(nn.Module):
    """An affinity loss between two captured tensors.

    Args:
        student_module_path, teacher_module_path: dotted paths of the modules whose ``io`` is taken.
        student_module_io, teacher_module_io: ``"output"`` or ``"input"``.
        preset: the name of a preset; without it ``affinity``, ``normalization`` and ``loss`` among
            the options make an `AffinityLoss`.
        options: of the preset or of the `AffinityLoss`.

    Raises:
        TypeError, ValueError: as `affkd.preset` and `affkd.AffinityLoss`.
    """

    def __init__(
        self,
        student_module_path: str,
        teacher_module_path: str,
        student_module_io: str = "output",
        teacher_module_io: str = "output",
        preset: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.student = (student_module_path, student_module_io)
        self.teacher = (teacher_module_path, teacher_module_io)
        self.relation = AffinityLoss(**options) if preset is None else resolve(preset, **options)

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Tensor]],
        teacher_io_dict: Mapping[str, Mapping[str, Tensor]],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of the captured tensors; targets and anything else are not used."""
        student_path, student_io = self.student
        teacher_path, teacher_io = self.teacher
        return self.relation(
            student_io_dict[student_path][student_io], teacher_io_dict[teacher_path][teacher_io]
        )
