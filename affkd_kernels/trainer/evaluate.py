"""How good a network is: accuracy of its head, and 5-nearest-neighbor accuracy of its features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from affkd_kernels.trainer.config import NEIGHBORS
from affkd_kernels.trainer.data import ImageData
from affkd_kernels.trainer.models import Classifier


@torch.no_grad()
def outputs(model: Classifier, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] and feature vectors [N, D] in evaluation mode."""
    training = model.training
    model.eval()
    features = torch.cat([model.features(part) for part in images.split(batch_size)])
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
    nearest = torch.cdist(queries, gallery).topk(neighbors, largest=False).indices  # [M, 5]
    votes = F.one_hot(gallery_labels[nearest]).sum(1)  # [M, classes]
    return _percentage(votes.argmax(1) == labels)


def evaluate(model: Classifier, data: ImageData) -> dict[str, float]:
    """Test loss, accuracy and neighbor accuracy, the last two in percent.

    The gallery of the neighbor search is the whole training set with its labels, whatever labels
    the run was given: it judges the features and takes no part in training.
    """
    logits, queries = outputs(model, data.test_images)
    _, gallery = outputs(model, data.train_images)
    return {
        "test_loss": F.cross_entropy(logits, data.test_labels).item(),
        "test_accuracy": _percentage(logits.argmax(1) == data.test_labels),
        "neighbor_accuracy": neighbor_accuracy(
            gallery, data.train_labels, queries, data.test_labels
        ),
    }


def _percentage(right: Tensor) -> float:
    return 100.0 * right.double().mean().item()
