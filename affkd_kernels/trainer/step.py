"""What one step computes: networks, batch and objective brought together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from affkd_kernels.trainer.config import TrainConfig
from affkd_kernels.trainer.data import Batch, BatchOrder, ImageData, labeled_rows
from affkd_kernels.trainer.models import Classifier, build_model
from affkd_kernels.trainer.networks import ObservedNetwork
from affkd_kernels.trainer.objective import Objective, Outputs

TeacherAnswers = Callable[[Tensor], Outputs]


def initial_student(config: TrainConfig, data: ImageData) -> Classifier:
    """The student as a run with this configuration starts."""
    model = build_model(config.student, data.train_images.shape[1], data.classes, config.seed)
    return model.to(data.train_images.device)


def batch_order(config: TrainConfig, data: ImageData) -> BatchOrder:
    """The batches as a run with this configuration takes them, from the first."""
    labeled = labeled_rows(data.train_labels, config.data.labels_per_class, config.seed)
    return BatchOrder(len(data.train_labels), labeled, config.data, config.seed)


def step_losses(
    objective: Objective,
    network: ObservedNetwork,
    teacher: TeacherAnswers | None,
    data: ImageData,
    batch: Batch,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total with its graph, and the detached terms by name."""
    rows, labeled = batch
    apart = labeled is not rows
    student = network(data.train_images[torch.cat([rows, labeled]) if apart else rows])
    answers = teacher(rows) if teacher is not None else None
    labeled_logits = student.logits[len(rows) :] if apart else student.logits
    labels = data.train_labels[labeled]
    return objective(student.first(len(rows)), answers, labeled_logits, labels)
