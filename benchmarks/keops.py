"""The losses in KeOps: symbolic pair matrices that are reduced without being stored.

Needs ``pip install pykeops`` and a C++ compiler; KeOps compiles every formula at its first use.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving distillation."""
    s, t = (_inner_products(x) for x in (student, teacher))
    s_rows, t_rows = ((a**2).sum(dim=1).sqrt() for a in (s, t))  # [B, 1]
    difference = s * _row(1 / s_rows) - t * _row(1 / t_rows)
    return _total(difference**2) / len(student) ** 2


def pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Probabilistic knowledge transfer."""
    s, t = ((_inner_products(F.normalize(x)) + 1) / 2 for x in (student, teacher))
    p_s, p_t = (a * _row(1 / a.sum(dim=1)) for a in (s, t))
    return _total(p_t * ((p_t + eps) / (p_s + eps)).log()) / len(student) ** 2


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational distillation of distances, for rows that are all distinct."""
    pairs = len(student) ** 2 - len(student)
    s, t = (_squared_distances(x).sqrt() for x in (student, teacher))
    s, t = (a * _parameter(pairs / _total(a)) for a in (s, t))
    distance = (s - t).abs()
    # smooth L1 with beta = 1: a square up to 1, a line beyond
    inside = distance.clamp(0, 1)
    return _total(inside * (distance - inside / 2)) / len(student) ** 2


def rbf_frobenius(student: Tensor, teacher: Tensor, gamma: float = 0.4) -> Tensor:
    """A Gaussian kernel of unit features with one norm for the whole matrix."""
    s, t = ((-gamma * _squared_distances(F.normalize(x))).exp() for x in (student, teacher))
    s, t = (a * _parameter(1 / _total(a**2).sqrt()) for a in (s, t))
    return _total((s - t) ** 2)


FORMULAS = {
    "sp": sp,
    "pkt": pkt,
    "rkd_distance": rkd_distance,
    "rbf_frobenius": rbf_frobenius,
}


def _lazy(x: Tensor) -> Any:
    return importlib.import_module("pykeops.torch").LazyTensor(x)


def _inner_products(x: Tensor) -> Any:
    x = x.flatten(1)
    return (_lazy(x[:, None].contiguous()) * _lazy(x[None].contiguous())).sum(-1)


def _squared_distances(x: Tensor) -> Any:
    x = x.flatten(1)
    return ((_lazy(x[:, None].contiguous()) - _lazy(x[None].contiguous())) ** 2).sum(-1)


def _row(values: Tensor) -> Any:
    return _lazy(values.view(-1, 1, 1))


def _parameter(value: Tensor) -> Any:
    return _lazy(value.view(1, 1, 1))


def _total(a: Any) -> Tensor:
    return a.sum(dim=1).sum()
