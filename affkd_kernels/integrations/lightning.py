"""A LightningModule that trains a student beside a frozen teacher: a recipe to subclass or copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from ..features import FeatureCapture
from ..multi import MultiLoss

__all__ = ["RelationalDistillationModule"]


class RelationalDistillationModule(lightning.LightningModule):
    """Cross-entropy plus relational losses on features captured by name.

    The teacher is never trained, always in evaluation mode, and not part of the checkpoints.

    Args:
        student, teacher: models from a batch's inputs to logits.
        losses: the relational terms, on the names of the taps below.
        student_taps, teacher_taps: ``{"name": "dotted.path"}``, see `FeatureCapture`.
        make_optimizer: from the trainable parameters to an optimizer.
        criterion: the supervised loss of (logits, labels); None trains without labels.

    Example::

        module = RelationalDistillationModule(
            student, teacher, MultiLoss({"sp": (affkd.preset("sp"), "map", "map", 3000.0)}),
            student_taps={"map": "layer4"}, teacher_taps={"map": "layer4"},
            make_optimizer=lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
        )
        lightning.Trainer(max_epochs=240).fit(module, train_loader)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        losses: MultiLoss,
        *,
        student_taps: Mapping[str, Any],
        teacher_taps: Mapping[str, Any],
        make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        criterion: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        # here too: the trainer keeps the modes it finds, and does not call train()
        self.teacher = teacher.eval().requires_grad_(False)
        self.losses = losses
        self.criterion = criterion
        self._make_optimizer = make_optimizer
        self._student_features = FeatureCapture(student, student_taps)
        self._teacher_features = FeatureCapture(teacher, teacher_taps)
        # a checkpoint holds no teacher
        self.strict_loading = False

    def forward(self, inputs: Tensor) -> Tensor:
        return self.student(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        inputs, labels = batch
        logits = self.student(inputs)
        with torch.no_grad():
            self.teacher(inputs)
        total, terms = self.losses(self._student_features, self._teacher_features)
        if self.criterion is not None:
            supervised = self.criterion(logits, labels)
            total, terms = total + supervised, {"supervised": supervised.detach(), **terms}
        self.log_dict({f"train/{name}": value for name, value in terms.items()})
        return total

    def train(self, mode: bool = True) -> RelationalDistillationModule:
        super().train(mode)
        self.teacher.eval()
        return self

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._make_optimizer([p for p in self.parameters() if p.requires_grad])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith("teacher.")]:
            del state[name]
