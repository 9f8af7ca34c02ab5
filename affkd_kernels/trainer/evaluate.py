"""How good a network is: accuracy of its head, and 5-nearest-neighbor accuracy of its features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from affkd_kernels.trainer.config import NEIGHBORS
from affkd_kernels.trainer.data import ImageData, Images
from affkd_kernels.trainer.models import Classifier


@torch.no_grad()
def outputs(model: Classifier, images: Images, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] and feature vectors [N, D] in evaluation mode."""
    training = model.training
    model.eval()
    features = torch.cat([model.features(part) for part in images.batches(batch_size)])
    logits = model.head(features)
    model.train(training)
    return logits, features


def neighbor_accuracy(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    neighbors: int = NEIGHBORS,
) -> float:
    """Percentage of ``queries`` [M, D] whose nearest rows of ``gallery`` [N, D] vote for the
    right label, by Euclidean distance; a tie goes to the smaller label."""
    right = [
        _votes(gallery, gallery_labels, part, neighbors) == wanted
        for part, wanted in zip(queries.split(1000), labels.split(1000), strict=True)
    ]
    return percentage(torch.cat(right))


def _votes(gallery: Tensor, labels: Tensor, queries: Tensor, neighbors: int) -> Tensor:
    # some queries at a time: all distances of CIFAR would be 2 GB
    nearest = torch.cdist(queries, gallery).topk(neighbors, largest=False).indices  # [Q, 5]
    return F.one_hot(labels[nearest]).sum(1).argmax(1)


def evaluate(model: Classifier, data: ImageData, neighbors: bool = True) -> dict[str, float]:
    """Test loss, accuracy and, where asked for, neighbor accuracy; the last two in percent.

    The gallery of the neighbor search is the whole training set with its labels, whatever labels
    the run was given: it judges the features and takes no part in training.
    """
    logits, queries = outputs(model, data.test_images)
    scores = {
        "test_loss": F.cross_entropy(logits, data.test_labels).item(),
        "test_accuracy": percentage(logits.argmax(1) == data.test_labels),
    }
    if neighbors:
        _, gallery = outputs(model, data.train_images)
        scores["neighbor_accuracy"] = neighbor_accuracy(
            gallery, data.train_labels, queries, data.test_labels
        )
    return scores


def percentage(right: Tensor) -> float:
    return 100.0 * right.double().mean().item()
