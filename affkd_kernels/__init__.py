"""Relational knowledge distillation losses with fused kernels.

A loss is a triple *affinity x normalization x loss* (Li & Maki, arXiv 2209.15555):

    >>> import affkd_kernels as affkd
    >>> affkd.affinity_loss(student, teacher, "gram", "row_l2", "mse", reduction="batchmean")
    >>> criterion = affkd.preset("rkd_distance", weight=25.0)
"""

from . import components, reference
from .angle import RKDAngleLoss, rkd_angle_loss
from .bank import FeatureBank
from .components import *  # noqa: F403
from .components import __all__ as _components
from .features import FeatureCapture, Tap
from .functional import affinity_loss, affinity_matrix, explain_plan
from .modules import AffinityLoss
from .multi import MultiLoss, Term, non_finite_terms
from .presets import describe, list_presets, preset
from .weighting import suggest_weight

__version__ = "0.1.0"

__all__ = [
    "AffinityLoss",
    "FeatureBank",
    "FeatureCapture",
    "MultiLoss",
    "RKDAngleLoss",
    "Tap",
    "Term",
    "affinity_loss",
    "affinity_matrix",
    "components",
    "describe",
    "explain_plan",
    "list_presets",
    "non_finite_terms",
    "preset",
    "reference",
    "rkd_angle_loss",
    "suggest_weight",
    *_components,
]
