"""Relational knowledge distillation losses with fused kernels.

A loss is a triple *affinity x normalization x loss* (Li & Maki, arXiv 2209.15555):

    >>> import affkd_kernels as affkd
    >>> affkd.affinity_loss(student, teacher, "gram", "row_l2", "mse", reduction="batchmean")
    >>> criterion = affkd.preset("rkd_distance", weight=25.0)
"""

from . import components, reference
from .components import *  # noqa: F403
from .components import __all__ as _components
from .functional import affinity_loss, affinity_matrix, explain_plan
from .modules import AffinityLoss

__version__ = "0.1.0"

__all__ = [
    "AffinityLoss",
    "affinity_loss",
    "affinity_matrix",
    "components",
    "explain_plan",
    "reference",
    *_components,
]
