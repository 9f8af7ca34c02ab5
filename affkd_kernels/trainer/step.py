"""What one step computes: networks, batch and objective brought together."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from affkd_kernels.trainer.config import TrainConfig
from affkd_kernels.trainer.data import Batch, BatchOrder, ImageData, labeled_rows
from affkd_kernels.trainer.data.augment import apply_changes, draw_changes
from affkd_kernels.trainer.models import Classifier, build_model
from affkd_kernels.trainer.networks import ObservedNetwork
from affkd_kernels.trainer.objective import WHOLE, Objective, Outputs, Shares
from affkd_kernels.trainer.processes import ALONE, Processes

TeacherAnswers = Callable[[Tensor, Tensor], Outputs]


def initial_student(config: TrainConfig, data: ImageData) -> Classifier:
    """The student as a run with this configuration starts."""
    model = build_model(config.student, data.train_images.channels, data.classes, config.seed)
    return model.to(data.train_images.device)


def batch_order(config: TrainConfig, data: ImageData, smallest: int = 1) -> BatchOrder:
    """The batches as a run with this configuration takes them, from the first."""
    labeled = labeled_rows(data.train_labels, config.data.labels_per_class, config.seed)
    return BatchOrder(len(data.train_labels), labeled, config.data, config.seed, smallest)


def with_changes(batch: Batch, config: TrainConfig, step: int) -> Batch:
    """The batch with what augmentation does to each of its images in this step."""
    changes = draw_changes(config.data, len(batch.images), config.seed, step)
    return batch._replace(changes=changes)


def own_part(
    batch: Batch, index: int, count: int, processes: Processes = ALONE
) -> tuple[Batch, Shares]:
    """This process's share of one of ``count`` parts of a batch, and what it counts for.

    The weights make the sum over the parts, averaged over the processes as their gradients are, the
    mean over the whole batch.
    """
    part = batch.part(index, count)
    own = part.part(processes.rank, processes.count)
    return own, Shares(
        cross_entropy=len(own.labeled) * processes.count / max(1, len(batch.labeled)),
        kd=len(own.rows) * processes.count / len(batch.rows),
        # the losses themselves average over the processes
        relation=len(part.rows) / len(batch.rows),
    )


def step_losses(
    objective: Objective,
    network: ObservedNetwork,
    teacher: TeacherAnswers | None,
    data: ImageData,
    batch: Batch,
    padding: int = 0,
    shares: Shares = WHOLE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total with its graph, and the detached terms by name."""
    rows, labeled = batch.rows, batch.labeled
    pixels = data.train_images.pixels[batch.images]
    if batch.changes is not None:
        pixels = apply_changes(pixels, batch.changes, padding)
    images = data.train_images.standardize(pixels)
    student = network(images)
    answers = teacher(rows, images[: len(rows)]) if teacher is not None else None
    labeled_logits = student.logits[len(rows) :] if batch.apart else student.logits
    labels = data.train_labels[labeled]
    total, terms = objective(student.first(len(rows)), answers, labeled_logits, labels, shares)
    if network.distributed:
        # the processes wait for the gradient of every weight, of a head that no term trains too
        total = total + 0.0 * student.logits.sum()
    return total, terms
