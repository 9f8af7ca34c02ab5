"""Weights for relational terms by one rule: each pulls as hard as the cross-entropy does."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace

import torch.nn.functional as F

from affkd_kernels.trainer.config import FEATURES, TermConfig, TrainConfig
from affkd_kernels.trainer.data import BatchOrder, ImageData, labeled_rows
from affkd_kernels.trainer.models import build_model
from affkd_kernels.trainer.networks import Teacher
from affkd_kernels.trainer.objective import build_relation
from affkd_kernels.weighting import suggest_weight


def balanced_terms(
    terms: Mapping[str, TermConfig],
    config: TrainConfig,
    data: ImageData,
    teacher: Teacher,
    share: float = 1.0,
    batches: int = 8,
) -> dict[str, TermConfig]:
    """The terms with their weights multiplied by one common factor.

    With it the norm of the terms' gradient at the student's features is ``share`` times that of
    the cross-entropy: the median over the first ``batches`` batches, at the student's initial
    weights. Terms that belong together, as RKD's two do, keep their proportion. All terms must
    compare the module called ``features``.
    """
    student = build_model(config.student, data.train_images.shape[1], data.classes, config.seed)
    student.to(data.train_images.device)
    relation = build_relation(terms)
    order = BatchOrder(
        len(data.train_labels), labeled_rows(data.train_labels, None, 0), config.data, config.seed
    )
    factors = []
    for batch, _ in zip(order.epoch(), range(batches), strict=False):
        features = student.features(data.train_images[batch.rows])
        cross_entropy = F.cross_entropy(student.head(features), data.train_labels[batch.rows])
        related, _ = relation({FEATURES: features}, teacher(batch.rows).features)
        factors.append(suggest_weight(related, cross_entropy, at=features, share=share))
    factor = statistics.median(factors)
    return {
        name: replace(term, weight=(term.weight or 1.0) * factor) for name, term in terms.items()
    }
