"""The formulas of the contract in NumPy float64: one pair, one row or one matrix at a time.

Components are given as `(name, options)`, options being a mapping or pairs, or as a bare name; the
defaults stand here a second time on purpose.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np

Array = np.ndarray
Options = dict[str, Any]

DEFAULTS: dict[str, Options] = {
    "gram": {"scale": 1.0, "student_scale": None, "teacher_scale": None},
    "cosine": {"eps": 1e-12, "shifted": False},
    "sqeuclidean": {},
    "euclidean": {"eps": 1e-12},
    "rbf": {"gamma": 0.4, "unit": True, "taylor_order": None, "eps": 1e-12},
    "polynomial": {"degree": 2, "scale": 1.0, "offset": 0.0, "unit": False},
    "none": {},
    "row_l2": {"eps": 1e-12},
    "row_l1": {"eps": 1e-12},
    "row_sum": {"eps": 1e-12},
    "softmax": {"tau": 1.0, "student_tau": None, "teacher_tau": None, "axis": "row"},
    "frobenius": {"eps": 1e-12, "center": False},
    "mean": {"over": "positive", "eps": 1e-12},
    "max": {"detach": False, "eps": 1e-12},
    "mse": {},
    "l1": {},
    "smooth_l1": {"beta": 1.0},
    "kl": {"eps": 1e-7, "direction": "forward"},
    "cross_entropy": {},
}
AFFINITY_NAMES = ("gram", "cosine", "sqeuclidean", "euclidean", "rbf", "polynomial")
UNIT_EPS = 1e-12


def with_defaults(component: Any) -> tuple[str, Options]:
    name, options = (component, {}) if isinstance(component, str) else component
    allowed = dict(DEFAULTS[name])
    if name in AFFINITY_NAMES:
        allowed["clamp_min"] = None
    unknown = set(dict(options)) - set(allowed)
    if unknown:
        raise KeyError(f"{name} has no option {sorted(unknown)}")
    return name, {**allowed, **dict(options)}


# affinities


def unit(x: Array, eps: float) -> Array:
    length = math.sqrt(float(np.sum(x * x)))
    return np.zeros_like(x) if length <= eps else x / length


def pair_affinity(name: str, o: Options, q: Array, k: Array, is_own: bool, scale: float) -> float:
    """A_ij of one pair, before clamp and diagonal; q [D], k [D]."""
    if name == "cosine" or (name == "rbf" and o["unit"]) or (name == "polynomial" and o["unit"]):
        eps = o.get("eps", UNIT_EPS)
        q, k = unit(q, eps), unit(k, eps)
    g = float(np.sum(q * k))
    # the difference itself, not n_q + n_k - 2 g: no common offset can hurt it
    sq = 0.0 if is_own else float(np.sum((q - k) ** 2))
    if name == "gram":
        return scale * g
    if name == "cosine":
        return (1.0 + g) / 2.0 if o["shifted"] else g
    if name == "sqeuclidean":
        return sq
    if name == "euclidean":
        return 0.0 if is_own else math.sqrt(max(sq, o["eps"]))
    if name == "rbf":
        if o["taylor_order"] is None:
            return math.exp(-o["gamma"] * sq)
        orders = range(o["taylor_order"] + 1)
        terms = [(2.0 * o["gamma"] * g) ** p / math.factorial(p) for p in orders]
        return math.exp(-2.0 * o["gamma"]) * sum(terms)
    return (o["scale"] * g + o["offset"]) ** o["degree"]


def gram_scale(o: Options, side: str, per_call: float | None, dimension: int) -> float:
    scale = per_call
    if scale is None:
        scale = o.get(f"{side}_scale")
    if scale is None:
        scale = o.get("scale", 1.0)
    if scale == "1/D":
        return 1.0 / dimension
    if scale == "1/sqrt(D)":
        return 1.0 / math.sqrt(dimension)
    return float(scale)


def affinity_matrix(
    component: Any,
    queries: Array,  # [Q, D]
    keys: Array,  # [K, D]
    part: Array,  # [Q, K]
    own: Array,  # [Q, K]
    diagonal: str = "keep",
    side: str = "student",
    per_call_scale: float | None = None,
) -> Array:
    name, o = with_defaults(component)
    scale = gram_scale(o, side, per_call_scale, queries.shape[-1]) if name == "gram" else 1.0
    a = np.zeros((len(queries), len(keys)))
    for i, j in product(range(len(queries)), range(len(keys))):
        if not part[i, j]:
            continue
        value = pair_affinity(name, o, queries[i], keys[j], bool(own[i, j]), scale)
        if o["clamp_min"] is not None:
            value = max(value, o["clamp_min"])
        a[i, j] = 0.0 if own[i, j] and diagonal == "zero" else value
    return a


# normalizations


def row_statistic(name: str, entries: Array) -> float:
    if name == "row_l2":
        return math.sqrt(float(np.sum(entries**2)))
    return float(np.sum(np.abs(entries))) if name == "row_l1" else float(np.sum(entries))


def matrix_statistic(name: str, o: Options, a: Array, part: Array, own: Array) -> float:
    """One number for the matrix; 0 when it is made of nothing."""
    entries = a[part]
    if name == "mean" and o["over"] == "positive":
        entries = entries[entries > 0]
    if name == "mean" and o["over"] == "offdiag":
        entries = a[part & ~own]
    if entries.size == 0:
        return 0.0
    if name == "frobenius":
        return math.sqrt(float(np.sum(entries**2)))
    return float(np.max(entries)) if name == "max" else float(np.mean(entries))


def centered(a: Array, part: Array) -> Array:
    """Double centering over the valid items: `part` is then always an outer product of masks."""
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    block = a[np.ix_(rows, columns)]
    out = np.zeros_like(a)
    if block.size:
        block = block - block.mean(1, keepdims=True) - block.mean(0, keepdims=True) + block.mean()
        out[np.ix_(rows, columns)] = block
    return out


def softmax_tau(o: Options, side: str) -> float:
    own_tau = o[f"{side}_tau"]
    return o["tau"] if own_tau is None else own_tau


def log_softmax(o: Options, a: Array, part: Array, side: str) -> Array:
    """log P, 0 where a pair takes no part."""
    out = np.zeros_like(a)
    for i in range(len(a)):
        if part[i].any():
            logits = a[i, part[i]] / softmax_tau(o, side)
            peak = logits.max()
            out[i, part[i]] = logits - peak - math.log(np.sum(np.exp(logits - peak)))
    return out


def normalize(
    component: Any,
    a: Array,
    part: Array,
    own: Array,
    side: str = "student",
    statistic_from: Array | None = None,
) -> Array:
    """P; `statistic_from` is the matrix a detached statistic is taken from, `a` when None."""
    name, o = with_defaults(component)
    p = np.zeros_like(a)
    if name == "none":
        p[part] = a[part]
    elif name == "softmax":
        p[part] = np.exp(log_softmax(o, a, part, side))[part]
    elif name.startswith("row_"):
        for i in range(len(a)):
            statistic = row_statistic(name, a[i, part[i]])
            if not statistic <= o["eps"]:
                p[i, part[i]] = a[i, part[i]] / statistic
    else:
        plain_norm = matrix_statistic("frobenius", o, a, part, own)
        if name == "frobenius" and o["center"]:
            a = centered(a, part)
        detached = name == "max" and o["detach"] and statistic_from is not None
        statistic = matrix_statistic(name, o, statistic_from if detached else a, part, own)
        if name == "frobenius" and o["center"]:
            statistic *= statistic > 8 * np.finfo(np.float64).eps * plain_norm
        if not statistic <= o["eps"]:
            p[part] = a[part] / statistic
    return p


# losses


def pair_loss(component: Any, s: float, t: float) -> float:
    name, o = with_defaults(component)
    difference = abs(s - t)
    if name == "mse":
        return difference**2
    if name == "l1":
        return difference
    if name == "smooth_l1":
        beta = o["beta"]
        if difference < beta:
            return 0.5 * difference**2 / beta
        return difference - 0.5 * beta

    def divergence(p: float, q: float) -> float:
        return p * (math.log(p + o["eps"]) - math.log(q + o["eps"]))

    if name != "kl":
        raise ValueError(f"{name} needs softmax")
    return _directed(o["direction"], divergence(t, s), divergence(s, t))


def pair_loss_softmax(component: Any, log_s: float, log_t: float) -> float:
    """The distribution losses on softmax, in log space and without eps."""
    name, o = with_defaults(component)
    s, t = math.exp(log_s), math.exp(log_t)
    if name == "cross_entropy":
        return -t * log_s
    if name == "kl":
        return _directed(o["direction"], t * (log_t - log_s), s * (log_s - log_t))
    return pair_loss(component, s, t)


def _directed(direction: str, forward: float, reverse: float) -> float:
    return {"forward": forward, "reverse": reverse, "symmetric": forward + reverse}[direction]
