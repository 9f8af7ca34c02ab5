"""The contract in NumPy float64, with loops over pairs: slow, obvious, forward only.

It shares no code with the package and was written from the specification alone, so an agreement
with `affkd_kernels.reference` is the agreement of two independent readings. Components are given as
`(name, options)`, options being a mapping or pairs, or as a bare name; the defaults stand here a
second time on purpose. Gradients come from central differences (`differences.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

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


class Stages(NamedTuple):
    """What one matrix goes through; entries that take no part are 0 and must not be read."""

    student_affinity: Array  # [Q, K]
    teacher_affinity: Array  # [Q, K]
    student: Array  # [Q, K] P_s
    teacher: Array  # [Q, K] P_t
    pair_loss: Array  # [Q, K]
    part: Array  # [Q, K] bool, the pairs that take part
    own: Array  # [Q, K] bool, the diagonal


def with_defaults(component: Any) -> tuple[str, Options]:
    name, options = (component, {}) if isinstance(component, str) else component
    allowed = dict(DEFAULTS[name])
    if name in AFFINITY_NAMES:
        allowed["clamp_min"] = None
    unknown = set(dict(options)) - set(allowed)
    if unknown:
        raise KeyError(f"{name} has no option {sorted(unknown)}")
    return name, {**allowed, **dict(options)}


def array(value: Any) -> Array:
    """Float64 copy of features, or a bool copy of a mask, from a tensor or an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.numpy() if str(value.dtype) != "torch.bfloat16" else value.float().numpy()
    value = np.asarray(value)
    return value.copy() if value.dtype == bool else value.astype(np.float64)


def as_items(x: Any, items: str) -> tuple[Array, tuple[int, ...]]:
    """Features as [M, Q, D] and the leading shape that M stands for."""
    x = array(x)
    if items == "samples":
        return x.reshape(1, x.shape[0], math.prod(x.shape[1:])), ()
    if items == "tokens":
        leading = x.shape[:-2]
        return x.reshape(math.prod(leading), *x.shape[-2:]), leading
    n, c, h, w = x.shape
    x = x.reshape(n, c, h * w)
    return (x, (n,)) if items == "channels" else (np.swapaxes(x, 1, 2), (n,))


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


# the whole pipeline


def stages(
    student: Any,
    teacher: Any,
    affinity: Any,
    normalization: Any,
    loss: Any,
    *,
    items: str = "samples",
    mask: Any = None,
    key_mask: Any = None,
    pair_mask: Any = None,
    diagonal: str = "keep",
    diagonal_offset: int | None = None,
    student_keys: Any = None,
    teacher_keys: Any = None,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    statistic_student: Any = None,
) -> Iterator[Stages]:
    """The stages of every matrix; axis "column" transposes right after the affinity."""
    sides = [_side(student, student_keys, items), _side(teacher, teacher_keys, items)]
    (q, k), (q_teacher, k_teacher) = sides
    anchor = (q, k) if statistic_student is None else _side(statistic_student, student_keys, items)
    crossed = student_keys is not None
    offset = diagonal_offset if crossed else 0
    name, o = with_defaults(normalization)
    for m in range(len(q)):
        shape = (q.shape[1], k.shape[1])
        own = np.zeros(shape, dtype=bool)
        for i, j in product(*map(range, shape)):
            own[i, j] = offset is not None and j == i + offset
        row_mask = _mask_of(mask, m, shape[:1])
        column_mask = _mask_of(key_mask, m, shape[1:]) if crossed else row_mask
        part = row_mask[:, None] & column_mask[None, :] & _mask_of(pair_mask, m, shape)
        if diagonal == "exclude":
            part &= ~own
        scales = {"student": student_scale, "teacher": teacher_scale}
        matrices = [
            affinity_matrix(affinity, rows[m], columns[m], part, own, diagonal, side, scales[side])
            for rows, columns, side in (
                (q, k, "student"),
                (q_teacher, k_teacher, "teacher"),
                (*anchor, "student"),
            )
        ]
        if name == "softmax" and o["axis"] == "column":
            matrices, part, own = [a.T for a in matrices], part.T, own.T
        yield _finish(normalization, loss, matrices, part, own)


def _side(x: Any, keys: Any, items: str) -> tuple[Array, Array]:
    queries, _ = as_items(x, items)
    if keys is None:
        return queries, queries
    # keys are always [.., K, D]; only samples have more to flatten
    return queries, as_items(keys, "samples" if items == "samples" else "tokens")[0]


def _mask_of(mask: Any, m: int, shape: tuple[int, ...]) -> Array:
    if mask is None:
        return np.ones(shape, dtype=bool)
    return array(mask).reshape(-1, *shape)[m]


def _finish(
    normalization: Any, loss: Any, matrices: list[Array], part: Array, own: Array
) -> Stages:
    a_student, a_teacher, anchor = matrices
    s = normalize(normalization, a_student, part, own, "student", anchor)
    t = normalize(normalization, a_teacher, part, own, "teacher")
    name, o = with_defaults(normalization)
    values = np.zeros_like(s)
    if name == "softmax":
        log_s = log_softmax(o, a_student, part, "student")
        log_t = log_softmax(o, a_teacher, part, "teacher")
    for i, j in zip(*np.nonzero(part), strict=True):
        if name == "softmax":
            values[i, j] = pair_loss_softmax(loss, log_s[i, j], log_t[i, j])
        else:
            values[i, j] = pair_loss(loss, s[i, j], t[i, j])
    return Stages(a_student, a_teacher, s, t, values, part, own)


def affinity_loss(
    student: Any,
    teacher: Any,
    affinity: Any = "gram",
    normalization: Any = "none",
    loss: Any = "mse",
    *,
    reduction: str = "mean",
    weight: float = 1.0,
    row_weight: Any = None,
    items: str = "samples",
    **call: Any,
) -> float | Array:
    """The loss of the contract, a float, or an array [.., Q] for reduction "none"."""
    name, o = with_defaults(normalization)
    if name == "softmax" and o["axis"] == "both":
        halves = [
            affinity_loss(
                student, teacher, affinity, (name, {**o, "axis": axis}), loss,
                reduction=reduction, weight=weight, items=items, **call,
            )
            for axis in ("row", "column")
        ]  # fmt: skip
        return 0.5 * (halves[0] + halves[1])
    matrices = list(stages(student, teacher, affinity, normalization, loss, items=items, **call))
    rows = [one.pair_loss.sum(1) for one in matrices]
    if row_weight is not None and rows:
        weights = array(row_weight).reshape(len(rows), -1)
        rows = [w * r for w, r in zip(weights, rows, strict=True)]
    if reduction == "none":
        leading = as_items(student, items)[1]
        width = rows[0].shape[0] if rows else as_items(student, items)[0].shape[1]
        return weight * np.array(rows).reshape(*leading, width)
    divisor = {
        "sum": 1,
        "batchmean": sum(int(one.part.any(1).sum()) for one in matrices),
        "mean": sum(int(one.part.sum()) for one in matrices),
        "matrixmean": len(matrices),
    }[reduction]
    total = float(sum(r.sum() for r in rows))
    return weight * total / divisor if divisor else 0.0


def angle_loss(student: Any, teacher: Any, mask: Any = None, beta: float = 1.0) -> float:
    """Relational angle (Park et al. 2019), every triple written out."""
    x, y = as_items(student, "samples")[0][0], as_items(teacher, "samples")[0][0]
    if mask is not None:
        x, y = x[array(mask)], y[array(mask)]
    total, n = 0.0, len(x)
    for i, j, k in product(range(n), repeat=3):
        angles = [float(np.sum(_edge(z[i], z[j]) * _edge(z[k], z[j]))) for z in (x, y)]
        total += pair_loss(("smooth_l1", {"beta": beta}), *angles)
    return total / n**3 if n else 0.0


def _edge(x: Array, vertex: Array) -> Array:
    return unit(x - vertex, 0.0)
