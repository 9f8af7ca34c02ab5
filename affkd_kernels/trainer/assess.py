"""Everything that is asked of a finished network: ``affkd eval``."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from affkd_kernels.presets import preset
from affkd_kernels.trainer.config import TrainConfig
from affkd_kernels.trainer.data import ImageData, load_data
from affkd_kernels.trainer.evaluate import neighbor_accuracy, outputs, percentage
from affkd_kernels.trainer.networks import load_network
from affkd_kernels.trainer.run_folder import RunFolder


def assess(
    run: Path,
    checkpoint: Literal["last", "best"] = "last",
    root: str | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Scores of a run's network on its test images, also written into the run folder.

    Args:
        run: the run folder.
        checkpoint: which of its checkpoints.
        root: where the data set lies now; None is where the run found it.
        device: anything ``torch.device`` takes.

    Returns:
        ``top1``, ``top5``, ``neighbors`` (the vote of the five nearest training images) and
        ``retrieval`` (mean average precision of the test images among each other) in percent, and
        ``cka``, the similarity to the teacher's features. The last two are left out where no two
        test images have a class in common, and where the run has no teacher.
    """
    folder = RunFolder(run)
    config = folder.config()
    if root is not None:
        config = replace(config, data=replace(config.data, root=root))
    data = load_data(config.data).to(torch.device(device))
    path = folder.last_checkpoint if checkpoint == "last" else folder.best_checkpoint
    model = load_network(path, config.student, data)
    logits, features = outputs(model, data.test_images)
    gallery = outputs(model, data.train_images)[1]
    labels = data.test_labels
    scores = {
        "top1": top_accuracy(logits, labels, 1),
        "top5": top_accuracy(logits, labels, 5),
        "neighbors": neighbor_accuracy(gallery, data.train_labels, features, labels),
        "retrieval": retrieval_precision(features, labels),
        "cka": _similarity(config, run, data, features),
    }
    scores = {name: score for name, score in scores.items() if not math.isnan(score)}
    folder.write_evaluation(checkpoint, scores)
    return scores


def top_accuracy(logits: Tensor, labels: Tensor, count: int) -> float:
    """Percentage of rows [N, classes] whose label is among the ``count`` largest logits."""
    best = logits.topk(min(count, logits.shape[1])).indices  # [N, count]
    return percentage((best == labels[:, None]).any(1))


def retrieval_precision(features: Tensor, labels: Tensor) -> float:
    """Mean average precision, in percent, of each row as a query to all others by cosine.

    A row is relevant where it has the query's label; a query that no other row is relevant to has
    no precision and counts for nothing. NaN where there is no other query.
    """
    unit = F.normalize(features.float())
    everyone = torch.arange(len(labels), device=labels.device)
    # some queries at a time: the ranks of all would be an N x N matrix
    parts = [_precisions(unit, labels, queries) for queries in everyone.split(500)]
    return 100.0 * torch.cat(parts).double().mean().item()


def _precisions(unit: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    similarity = unit[queries] @ unit.T  # [Q, N]
    similarity[torch.arange(len(queries), device=queries.device), queries] = -torch.inf
    order = similarity.argsort(dim=1, descending=True, stable=True)[
        :, :-1
    ]  # the query itself is last
    relevant = (labels[order] == labels[queries][:, None]).float()
    ranks = torch.arange(1, order.shape[1] + 1, device=order.device)
    count = relevant.sum(1)
    precisions = (relevant.cumsum(1) / ranks * relevant).sum(1) / count
    return precisions[count > 0]


def _similarity(config: TrainConfig, run: Path, data: ImageData, features: Tensor) -> float:
    """Linear CKA of the features and the teacher's, over all test images; NaN without a teacher."""
    checkpoint = Path(config.teacher.checkpoint or run / "teacher" / "last.pt")
    if not config.needs_teacher() or not checkpoint.is_file():
        return math.nan
    teacher = load_network(checkpoint, config.teacher.model, data)
    target = outputs(teacher, data.test_images)[1]
    distance = preset("cka")(features.double(), target.double())  # 1 - CKA
    return 1.0 - distance.item()
