"""Weights for relational terms by one rule: each pulls as hard as the cross-entropy does."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch.nn.functional as F

from affkd_kernels.modules import AffinityLoss
from affkd_kernels.trainer.config import FEATURES, TermConfig, TrainConfig
from affkd_kernels.trainer.data import ImageData
from affkd_kernels.trainer.networks import Teacher
from affkd_kernels.trainer.objective import build_relation, build_term
from affkd_kernels.trainer.step import batch_order, initial_student
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
    weights. Terms that belong together, as RKD's two do, keep their proportion.

    Raises:
        ValueError: a term that compares another module than ``features``, where the cross-entropy's
            gradient is another one; and what ``suggest_weight`` raises.
    """
    for name, term in terms.items():
        if {term.student_feature, term.teacher_feature} != {FEATURES}:
            raise ValueError(
                f"a share is measured at the module {FEATURES!r}, but term {name!r} compares "
                f"{term.student_feature!r} with {term.teacher_feature!r}; give weights for it"
            )
    student = initial_student(config, data)
    relation = build_relation(terms)
    everything = replace(config, data=replace(config.data, labels_per_class=None))
    order = batch_order(everything, data)
    factors = []
    for batch, _ in zip(order.epoch(), range(batches), strict=False):
        images = data.train_images[batch.rows]
        features = student.features(images)
        cross_entropy = F.cross_entropy(student.head(features), data.train_labels[batch.rows])
        related, _ = relation({FEATURES: features}, teacher(batch.rows, images).features)
        factors.append(suggest_weight(related, cross_entropy, at=features, share=share))
    factor = statistics.median(factors)
    return {
        name: replace(term, weight=_own_weight(name, term) * factor) for name, term in terms.items()
    }


def _own_weight(name: str, term: TermConfig) -> float:
    # asked of the loss, because a preset may have one that is not 1, as CKA's 0.5
    loss = build_term(name, term)
    return loss.spec.weight if isinstance(loss, AffinityLoss) else cast(float, loss.weight)
