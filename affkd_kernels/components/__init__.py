"""The three modules of an affinity loss, after Li & Maki (arXiv 2209.15555).

Frozen dataclasses: what to compute, validated, without a line of how. The reference path and every
kernel read them.
"""

from .affinity import (
    RBF,
    Affinity,
    Cosine,
    Euclidean,
    Gram,
    Polynomial,
    SqEuclidean,
    register_affinity,
)
from .loss import KL, L1, MSE, CrossEntropy, Loss, SmoothL1, register_loss
from .normalization import (
    Frobenius,
    Max,
    Mean,
    NoNormalization,
    Normalization,
    RowL1,
    RowL2,
    RowSum,
    Softmax,
    register_normalization,
)
from .triple import check_triple

__all__ = [
    "KL",
    "L1",
    "MSE",
    "RBF",
    "Affinity",
    "Cosine",
    "CrossEntropy",
    "Euclidean",
    "Frobenius",
    "Gram",
    "Loss",
    "Max",
    "Mean",
    "NoNormalization",
    "Normalization",
    "Polynomial",
    "RowL1",
    "RowL2",
    "RowSum",
    "SmoothL1",
    "Softmax",
    "SqEuclidean",
    "check_triple",
    "register_affinity",
    "register_loss",
    "register_normalization",
]
