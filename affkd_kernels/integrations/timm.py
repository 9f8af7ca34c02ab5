"""A distillation task for timm's training script and for code that uses ``timm.task``."""

from __future__ import annotations

from typing import Any

import torch
from timm.task import FeatureDistillationTask
from torch import Tensor, nn

from ._relation import resolve

__all__ = ["RelationalDistillationTask"]


class RelationalDistillationTask(FeatureDistillationTask):
    """Matches the relations between a batch's pooled features, those in front of the classifier.

    No projection is made: the feature lengths of student and teacher may differ.

    Args:
        student_model, teacher_model, criterion, task_loss_weight, distill_loss_weight and the rest:
            as in ``timm.task.FeatureDistillationTask``.
        relation: a loss module called with (student [B, Ds], teacher [B, Dt]), or the name of a
            preset.

    Example::

        task = RelationalDistillationTask(
            student_model=timm.create_model("resnet18"),
            teacher_model="resnet50",
            relation=affkd.preset("sp", reduction="batchmean"),
            distill_loss_weight=46.9,
        )
        task(images, labels)["loss"].backward()
    """

    student_mean: Tensor
    student_std: Tensor

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module,
        *,
        relation: nn.Module | str = "sp",
        **options: Any,
    ) -> None:
        # equal lengths, whatever the models say, are what makes the base class add no projection
        super().__init__(
            student_model,
            teacher_model,
            student_feature_dim=1,
            teacher_feature_dim=1,
            **options,
        )
        self.relation = resolve(relation)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The losses of images [B, C, H, W] with labels [B].

        Returns:
            ``loss``, ``output`` (the student's logits), ``task_loss`` and ``kd_loss`` (unweighted).
        """
        logits, features = self.trainable_module(input)
        with torch.no_grad():
            images = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            teacher_features = self.teacher(images, return_features=True)
        task_loss = self.criterion(logits, target)
        relation_loss = self.relation(features, teacher_features)
        total = self.task_loss_weight * task_loss + self.distill_loss_weight * relation_loss
        return {"loss": total, "output": logits, "task_loss": task_loss, "kd_loss": relation_loss}
